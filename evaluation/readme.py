"""Writes the README's results from the files in `results/`: `python -m icae.evaluation.readme`."""

import json
from pathlib import Path
from typing import Any


BEGIN, END = "<!-- results:begin -->\n", "<!-- results:end -->"


def render(results: Path) -> str:
    """The results section, in Markdown. Parts whose file is missing are left out."""
    parts = []
    for name, section in (("embedded", embedded), ("layouts", layouts), ("bench_train", costs)):
        file = results / f"{name}.json"
        if file.is_file():
            parts.append(section(json.loads(file.read_text())))
    return "\n".join(parts)


def embedded(record: dict[str, Any]) -> str:
    """The embedded checkpoint at its last evaluation."""
    (run,) = record["runs"].values()
    tokens = run["context_tokens"][-1]
    rows = "\n".join(
        f"| {run['context_tokens'][at] / 1e6:.2f} M tokens | {run['ae_loss'][at]:.2f} | "
        f"{run['ae_loss_other_text'][at]:.2f} | {run['ae_accuracy'][at]:.1%} | {run['bleu'][at]:.2f} |"
        for at in (0, -1)
    )
    return f"""\
**The embedded checkpoint** (SmolLM2-135M-Instruct, 4x, {tokens / 1e6:.2f} M context tokens on one CPU core), on
held-out text of all kinds, contexts of up to 256 tokens:

| trained on | autoencoding loss | with another text's slots | accuracy (teacher-forced) | BLEU of the reconstruction |
| --- | --- | --- | --- | --- |
{rows}

Losses in nats per token; the curve is in [results/embedded.json](results/embedded.json) and
[embedded.png](results/embedded.png).
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


def main() -> None:
    root = Path(__file__).resolve().parents[1]
    readme = root / "README.md"
    before, _, rest = readme.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    readme.write_text(before + BEGIN + render(root / "results") + END + after)


if __name__ == "__main__":
    main()
