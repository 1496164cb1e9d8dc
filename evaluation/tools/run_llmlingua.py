"""
Compresses contexts with LLMLingua (arXiv 2310.05736), whose environment this file runs in: `python FILE BASE`.

Reads lines {"context": text, "budget": tokens} and writes a line {"text": …} for each. The base itself judges which
tokens say little. A context is one segment, since from the second segment on the package handles the key-value caches
of older transformers.
"""

import json
import os
import sys

import tiktoken
from transformers import AutoTokenizer


replies = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what the package prints is no reply
base = sys.argv[1]
tokenizer = AutoTokenizer.from_pretrained(base)
# The package counts with OpenAI's tokenizer what a request would cost, and would download it for that.
tiktoken.encoding_for_model = lambda name: tokenizer

from llmlingua import PromptCompressor  # noqa: E402


compressor = PromptCompressor(base, device_map="cpu")
for line in sys.stdin:
    row = json.loads(line)
    length = len(compressor.tokenizer(row["context"], add_special_tokens=False)["input_ids"])
    found = compressor.compress_prompt([row["context"]], target_token=row["budget"], iterative_size=length)
    print(json.dumps({"text": found["compressed_prompt"]}), file=replies, flush=True)
