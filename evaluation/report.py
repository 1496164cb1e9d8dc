"""
`icae report`: one page of all results, with plots, from the files in `results/`.

Writes a folder: `index.html`, which holds everything and can be sent as it is, and the same as `README.md` with the
plots beside it. What has not been measured yet is listed at the end with the command that measures it.
"""

import argparse
import base64
import json
import os
from collections.abc import Callable
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import markdown
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from icae.evaluation import tables
from icae.evaluation.tables import Record


PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>icae: results</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0; font-size: 0.9rem; display: block; overflow-x: auto }
th, td { padding: 0.25rem 0.6rem; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top }
img { max-width: 100% }
code { background: #f4f4f4; padding: 0 0.2rem }
</style>
</head>
<body>
BODY
</body>
</html>
"""


class Section(NamedTuple):
    """A part of the report: its title, its file in `results/`, the command that makes it, and what is shown of it."""

    title: str
    name: str
    command: str
    texts: tuple[Callable[[Record], str], ...]
    plots: tuple[Callable[[Axes, Record], None], ...] = ()


# ------------------------------------------------------------------------------------------------------------- plots


def plot_lengths(axes: Axes, record: Record) -> None:
    """Autoencoding loss over context length, the control dashed."""
    for name, model in record["models"].items():
        lengths = [int(length) for length in model.get("by_length", {})]
        rows = model.get("by_length", {}).values()
        (line,) = axes.plot(lengths, [row["ae_loss"] for row in rows], marker="o", label=name)
        control = [row["ae_loss_other_text"] for row in rows]
        axes.plot(lengths, control, linestyle="--", color=line.get_color(), alpha=0.6)
    axes.plot([], [], linestyle="--", color="gray", label="the same with another text's slots")
    axes.set(xlabel="context tokens", ylabel="autoencoding loss, nats per token", ylim=(0, None))
    axes.legend()


def plot_continuation(axes: Axes, record: Record) -> None:
    """Perplexity over context length, of the first model."""
    found = next(iter(record["models"].values()))
    lengths = [int(length) for length in found]
    conditions = [key for key in next(iter(found.values())) if key != "slots"]
    for condition in conditions:
        perplexities = [row[condition]["perplexity"] for row in found.values()]
        axes.plot(lengths, perplexities, marker="o", label=condition)
    axes.set(xlabel="context tokens", ylabel="perplexity of the text that follows")
    axes.legend()


def plot_answers(axes: Axes, record: Record) -> None:
    """Token F1 by reader, with intervals."""
    rows = record["summary"]
    values = [row["f1"] for row in rows.values()]
    ends = np.array([row.get("f1_interval", (row["f1"], row["f1"])) for row in rows.values()]).T
    axes.barh(list(rows), values, xerr=np.abs(ends - values), color=_colors(rows), ecolor="gray", capsize=3)
    axes.set(xlabel="token F1, mean over sources")
    axes.invert_yaxis()


def plot_judge(axes: Axes, record: Record) -> None:
    """Shares of pairs won, tied and lost."""
    rows, left = record["against"], np.zeros(len(record["against"]))
    for outcome, color in (("win", "tab:green"), ("tie", "lightgray"), ("lose", "tab:red")):
        shares = np.array([row[outcome] for row in rows.values()])
        axes.barh(list(rows), shares, left=left, color=color, label=outcome)
        left += shares
    axes.set(xlabel="share of the pairs", xlim=(0, 1))
    axes.invert_yaxis()
    axes.legend(ncols=3)


def plot_probes(axes: Axes, record: Record) -> None:
    """Shares of right probes by kind, of the first model."""
    readers = next(iter(record["models"].values()))["readers"]
    kinds, width = list(readers["icae"]), 0.8 / len(readers)
    for number, (name, found) in enumerate(readers.items()):
        places = np.arange(len(kinds)) + (number - (len(readers) - 1) / 2) * width
        axes.bar(places, [found[kind]["accuracy"] for kind in kinds], width, label=name)
    axes.axhline(0.5, linestyle="--", color="gray", label="chance")
    axes.set_xticks(range(len(kinds)), kinds, rotation=30, ha="right")
    axes.set(ylabel="share of right choices", ylim=(0, 1))
    axes.legend(ncols=3)


def plot_answering(axes: Axes, record: Record) -> None:
    """How many times faster slots are, over context length, at the smallest batch."""
    batch = min(cell["batch"] for cell in record["cells"])
    cells = [cell for cell in record["cells"] if cell["batch"] == batch]
    lengths = [cell["context_tokens"] for cell in cells]
    for name in cells[0]["ratios"]:
        for what in (what for what in cells[0]["ratios"][name] if what.endswith("times faster")):
            label = f"{name}: {what.removesuffix(', times faster')}"
            axes.plot(lengths, [cell["ratios"][name][what] for cell in cells], marker="o", label=label)
    axes.axhline(1, linestyle="--", color="gray")
    label = "times faster than with the full context"
    axes.set(xlabel=f"context tokens, {batch} at once", ylabel=label, yscale="log")
    axes.figure.legend(fontsize="small", loc="outside right upper")


def plot_growth(axes: Axes, record: Record) -> None:
    """How time to the first token, an answer's time and bytes of keys and values grow, at the smallest batch."""
    batch = min(cell["batch"] for cell in record["cells"])
    cells = [cell for cell in record["cells"] if cell["batch"] == batch]
    lengths = [cell["context_tokens"] for cell in cells]
    name = next(iter(cells[0]["ratios"]))
    measures = {
        "first token": [
            [cell["seconds"][side]["first_token"] for cell in cells] for side in ("full context", f"{name} cached")
        ],
        "answer": [[cell["seconds"][side]["total"] for cell in cells] for side in ("full context", f"{name} cached")],
        "keys and values": [[cell["cache_bytes"][side] for cell in cells] for side in ("full context", name)],
    }
    for label, (full, slots) in measures.items():
        (line,) = axes.plot(lengths, np.divide(full, full[0]), marker="o", label=label)
        axes.plot(lengths, np.divide(slots, full[0]), marker="o", linestyle="--", color=line.get_color())
    axes.plot([], [], linestyle="--", color="gray", label=f"the same from cached slots, {name}")
    label = "relative to the full context's first point"
    axes.set(xlabel=f"context tokens, {batch} at once", ylabel=label, yscale="log")
    axes.figure.legend(fontsize="small", loc="outside right upper")


def _colors(names: Any) -> list[str]:
    """What is measured stands out from what it is compared with."""
    return ["tab:blue" if name == "icae" else "lightsteelblue" for name in names]


SWEEP = "icae sweep evaluation/sweeps/ablations.yaml"  # the file says what is measured of its models
SECTIONS = (
    Section("Against its aims", "aims", "icae evaluate aims", (tables.aims,)),
    Section(
        "Reconstruction",
        "reconstruction",
        "icae evaluate reconstruction --data DOCUMENTS",
        (tables.embedded, tables.lengths, tables.kinds_of_text),
        (plot_lengths,),
    ),
    Section(
        "Reconstruction after the first pretraining run",
        "pretrained",
        "icae evaluate reconstruction --models pretrained=FOLDER --output results/pretrained.json",
        (tables.lengths,),
        (plot_lengths,),
    ),
    Section("Reconstruction by ratio", "ratios", SWEEP, (tables.lengths,)),
    Section("Several spans, trained and not", "spans", SWEEP, (tables.lengths,), (plot_lengths,)),
    Section(
        "Continuation",
        "continuation",
        "icae evaluate continuation --data DOCUMENTS",
        (tables.continuation,),
        (plot_continuation,),
    ),
    Section(
        "Answers",
        "answers",
        "icae evaluate answers --data TRIPLES",
        (tables.answers, tables.by_source, tables.examples),
        (plot_answers,),
    ),
    Section(
        "Slots against other readers, source by source",
        "answers_by_source",
        "icae evaluate answers --data TRIPLES --readers … --output results/answers_by_source.json",
        (tables.better_and_worse, tables.icae_minus),
    ),
    Section(
        "Slots against other readers, with a repetition penalty",
        "answers_by_source_penalty",
        "icae evaluate answers --data TRIPLES --readers … --repetition-penalty 1.15 --output …",
        (partial(tables.better_and_worse, name="answers_by_source_penalty"), tables.icae_minus),
    ),
    Section(
        "Judged answers",
        "judge",
        "icae evaluate judge --data TRIPLES --judge URL MODEL --against FILE",
        (tables.judge,),
        (plot_judge,),
    ),
    Section("Facts", "probes", "icae evaluate probes", (tables.probes,), (plot_probes,)),
    Section("Facts by ratio", "probes_by_ratio", SWEEP, (partial(tables.probes, name="probes_by_ratio"),)),
    Section(
        "Cost of an answer",
        "bench_generate",
        "icae bench generate",
        (tables.answering,),
        (plot_answering, plot_growth),
    ),
    Section(
        "Cost by ratio",
        "bench_generate_ratios",
        "icae bench generate --ratios 2 4 8 16 --output results/bench_generate_ratios.json",
        (partial(tables.answering, name="bench_generate_ratios"),),
    ),
    Section("Cost of training", "bench_train", "icae bench train", (tables.costs,)),
)


# -------------------------------------------------------------------------------------------------------------- page


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="icae report", description="One page of all results, with plots.")
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder with the results")
    parser.add_argument("--output", type=Path, default=Path("report"), help="folder to write (default: report)")
    arguments = parser.parse_args(argv)
    if not arguments.results.is_dir():
        raise ValueError(f"Expected a folder with results, got {str(arguments.results)!r}; name it with `--results`.")
    arguments.output.mkdir(parents=True, exist_ok=True)
    text, plots = build(arguments.results)
    for name, image in plots.items():
        (arguments.output / name).write_bytes(image)
    beside = os.path.relpath(arguments.results, arguments.output)
    text = text.replace("](results/", f"]({beside}/")
    (arguments.output / "README.md").write_text(text, encoding="utf-8")
    (arguments.output / "index.html").write_text(page(text, plots), encoding="utf-8")
    print(f"written to {arguments.output / 'index.html'}")


def build(results: Path) -> tuple[str, dict[str, bytes]]:
    """The report in Markdown, and its plots (PNG) by file name."""
    parts, plots, missing = ["# Results\n"], {}, []
    for section in SECTIONS:
        file = results / f"{section.name}.json"
        if not file.is_file():
            missing.append(f"- {section.title}: `{section.command}`\n")
            continue
        record = json.loads(file.read_text())
        parts += [f"## {section.title}\n", *(text(record) for text in section.texts)]
        for number, plot in enumerate(section.plots, start=1):
            image = f"{section.name}-{number}.png" if number > 1 else f"{section.name}.png"
            plots[image] = draw(plot, record)
            parts.append(f"![{section.title}]({image})\n")
        parts.append(birth(record))
    for curves in sorted(results.glob("*.png")):
        file = curves.with_suffix(".json")
        record = json.loads(file.read_text()) if file.is_file() else None
        if not isinstance(record, dict) or "runs" not in record:
            continue  # a picture of something else
        plots[curves.name] = curves.read_bytes()
        title = record["what"]
        parts += [f"## {title}\n", f"![{title}]({curves.name})\n", tables.runs(record), birth(record)]
    shown = {section.name for section in SECTIONS} | {Path(name).stem for name in plots}
    others = [file for file in sorted(results.glob("*.json")) if file.stem not in shown]
    if others:
        found = {file: json.loads(file.read_text()) for file in others}
        said = {file: one.get("what") if isinstance(one, dict) else None for file, one in found.items()}
        lines = [f"- [{file.name}](results/{file.name}): {what or 'not a record'}\n" for file, what in said.items()]
        parts += ["## Other files\n", "".join(lines)]
    if missing:
        parts += ["## Not measured yet\n", "".join(missing)]
    return "\n".join(parts), plots


def birth(record: Record) -> str:
    """What a result was made by, and when."""
    made_by, hardware = record["made_by"], record["made_by"]["hardware"]
    machine = hardware["accelerator"] or f"{hardware['processor']}, {hardware['torch_threads']} threads"
    changed = " with uncommitted changes" if made_by["uncommitted_changes"] else ""
    commit = f"commit {made_by['commit'][:10]}{changed}" if made_by["commit"] else "no commit"
    return f"Made by `{made_by['command']}`, {commit}, {made_by['date']}, {machine}.\n"


def draw(plot: Callable[[Axes, Record], None], record: Record) -> bytes:
    """A plot as PNG."""
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    plot(axes, record)
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    image = BytesIO()
    figure.savefig(image, format="png", dpi=110)
    plt.close(figure)
    return image.getvalue()


def page(text: str, plots: dict[str, bytes]) -> str:
    """The report as a page in HTML that holds its plots."""
    body = markdown.markdown(text, extensions=["tables", "md_in_html"])
    for name, image in plots.items():
        data = base64.b64encode(image).decode()
        body = body.replace(f'src="{name}"', f'src="data:image/png;base64,{data}"')
    return PAGE.replace("BODY", body)


if __name__ == "__main__":
    main()
