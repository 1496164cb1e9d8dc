"""
Why float16 bases are refused: `python -m icae.evaluation.float16 --texts FILE.parquet`.

Measures the largest activation inside a base on real text, with and without an ICAE's adapter, against the range of
float16.
"""

import argparse
from pathlib import Path

import torch
from datasets import load_dataset

from icae.cli import load_model, whole_number
from icae.evaluation.record import write_record


FLOAT16_MAX = torch.finfo(torch.float16).max


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="The largest activation of a base, with and without the adapter.")
    parser.add_argument("--texts", required=True, help="Parquet file with a column `text`")
    parser.add_argument("--model", help="an ICAE (default: the embedded checkpoint)")
    parser.add_argument("--base", help="its base, if not where the ICAE says")
    parser.add_argument("--samples", type=whole_number(1), default=16)
    parser.add_argument("--seed", type=whole_number(0), default=0)
    parser.add_argument("--output", type=Path, default=Path("results/float16.json"))
    arguments = parser.parse_args(argv)
    model = load_model(arguments.model, arguments.base, "float32")
    largest = {"frozen base": 0.0, "with the adapter": 0.0}

    def watch(module, inputs, output):
        name = "with the adapter" if model.adapter_enabled else "frozen base"
        states = output if isinstance(output, torch.Tensor) else output[0]
        largest[name] = max(largest[name], float(states.abs().max()))

    for module in model.language_model.base_model.modules():
        if not list(module.children()) or hasattr(module, "self_attn"):
            module.register_forward_hook(watch)
    documents = load_dataset("parquet", data_files=arguments.texts, split="train").shuffle(seed=arguments.seed)
    texts = [text[:4000] for text in documents.take(arguments.samples)["text"]]
    tokens = 0
    for text in texts:
        memory = model.compress(text)
        ids = torch.tensor(model.tokenizer(text, add_special_tokens=False)["input_ids"])[None]
        model.language_model(input_ids=ids.to(model.device))
        tokens += int(memory.num_tokens)
    base = model.config.base_model_name_or_path
    record = {
        "what": f"largest activation of {base} in float32, against the largest float16",
        "largest_activation": largest,
        "largest_float16": FLOAT16_MAX,
        "share_of_range": {name: value / FLOAT16_MAX for name, value in largest.items()},
        "tokens": tokens,
        "seed": arguments.seed,
    }
    write_record(arguments.output, record)
    for name, value in largest.items():
        print(f"{value:10.0f} of {FLOAT16_MAX:.0f}  {name}")


if __name__ == "__main__":
    main()
