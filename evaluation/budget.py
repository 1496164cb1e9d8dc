"""
`python -m icae.evaluation.budget`: what the GPU presets take, on paper.

Weights are counted on models without storage, of the published shapes. Operations are those of matrix products;
weights are frozen, so the products for their gradients fall away. Activations are those of gradient checkpointing.
Nothing is measured here.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoConfig

from icae.configuration_icae import ICAEConfig
from icae.evaluation.record import write_record
from icae.modeling_icae import ICAEForConditionalGeneration


PRESETS = Path(__file__).resolve().parent.parent / "trainers" / "presets"
SHAPES = {  # of each preset's base, from its config.json on the Hub
    "gpu_1b": ("llama", {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24,
                         "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 49152,
                         "tie_word_embeddings": True}),
    "gpu_7b": ("qwen2", {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
                         "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064,
                         "tie_word_embeddings": False}),
}  # fmt: skip
FLOPS = 4e14  # of an H100 or H200 in bfloat16 at 40 % of its peak


def budget(preset: str) -> dict[str, Any]:
    """Tokens, weights, operations and bytes of a preset."""
    values = yaml.safe_load((PRESETS / f"{preset}.yaml").read_text())
    kind, shape = SHAPES[preset]
    text = AutoConfig.for_model(kind, **shape)
    fields = ("memory_type", "span_length", "compression_ratio", "encoder_layout", "decoder_layout")
    config = ICAEConfig(
        text, lora_r=values["lora_r"], lora_alpha=values["lora_alpha"], **{k: values[k] for k in fields}
    )
    with torch.device("meta"):
        model = ICAEForConditionalGeneration(config)
    trained = sum(parameter.numel() for parameter in model.trainable_parameters().values())
    base = sum(parameter.numel() for parameter in model.parameters()) - trained
    vocabulary, hidden, layers = text.vocab_size, text.hidden_size, text.num_hidden_layers
    in_layers = base - vocabulary * hidden * (1 if text.tie_word_embeddings else 2)

    # One context of mean length, see `cut_document`; those that are cut short have half of it on average.
    context = (1 + values["max_spans"]) / 2 * values["span_length"] * (1 - values["short_share"] / 2)
    encoded = context * (1 + 1 / values["compression_ratio"])
    decoded = context + values["continuation_length"]
    rows = values["per_device_train_batch_size"]
    # Forward, once more in the backward pass (checkpointing), and the gradients of activations; none of weights.
    per_layer_weight, per_logit_weight = 2 + 2 + 2, 2 + 2
    operations = (encoded + decoded) * in_layers * per_layer_weight + decoded * vocabulary * hidden * per_logit_weight
    slots = context / values["compression_ratio"]
    slot_bytes = 2 * 2 * layers * text.num_key_value_heads * (hidden // text.num_attention_heads)
    kept = rows * (encoded + decoded) * hidden * layers * 2
    one_layer = rows * max(encoded, decoded) * (8 * hidden + 3 * text.intermediate_size) * 2 * 2
    tokens = values["max_steps"] * rows * context
    return {
        "base": values["base_model"],
        "base_weights": base,
        "trained_weights": trained,
        "context_tokens_per_step": round(rows * context),
        "context_tokens": round(tokens),
        "operations": values["max_steps"] * rows * operations,
        "gpu_hours": values["max_steps"] * rows * operations / FLOPS / 3600,
        "bytes": {
            "base": 2 * base,
            "adapter, gradients, AdamW": 16 * trained,
            "activations": round(kept + one_layer + rows * slots * slot_bytes),
        },
        "bytes_of_a_slot": slot_bytes,
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="What the GPU presets take, on paper.")
    parser.add_argument("--output", type=Path, default=Path("results/budget.json"))
    arguments = parser.parse_args(argv)
    presets = {name: budget(name) for name in SHAPES}
    write_record(arguments.output, {"what": "GPU presets, on paper; not run", "flops": FLOPS, "presets": presets})
    for name, row in presets.items():
        total = sum(row["bytes"].values()) / 2**30
        print(f"{name}: {row['context_tokens'] / 1e6:.0f} M tokens, {row['gpu_hours']:.1f} h, {total:.1f} GiB")


if __name__ == "__main__":
    main()
