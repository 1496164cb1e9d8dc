"""Writes the README's results from the files in `results/`: `python -m icae.evaluation.readme`."""

import json
from pathlib import Path
from typing import Any


BEGIN, END = "<!-- results:begin -->\n", "<!-- results:end -->"


def render(results: Path) -> str:
    """The results section, in Markdown. Parts whose file is missing are left out."""
    parts = []
    for name, section in SECTIONS.items():
        file = results / f"{name}.json"
        if file.is_file():
            parts.append(section(json.loads(file.read_text())))
    return "\n".join(parts)


def embedded(record: dict[str, Any]) -> str:
    """What the checkpoints reconstruct."""
    spans = record["arguments"]["max_spans"]
    rows = "\n".join(
        f"| {name} | {row['ae_loss']:.2f} | {row['ae_loss_other_text']:.1f} | {row['ae_accuracy']:.1%} | "
        f"{row['bleu']:.2f} | {row['lm_loss']:.2f} | {row['lm_loss_other_text']:.2f} |"
        for name, row in record["models"].items()
    )
    return f"""\
**The embedded checkpoint** (SmolLM2-135M-Instruct, 4x, trained on one CPU core) on held-out text of all kinds,
{record["context_tokens"]:,} tokens in contexts of 1 to {spans} spans
([reconstruction.json](results/reconstruction.json); learning curves: [first](results/embedded.png),
[second](results/embedded-2.png) run, [tuning](results/sft.png)):

| | autoencoding loss | another text's slots | accuracy | BLEU | continuation loss | another text's slots |
| --- | --- | --- | --- | --- | --- | --- |
{rows}

Losses in nats per token, accuracy teacher-forced, BLEU of the text that is really written out.
"""


def answers(record: dict[str, Any]) -> str:
    """Answers to held-out prompts."""
    columns = ("loss", "f1", "f1_share_of_full_context", "short_f1", "short_exact_match", "long_rougeL")
    rows = "\n".join(
        f"| {name} | " + " | ".join(f"{row[column]:.2f}" for column in columns) + " |"
        for name, row in record["summary"].items()
    )
    return f"""\
**Answers from the slots**: {record["rows"]} held-out prompts of {len(record["by_source"]["icae"])} sources,
{record["context_tokens"]:,} context tokens in {record["slots"]:,} slots ([answers.json](results/answers.json)):

| answers from | loss of the reference | token F1 | of full context | short: F1 | exact match | long: ROUGE-L |
| --- | --- | --- | --- | --- | --- | --- |
{rows}

The frozen base reads the full, the truncated (as many tokens as there are slots) and no context; "tuned" is a LoRA of
the same size, tuned on data of the same kind with the full context ([how long](results/README.md)).
"""


def layouts(record: dict[str, Any]) -> str:
    """Layouts and memory types at equal tokens."""
    rows = "\n".join(
        f"| `{run['config']['memory_type']}` | {run['config']['encoder_layout']} | {run['ae_loss'][-1]:.2f} | "
        f"{run['ae_loss_other_text'][-1]:.2f} | {run['ae_accuracy'][-1]:.1%} |"
        for run in record["runs"].values()
    )
    tokens = next(iter(record["runs"].values()))["context_tokens"][-1]
    return f"""\
**What leaves the plateau**: the same base, 64-token spans to 16 slots, autoencoding only, {tokens / 1e3:.0f} k
context tokens each (`make comparison`; [curves](results/layouts.png)):

| memory | layout | autoencoding loss | with another text's slots | accuracy |
| --- | --- | --- | --- | --- |
{rows}
"""


def costs(record: dict[str, Any]) -> str:
    """What a training step costs, as ratios."""
    rows = "\n".join(f"| {name} | {value:.2f}x |" for name, value in record["ratios"].items())
    hardware = record["made_by"]["hardware"]
    return f"""\
**What training costs** (`icae bench train`, ratios within one run on {hardware["torch_threads"]} CPU threads,
{record["memory_batch"]["rows"]} rows of {record["arguments"]["span_length"]} tokens a step; two copies: a plain loop
with two copies of the base and all logits, one row at a time, as the official code trains):

| | |
| --- | --- |
{rows}
"""


SECTIONS = {"reconstruction": embedded, "answers": answers, "layouts": layouts, "bench_train": costs}


def main() -> None:
    root = Path(__file__).resolve().parents[1]
    readme = root / "README.md"
    before, _, rest = readme.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    readme.write_text(before + BEGIN + render(root / "results") + END + after)


if __name__ == "__main__":
    main()
