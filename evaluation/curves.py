"""
Learning curves of runs, side by side: `python -m icae.evaluation.curves RUN … --output results/NAME.json`.

Reads `trainer_state.json` and `config.json` of each run and writes a JSON file and, beside it, a plot of a held-out
loss over context tokens, with the control — the loss with another text's slots — dashed, and the accuracy beside it.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter, StrMethodFormatter

from icae.evaluation.record import write_record


FIELDS = ("memory_type", "encoder_layout", "decoder_layout", "span_length", "compression_ratio", "lora_r")
RUN = "run.json"  # how `icae pretrain` and `icae sft` say that they made it
COLUMNS = (
    *(
        "ae_loss",
        "ae_loss_other_text",
        "ae_accuracy",
        "lm_loss",
        "lm_loss_other_text",
        "lm_accuracy",
        "bleu",
        "exact_prefix",
    ),
    *("response_loss", "response_loss_other_text", "response_accuracy", "f1", "exact_match"),
)
LABELS = {"ae_loss": "autoencoding loss", "lm_loss": "continuation loss", "response_loss": "loss of the response"}


def read_run(folder: Path, loss: str) -> dict[str, Any]:
    """
    Settings and evaluations of one run.

    Raises:
        `ValueError`: if it was not evaluated, or without the control.
    """
    config = json.loads((folder / "config.json").read_text())
    state = json.loads((folder / "trainer_state.json").read_text())
    made = json.loads((folder / RUN).read_text()) if (folder / RUN).is_file() else {}
    evaluations = [entry for entry in state["log_history"] if f"eval_{loss}" in entry]
    if not evaluations:
        raise ValueError(
            f"Expected held-out evaluations with `eval_{loss}` in the log of {str(folder)!r}, got none; train with "
            "`--eval_files` and `--eval_strategy steps`."
        )
    control = f"eval_{loss}_other_text"
    if any(control not in entry for entry in evaluations):
        raise ValueError(
            f"Expected the control `{control}` in every evaluation of {str(folder)!r}, got some without; evaluate "
            "batches of different contexts (`--per_device_eval_batch_size` of 2 or more)."
        )
    return {
        "config": {name: config[name] for name in FIELDS},
        "trained": {name: made[name] for name in ("steps", "seed", "made_by") if name in made}
        | {"dtype": made["arguments"]["dtype"] if made else None},  # of the base
        "context_tokens": [entry["eval_num_tokens"] for entry in evaluations],
        **{
            column: [entry[f"eval_{column}"] for entry in evaluations]
            for column in COLUMNS
            if f"eval_{column}" in evaluations[0]
        },
    }


def plot(runs: dict[str, dict[str, Any]], loss: str, title: str, file: Path) -> None:
    """
    Held-out loss over context tokens, the control dashed in the same colour, and teacher-forced accuracy beside it.
    """
    figure, (axes, right) = plt.subplots(1, 2, figsize=(12, 4.5), width_ratios=(3, 2), layout="constrained")
    accuracy = loss.replace("loss", "accuracy")
    for name, run in runs.items():
        (line,) = axes.plot(run["context_tokens"], run[loss], marker="o", markersize=3, label=name)
        axes.plot(run["context_tokens"], run[f"{loss}_other_text"], linestyle="--", color=line.get_color(), alpha=0.6)
        right.plot(run["context_tokens"], run[accuracy], marker="o", markersize=3, color=line.get_color())
    axes.plot([], [], linestyle="--", color="gray", label="the same with another text's slots")
    figure.suptitle(title)
    axes.set(ylabel=f"{LABELS[loss]}, nats per token")
    right.set(ylabel="teacher-forced accuracy")
    if loss == "ae_loss":
        axes.set_yscale("log")  # the control is a hundred times the loss
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 4, 5, 6, 8)))  # labels also within one power of ten
        axes.yaxis.set_minor_formatter(NullFormatter())
    for panel in (axes, right):
        panel.set_xlabel("context tokens trained on")
        panel.xaxis.set_major_formatter(EngFormatter(sep=""))  # 200k
        panel.grid(alpha=0.3, which="both")
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    figure.legend(loc="outside right upper", fontsize="small")
    figure.savefig(file, dpi=130)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Learning curves of runs, side by side.")
    parser.add_argument("runs", nargs="+", type=Path, help="output folders of training; their names are shown")
    parser.add_argument("--loss", choices=LABELS, default="ae_loss", help="what is plotted")
    parser.add_argument("--title", default="Autoencoding loss on held-out text")
    parser.add_argument("--output", type=Path, required=True, help="JSON file; the plot lies beside it")
    arguments = parser.parse_args(argv)
    runs = {folder.name: read_run(folder, arguments.loss) for folder in arguments.runs}
    if len(runs) < len(arguments.runs):
        raise ValueError(f"Expected folders with names of their own, which are shown, got only {list(runs)}; rename.")
    record = {"what": arguments.title, "unit": "nats per target token", "runs": runs}
    write_record(arguments.output, record)
    plot(runs, arguments.loss, arguments.title, arguments.output.with_suffix(".png"))
    for name, run in runs.items():
        print(f"{run[arguments.loss][-1]:6.3f} (other text {run[f'{arguments.loss}_other_text'][-1]:6.2f})  {name}")


if __name__ == "__main__":
    main()
