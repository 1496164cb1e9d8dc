"""Results with their birth certificate: every number in `results/` says how it was made."""

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


PACKAGES = ("icae", "torch", "transformers", "tokenizers", "peft", "trl", "accelerate", "datasets", "numpy")
CODE = (":/", ":(top,exclude)results")
MEASURES = ("sacrebleu", "rouge_score", "rank_bm25")  # of the extra `eval`


def write_record(path: str | Path, numbers: dict[str, Any], *, command: str | None = None) -> None:
    """Writes `numbers` and how they came to be — commit, command, versions, hardware, date — to a JSON file."""
    record = numbers | {
        "made_by": {
            "commit": current_commit(),
            # Of the code: what commands before this one wrote is no change of it.
            "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no", "--", *CODE)),
            "command": command or shlex.join(_command()),
            "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            "versions": versions(),
            "hardware": hardware(),
        }
    }
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(record, indent=1) + "\n")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that numbers depend on, as far as they are installed."""
    found = {"python": platform.python_version()}
    for name in (*PACKAGES, *MEASURES):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def without_folders(word: str) -> str:
    """A word of a command line as a record holds it: of paths out of the working folder only the last name."""
    name, equals, path = word.rpartition("=")
    return name + equals + (Path(path).name if path.startswith(("/", "~", "..")) else path)


def current_commit() -> str | None:
    """The commit that this package is at; `None` where it is installed, be it within another project's checkout."""
    return _git("rev-parse", "HEAD")


def hardware() -> dict[str, Any]:
    """Processor, cores this process may use, threads that torch uses, accelerator."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": models[0] if models else platform.processor(),
        "cores_used": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _command() -> list[str]:
    """What was typed: a module, a script's file, or a program, as `icae` is one."""
    name, spec = Path(sys.argv[0]).name, sys.modules["__main__"].__spec__
    if spec is not None:
        program = ["python", "-m", spec.name.removesuffix(".__main__")]
    else:
        program = ["python", name] if name.endswith(".py") or name == "-c" else [name]
    return [*program, *map(without_folders, sys.argv[1:])]


def _git(*arguments: str) -> str | None:
    """What git says of the checkout that this very file is of; `None` if it is of none."""
    file = Path(__file__).resolve()
    if not shutil.which("git"):
        return None
    for command in (["ls-files", "--error-unmatch", "--", file.name], [*arguments]):
        done = subprocess.run(["git", *command], cwd=file.parent, capture_output=True, text=True, check=False)
        if done.returncode:
            return None
    return done.stdout.strip()
