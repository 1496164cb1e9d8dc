"""
What the commands of this folder share: common arguments, models by name, parts that survive an interruption, and the
record that a command ends with.
"""

import argparse
import hashlib
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from icae.cli import add_dtype_argument, load_model, whole_number
from icae.dtypes import resolve_dtype
from icae.evaluation.readers import Reader, SlotReader
from icae.evaluation.record import current_commit, without_folders, write_record
from icae.model_cards.facts import weights_digest
from icae.modeling_icae import ICAEForConditionalGeneration


LEFT_OUT = ("base", "output", "memory_of")  # of records: where files lie on this machine


def evaluation_parser(command: str, description: str, *, several_models: bool = False) -> argparse.ArgumentParser:
    """
    A parser for `icae COMMAND` with the arguments that all have; results go to `results/NAME.json` by default, NAME
    being the command's last word.
    """
    name = command.replace("evaluate ", "").replace(" ", "_").replace("-", "_")
    parser = argparse.ArgumentParser(prog=f"icae {command}", description=description)
    if several_models:
        parser.add_argument("--models", nargs="+", metavar="NAME=FOLDER", help="ICAEs (default: the embedded one)")
    else:
        parser.add_argument("--model", help="folder or Hub id of an ICAE (default: the embedded checkpoint)")
    parser.add_argument("--base", help="the base, if not where the ICAE says")
    add_dtype_argument(parser)
    parser.add_argument("--seed", type=whole_number(0), default=0)
    parser.add_argument("--output", type=Path, default=Path(f"results/{name}.json"), help="JSON file to write")
    parser.add_argument("--quick", action="store_true", help="a small subset, for a first look and for CI")
    return parser


def parse(parser: argparse.ArgumentParser, argv: list[str] | None, quick: dict[str, Any]) -> argparse.Namespace:
    """
    Parses; with `--quick`, the values of `quick` are the defaults, and results go to `runs/quick/`. The dtype is what
    is used, for records and for parts: results of one may not be joined with those of another.
    """
    arguments = parser.parse_args(argv)
    if arguments.quick:
        parser.set_defaults(output=Path("runs/quick", parser.get_default("output").name), **quick)
        arguments = parser.parse_args(argv)
    arguments.dtype = str(resolve_dtype(arguments.dtype)).removeprefix("torch.")
    return arguments


def named_models(arguments: argparse.Namespace) -> Iterator[tuple[str, ICAEForConditionalGeneration]]:
    """
    The models of `--models NAME=FOLDER …`, loaded one after the other. A folder without a name is its own.

    Raises:
        `ValueError`: if two have the same name.
    """
    parts = [model.rpartition("=") for model in arguments.models or ["embedded="]]
    named = {name or Path(folder).name: folder for name, _, folder in parts}
    if len(named) < len(parts):
        raise ValueError(f"Expected models of different names, got {arguments.models}; name them, `NAME=FOLDER`.")
    for name, folder in named.items():
        yield name, load_model(folder or None, arguments.base, arguments.dtype)


def recorded(arguments: argparse.Namespace) -> dict[str, Any]:
    """The arguments as a record holds them."""

    def shown(value: Any) -> Any:
        if isinstance(value, list):
            return [shown(item) for item in value]
        return without_folders(value) if isinstance(value, str) else value

    return {key: shown(value) for key, value in vars(arguments).items() if key not in LEFT_OUT}


def command_line(parser: argparse.ArgumentParser, argv: list[str] | None) -> str:
    """The command as it would be typed."""
    words = sys.argv[1:] if argv is None else argv
    return f"{parser.prog} {shlex.join(map(without_folders, words))}".rstrip()


class Parts:
    """
    The finished parts of a command, each in a file of a folder beside the output, so that the same command goes on
    where it was interrupted. When it ends, they are removed.

    A part is found again if the arguments are the same and what it `depends_on`: the weights, the data, its place.
    """

    def __init__(self, arguments: argparse.Namespace):
        self.folder: Path = arguments.output.with_suffix(".parts")
        which = ("quick", "model", "models")  # parts depend on weights, not on where they lie
        self.settings = {key: value for key, value in recorded(arguments).items() if key not in which}
        self.commits: set[str | None] = set()
        self.files: list[Path] = []

    def __call__(self, compute: Callable[[], Any], **depends_on: Any) -> Any:
        """What `compute` returns, now or in the run before."""
        key = json.dumps([self.settings, depends_on], sort_keys=True)
        file = self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"
        if not file.is_file():
            content = {"depends_on": depends_on, "commit": current_commit(), "result": compute()}
            self.folder.mkdir(parents=True, exist_ok=True)
            unfinished = file.with_suffix(f".{os.getpid()}")
            unfinished.write_text(json.dumps(content))
            unfinished.replace(file)
        self.files.append(file)
        content = json.loads(file.read_text())
        self.commits.add(content["commit"])
        return content["result"]

    def remove(self) -> None:
        """Removes what this run has used: the results are complete."""
        for file in self.files:
            file.unlink(missing_ok=True)
        if not any(self.folder.iterdir()):
            self.folder.rmdir()


def identity(model: ICAEForConditionalGeneration) -> str:
    """
    Digest of all that results of an ICAE depend on: its `fingerprint`, which says whose memories it reads, how many
    slots it makes of a text, and how it reads them.
    """
    names = ("span_length", "compression_ratio", "num_memory_slots", "decoder_layout")
    form = json.dumps([model.fingerprint, *(getattr(model.config, name) for name in names)], sort_keys=True)
    tasks = model.task_embeddings.detach().float().cpu().numpy().tobytes()
    return hashlib.sha256(form.encode() + tasks).hexdigest()[:16]


def saved_weights(model: ICAEForConditionalGeneration) -> str:
    """What the files are recognised by that a model was loaded from: `icae card` takes over only results of these."""
    return weights_digest(model.name_or_path, **model._hub_kwargs)


def weights_of(reader: Reader, model: ICAEForConditionalGeneration) -> str:
    """What a reader's results depend on of the models: the base alone is the same for several ICAEs."""
    base = model.config.base_model_fingerprint
    return identity(model) if isinstance(reader, SlotReader) or base is None else base


def finish(parser, argv: list[str] | None, arguments, parts: Parts, numbers: dict[str, Any]) -> None:
    """Writes the results with arguments and command, and with all commits, should parts be of an earlier one."""
    found = parts.commits | {current_commit()}
    commits = {"commits": sorted(map(str, found))} if len(found) > 1 else {}
    record = numbers | {"arguments": recorded(arguments)} | commits
    write_record(arguments.output, record, command=command_line(parser, argv))
    parts.remove()
    print(f"written to {arguments.output}")
