"""
`icae sweep FILE.yaml`: several short training runs that differ in one thing each, side by side.

The file names the runs, what they share and where the curves go; `evaluation/sweeps/` holds those of this project:

```yaml
title: Autoencoding at 4x
output: results/layouts.json       # the plot lies beside it
folder: runs/layouts               # one folder per run
loss: ae_loss                      # what is plotted
shared:
  pretrain: {config: trainers/presets/comparison.yaml, max_steps: 120}
runs:
  uniform: {stage: pretrain}
  sequential: {stage: pretrain, encoder_layout: sequential, decoder_layout: sequential}
```

Options behind the file (`--train_files`, `--eval_files`) go to every run that does not set them itself. Runs that have
finished are not repeated, and one that was interrupted goes on from its last checkpoint, if it has any, so the same
command can be given again. A later run may start from an earlier one: `init_from: runs/layouts/uniform`. If that one
is trained anew, a run that started from the old one is refused.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from icae.evaluation.answer_files import digest
from icae.evaluation.curves import LABELS
from icae.evaluation.curves import main as draw_curves
from icae.modeling_icae.pretrained_icae import SLOTS_FILE


COMMAND = "sweep.json"  # in the folder of a finished run
KEYS = {"title", "output", "folder", "loss", "shared", "runs"}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="icae sweep", description="Several short training runs, side by side.")
    parser.add_argument("file", type=Path, help="YAML file that names the runs")
    parser.add_argument("--only", nargs="+", metavar="RUN", help="train and draw only these")
    arguments, options = parser.parse_known_args(argv)
    sweep = read_sweep(arguments.file)
    chosen = arguments.only or list(sweep["runs"])
    if unknown := set(chosen) - set(sweep["runs"]):
        raise ValueError(f"Expected runs among {list(sweep['runs'])}, got {sorted(unknown)}.")
    drawn = []
    for name in chosen:
        run = dict(sweep["runs"][name])
        stage, folder = run.pop("stage"), Path(sweep["folder"], name)
        values = sweep["shared"].get(stage, {}) | run | {"output_dir": str(folder), "resume": "true"}
        command = [stage, *options, *(word for key, value in values.items() for word in as_words(key, value))]
        finished = folder / COMMAND
        made_by = {"command": command, "config": digest(values["config"]) if "config" in values else None}
        if "init_from" in values and (start := Path(values["init_from"], SLOTS_FILE)).is_file():
            made_by["start"] = digest(start)
        if finished.is_file() and (found := json.loads(finished.read_text())) != made_by:
            raise ValueError(
                f"Expected the run in {str(folder)!r} to be made by what the sweep says now ({made_by}), got one made "
                f"by {found}; remove the folder, or give another `folder`."
            )
        if not finished.is_file():
            print("icae", *command, flush=True)
            done = subprocess.run([sys.executable, "-P", "-m", "icae.cli", *command], check=False)
            if done.returncode:
                raise ValueError(
                    f"Expected the run {name!r} to end well, got exit status {done.returncode}; its own message "
                    "stands above. The same command goes on from here."
                )
            finished.write_text(json.dumps(made_by, indent=1) + "\n")
        if f'"eval_{sweep["loss"]}"' in (folder / "trainer_state.json").read_text():
            drawn.append(str(folder))
    if not drawn:
        raise ValueError(
            f"Expected evaluations with `eval_{sweep['loss']}` in the log of a run, got none in those of {chosen}; "
            "let them evaluate (`eval_files`, `eval_strategy: steps`) in a new `folder`."
        )
    shown = ["--loss", sweep["loss"], "--title", sweep["title"], "--output", sweep["output"]]
    draw_curves([*drawn, *shown])


def read_sweep(file: Path) -> dict[str, Any]:
    """The file's content; a `ValueError` says what is missing or unknown in it."""
    sweep = yaml.safe_load(file.read_text())
    if not isinstance(sweep, dict) or set(sweep) != KEYS:
        found = sorted(sweep) if isinstance(sweep, dict) else type(sweep).__name__
        raise ValueError(f"Expected a YAML file with the keys {sorted(KEYS)}, got {found}.")
    if sweep["loss"] not in LABELS:
        raise ValueError(f"Expected `loss` to be one of {sorted(LABELS)}, got {sweep['loss']!r}.")
    for key in ("shared", "runs"):
        for name, values in [(key, sweep[key]), *(sweep[key].items() if isinstance(sweep[key], dict) else ())]:
            if not isinstance(values, dict):
                raise ValueError(f"Expected `name: value` pairs under {name!r}, got {values!r}.")
    for name, run in sweep["runs"].items():
        if run.get("stage") not in ("pretrain", "sft"):
            raise ValueError(
                f"Expected `stage: pretrain` or `stage: sft` in the run {name!r}, got {run.get('stage')!r}."
            )
    return sweep


def as_words(key: str, value: Any) -> list[str]:
    """A field as words of a command line: `true` and `false`, JSON for a field of several values."""
    values = value if isinstance(value, list) else [value]
    return [f"--{key}", *(json.dumps(one) if isinstance(one, dict | bool) else str(one) for one in values)]


if __name__ == "__main__":
    main()
