"""Writes the README's results from the files in `results/`: `python -m icae.evaluation.readme`."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

from icae.evaluation import tables


BEGIN, END = "<!-- results:begin -->\n", "<!-- results:end -->"
SECTIONS: dict[str, Callable[[tables.Record], str]] = {
    "reconstruction": lambda record: tables.embedded(record) + "\n" + tables.lengths(record),
    "aims": tables.aims,
    "answers": tables.answers,
    "answers_by_source": tables.better_and_worse,
    "answers_by_source_penalty": partial(tables.better_and_worse, name="answers_by_source_penalty"),
    "continuation": tables.continuation,
    "probes": tables.probes,
    "layouts": tables.layouts,
    "families": tables.families,
    "ablations": tables.ablations,
    "bench_generate": tables.answering,
    "bench_train": tables.costs,
}


def render(results: Path) -> str:
    """The results section, in Markdown. Parts whose file is missing are left out."""
    parts = []
    for name, section in SECTIONS.items():
        file = results / f"{name}.json"
        if file.is_file():
            parts.append(section(json.loads(file.read_text())))
    return "\n".join(parts)


def main() -> None:
    root = Path(__file__).resolve().parents[1]
    readme = root / "README.md"
    before, _, rest = readme.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    readme.write_text(before + BEGIN + render(root / "results") + END + after)


if __name__ == "__main__":
    main()
