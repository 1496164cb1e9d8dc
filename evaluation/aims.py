"""
Where the embedded checkpoint stands against its aims: `icae evaluate aims`, from other files in `results/`.

What it measured, now and after the first of its pretraining runs (`pretrained.json`), and what the slope of its
pretraining says about the tokens still needed: a power law through the second half of each run, drawn on to the aim.
The learning rate falls towards the end of a run, which makes the loss fall faster than it would go on, so this is
optimistic. Which commit, date and dtype the measured files are of stands beside them.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from icae.evaluation.arguments import command_line
from icae.evaluation.record import write_record


Record = dict[str, Any]
Measured = tuple[float | None, list[float] | None]
NOT_MEASURED = (None, None)
SOURCES = "share of sources with better answers than"
PENALTY = ", all with a repetition penalty"
AIMS = {  # by measure: the least or the most it should be
    "autoencoding loss, nats": ("at most", 0.10),
    "BLEU": ("at least", 0.95),
    "exact prefix": ("at least", 0.60),
    "perplexity of what follows, above the full context's": ("at most", 0.10),
    "token F1 of answers, of the full context's": ("at least", 0.90),
    f"{SOURCES} the truncated context's": ("at least", 1.0),
    f"{SOURCES} without a context": ("at least", 1.0),
    f"{SOURCES} the truncated context's{PENALTY}": ("at least", 1.0),
    f"{SOURCES} without a context{PENALTY}": ("at least", 1.0),
}
LEAST = 3  # evaluations of a run that a slope is drawn through
# Learning curves of the runs of both stages, each from the end of the one before it.
RUNS = "embedded embedded-2 sft sft-2 embedded-3 sft-3 embedded-4 sft-4 sft-5 sft-6 sft-7".split()


def measures(
    length: int,
    reconstruction: Record,
    continuation: Record | None = None,
    answers: Record | None = None,
    by_source: Record | None = None,
    penalised: Record | None = None,
    name: str = "reconstruction",
) -> dict[str, Measured]:
    """
    What the files say of one checkpoint, under the names of the aims, as far as they are there: of contexts of that
    length, but of answers to all prompts, greedy ones and (`penalised`) those with a repetition penalty. Each value
    comes with its interval of 95%, where there is one. `name` is that of the file of reconstructions.
    """
    loss, bleu, prefix, perplexity, f1, *shares = AIMS
    found = _of_length(_only_model(reconstruction)["by_length"], length, name)
    values: dict[str, Measured] = {
        loss: (found["ae_loss"], found.get("ae_loss_interval")),
        bleu: (found.get("bleu"), found.get("bleu_interval")),
        prefix: (found.get("exact_prefix"), found.get("exact_prefix_interval")),
    }
    if continuation is not None:
        found = _of_length(_only_model(continuation), length, "continuation")["icae"]
        percent, bounds = found["perplexity_increase_percent"], found.get("perplexity_increase_percent_interval")
        values[perplexity] = percent / 100, bounds and [bound / 100 for bound in bounds]
    if answers is not None and "f1_share_of_full_context" in (row := answers["summary"]["icae"]):
        values[f1] = row["f1_share_of_full_context"], row.get("f1_share_interval")
    others = [(record, other) for record in (by_source, penalised) for other in ("truncated context", "no context")]
    for aim, (record, other) in zip(shares, others, strict=True):
        if record is not None and other in record["icae_minus"]:  # not where only some readers were compared
            values[aim] = _share_above(record["icae_minus"][other])
    return values


def _share_above(sources: Record) -> Measured:
    """
    The share of sources with better answers: by ROUGE-L where references are long, by token F1 elsewhere. The bounds
    are the shares of those whose whole interval says so, and of those whose interval does not speak against it.
    """
    measure = {name: "rougeL" if "rougeL" in found else "f1" for name, found in sources.items()}
    values = [found[measure[name]] for name, found in sources.items()]
    unknown = [-math.inf, math.inf]  # of one row
    intervals = [found.get(f"{measure[name]}_interval") or unknown for name, found in sources.items()]
    lowest, highest = zip(*intervals, strict=True)
    share, low, high = (sum(bound > 0 for bound in bounds) / len(sources) for bounds in (values, lowest, highest))
    return share, [low, high]


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


def slopes(curves: dict[str, Record], aim: float) -> Record:
    """
    The [`slope`] of each pretraining run that was evaluated often enough, over the context tokens of all runs so far,
    also of those of the instruction stage between them.

    Raises:
        `ValueError`: if a file holds curves of several runs.
    """
    found, seen = {}, 0.0
    for name, record in curves.items():
        if len(record["runs"]) != 1:
            raise ValueError(f"Expected the curve of one run in {name}.json, got those of {list(record['runs'])}.")
        (run,) = record["runs"].values()
        if "response_loss" not in run and len(run["ae_loss"]) >= LEAST:
            found[name] = slope([seen + tokens for tokens in run["context_tokens"]], run["ae_loss"], aim)
        seen += run["context_tokens"][-1]
    return found


def _of_length(by_length: Record, length: int, name: str) -> Record:
    if str(length) not in by_length:
        raise ValueError(
            f"Expected results of {length} tokens in {name}.json, got those of {', '.join(by_length)}; "
            f"measure them, or give another `--length`."
        )
    return by_length[str(length)]


def _source(record: Record) -> Record:
    made_by = record.get("made_by", {})
    return {name: made_by.get(name) for name in ("commit", "date")} | {
        "dtype": record.get("arguments", {}).get("dtype")
    }


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
    continuation, pretrained = read("continuation"), read("pretrained")
    answers, by_source, penalised = map(read, ("answers", "answers_by_source", "answers_by_source_penalty"))
    now = measures(length, reconstruction, continuation, answers, by_source, penalised)
    before = measures(length, pretrained, name="pretrained") if pretrained else {}
    rows = []
    for name, (side, aim) in AIMS.items():
        value, interval = now.get(name, NOT_MEASURED)
        row = {"measure": name, "aim": f"{side} {aim}", "value": value, "interval": interval}
        if value is not None:
            row |= {"reached": reached(name, value)}
            row |= {"surely_reached": interval and all(reached(name, bound) for bound in interval)}
        rows.append(row | {"after_first_run": before.get(name, NOT_MEASURED)[0]})
    loss, (_, aim) = next(iter(AIMS.items()))
    curves = {name: curve for name in RUNS if (curve := read(name)) is not None}
    files = {"reconstruction": reconstruction, "continuation": continuation, "answers": answers}
    files |= {"answers_by_source": by_source, "answers_by_source_penalty": penalised, "pretrained": pretrained}
    record = {"what": "the embedded checkpoint against its aims", "length": length, "aims": rows}
    record |= {"slope_of": loss, "slopes": slopes(curves, aim)}
    record |= {"measured_by": {name: _source(file) for name, file in files.items() if file is not None}}
    write_record(results / "aims.json", record, command=command_line(parser, argv))
    for row in rows:
        print(f"{row['measure']:55s} {row['aim']:14s} {row['value']}  after the first run {row['after_first_run']}")


if __name__ == "__main__":
    main()
