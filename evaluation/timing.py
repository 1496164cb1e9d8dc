"""Seconds and bytes, measured so that they can be compared: variants take turns, medians, peaks of one step."""

import ctypes
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch


def timed(step: Callable[[], object]) -> Callable[[], dict[str, float]]:
    """A step that is run twice and returns the seconds of its second run, when its weights are in the caches."""

    def run() -> dict[str, float]:
        step()
        start = time.perf_counter()
        step()
        return {"seconds": time.perf_counter() - start}

    return run


def medians_in_turn(steps: dict[str, Callable[[], dict[str, float]]], repeats: int) -> dict[str, dict[str, float]]:
    """
    Medians of what each step measures of itself. The steps take turns, so that a busy machine slows all of them alike.
    """
    found: dict[str, list[dict[str, float]]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            found[name].append(step())
    return {
        name: {key: statistics.median(values[key] for values in measured) for key in measured[0]}
        for name, measured in found.items()
    }


def in_own_process(module: str, words: list[str], what: str, way_out: str) -> dict[str, int]:
    """
    The JSON that a module's command prints in the end, run in a process of its own.

    Raises:
        `ValueError`: if that process does not end well; its own message comes before.
    """
    command = [sys.executable, "-P", "-m", module, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        raise ValueError(
            f"Expected {what} from a process of its own, which ended with status {done.returncode} (-9: out of "
            f"memory); {way_out}."
        )
    return json.loads(done.stdout.splitlines()[-1])


def peak_bytes() -> int:
    """Peak resident memory of this process. (Not from getrusage, which in a child starts at its parent's peak.)"""
    return _status("VmHWM")


def peak_bytes_of(step: Callable[[], object]) -> int:
    """
    Bytes that a step takes at its peak above what was taken before: on the accelerator if there is one, else of this
    process (Linux with glibc).
    """
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - before
    # What was freed before, as after loading a model, is still resident, and a step would use it uncounted.
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = _status("VmRSS")
    forget_peak()
    step()
    return peak_bytes() - before


def forget_peak() -> None:
    """Starts [`peak_bytes`] again from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def _status(field: str) -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024
