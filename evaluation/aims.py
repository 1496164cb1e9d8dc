"""
Where the embedded checkpoint stands against its aims: `icae evaluate aims`, from other files in `results/`.

What it measured, now and after the first of its two pretraining runs (`pretrained.json`), and what the slope of its
pretraining says about the tokens still needed: a power law through the second half of each run, drawn on to the aim.
The learning rate falls towards the end of a run, which makes the loss fall faster than it would go on, so this is
optimistic.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from icae.evaluation.arguments import command_line
from icae.evaluation.record import write_record


Record = dict[str, Any]
Measured = tuple[float, list[float] | None]
NOT_MEASURED = (None, None)
AIMS = {  # by measure: the least or the most it should be
    "autoencoding loss, nats": ("at most", 0.10),
    "BLEU": ("at least", 0.95),
    "exact prefix": ("at least", 0.60),
    "perplexity of what follows, above the full context's": ("at most", 0.10),
    "token F1 of answers, of the full context's": ("at least", 0.90),
}
LEAST = 3  # evaluations of a run that a slope is drawn through
RUNS = ("embedded", "embedded-2", "embedded-3")  # learning curves of the pretraining runs, one after the other


def measures(
    length: int, reconstruction: Record, continuation: Record | None, answers: Record | None
) -> dict[str, Measured]:
    """
    What the files say of one checkpoint, under the names of the aims, as far as they are there: of contexts of that
    length, but of answers to all prompts. Each value comes with its interval of 95%, where there is one.
    """
    loss, bleu, prefix, perplexity, f1 = AIMS
    found = _only_model(reconstruction)["by_length"][str(length)]
    values: dict[str, Measured] = {
        loss: (found["ae_loss"], found.get("ae_loss_interval")),
        bleu: (found["bleu"], None),
        prefix: (found["exact_prefix"], None),
    }
    if continuation is not None:
        found = _only_model(continuation)[str(length)]["icae"]
        percent, bounds = found["perplexity_increase_percent"], found.get("perplexity_increase_percent_interval")
        values[perplexity] = percent / 100, bounds and [bound / 100 for bound in bounds]
    if answers is not None and "f1_share_of_full_context" in (row := answers["summary"]["icae"]):
        values[f1] = row["f1_share_of_full_context"], row.get("f1_share_interval")
    return values


def reached(name: str, value: float) -> bool:
    """Whether a value reaches the aim of that name."""
    side, aim = AIMS[name]
    return value <= aim if side == "at most" else value >= aim


def slope(tokens: list[float], losses: list[float], aim: float) -> Record:
    """
    The power law `loss ~ tokens ** -exponent` through the second half of a curve, and the tokens at which it meets
    `aim`; none where it does not fall. It takes two points or more, so a curve of three.
    """
    half = len(tokens) // 2
    gradient, offset = np.polyfit(np.log(tokens[half:]), np.log(losses[half:]), 1)
    needed = float(np.exp((np.log(aim) - offset) / gradient)) if gradient < 0 else None
    return {"loss": losses[-1], "tokens": tokens[-1], "exponent": float(-gradient), "tokens_for_aim": needed}


def _only_model(record: Record) -> Record:
    if len(record["models"]) != 1:
        raise ValueError(f"Expected results of one model, got those of {list(record['models'])}; measure one.")
    return next(iter(record["models"].values()))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="icae evaluate aims", description="The embedded checkpoint against its aims, from other results."
    )
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder with the results")
    parser.add_argument("--length", type=int, default=128, help="context tokens (default: 128, one span)")
    arguments = parser.parse_args(argv)
    results, length = arguments.results, arguments.length

    def read(name: str) -> Record | None:
        file = results / f"{name}.json"
        return json.loads(file.read_text()) if file.is_file() else None

    reconstruction = read("reconstruction")
    if reconstruction is None:
        raise ValueError(f"Expected reconstruction.json in {str(results)!r}, got none: `make evaluate` writes it.")
    now = measures(length, reconstruction, read("continuation"), read("answers"))
    pretrained = read("pretrained")
    before = measures(length, pretrained, None, None) if pretrained else {}
    rows = []
    for name, (side, aim) in AIMS.items():
        value, interval = now.get(name, NOT_MEASURED)
        row = {"measure": name, "aim": f"{side} {aim}", "value": value, "interval": interval}
        if value is not None:
            row |= {"reached": reached(name, value)}
            row |= {"surely_reached": all(reached(name, bound) for bound in interval or [value])}
        rows.append(row | {"after_first_run": before.get(name, NOT_MEASURED)[0]})
    loss, (_, aim) = next(iter(AIMS.items()))
    slopes, seen = {}, 0.0
    for name in RUNS:
        if (curves := read(name)) and len(next(iter(curves["runs"].values()))["ae_loss"]) >= LEAST:
            (run,) = curves["runs"].values()
            slopes[name] = slope([seen + tokens for tokens in run["context_tokens"]], run["ae_loss"], aim)
            seen = slopes[name]["tokens"]
    record = {"what": "the embedded checkpoint against its aims", "length": length, "aims": rows}
    record |= {"slope_of": loss, "slopes": slopes}
    write_record(results / "aims.json", record, command=command_line(parser, argv))
    for row in rows:
        print(f"{row['measure']:55s} {row['aim']:14s} {row['value']}  after the first run {row['after_first_run']}")


if __name__ == "__main__":
    main()
