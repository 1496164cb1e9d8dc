"""
Reads contexts with a part of their keys and values, as kvpress chooses it, in whose environment this file runs:
`python FILE BASE DTYPE`.

Reads lines {"context": token ids, "keep": how many positions, "prompt": token ids} with either "response" (token ids),
for which it writes {"nats": [...]}, or "max_new_tokens", for which it writes {"answer": text}.
"""

import json
import os
import sys

import torch
from kvpress import ExpectedAttentionPress, KVPressTextGenerationPipeline
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache


replies = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what the package prints is no reply
base, dtype = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype)).eval()
pipeline = KVPressTextGenerationPipeline(model=model, tokenizer=AutoTokenizer.from_pretrained(base), device="cpu")


@torch.no_grad()
def work(row):
    context, prompt = torch.tensor([row["context"]]), row["prompt"]
    length, cache = context.shape[1], DynamicCache()
    # A press rounds down the number of positions that it keeps.
    with ExpectedAttentionPress(compression_ratio=max(0.0, 1 - (row["keep"] + 0.5) / length))(model):
        model.model(input_ids=context, past_key_values=cache)
    if "max_new_tokens" in row:
        return {"answer": pipeline.generate_answer(torch.tensor([prompt]), cache, length, row["max_new_tokens"])}
    ids, response = torch.tensor([prompt + row["response"][:-1]]), torch.tensor(row["response"])
    positions = torch.arange(length, length + ids.shape[1])[None]
    logits = model(input_ids=ids, past_key_values=cache, position_ids=positions, logits_to_keep=len(response)).logits
    return {"nats": torch.nn.functional.cross_entropy(logits[0].float(), response, reduction="none").tolist()}


for line in sys.stdin:
    print(json.dumps(work(json.loads(line))), file=replies, flush=True)
