"""Which number format a machine is fast in."""

from functools import cache

import torch
import torch.nn.functional as F
from torch.utils.benchmark import Timer


DTYPES = ("auto", "bfloat16", "float32")
IMITATED = 1.5  # bfloat16 halves the memory, so it may cost a little time


def resolve_dtype(name: str, cpu: bool = False) -> torch.dtype:
    """
    The dtype of that name; `"auto"` is [`fast_dtype`], not what a checkpoint is stored in. `cpu`: an accelerator that
    is there will not be used.

    Raises:
        `ValueError`: if it is not one of `DTYPES`.
    """
    if name not in DTYPES:
        raise ValueError(f"Expected `dtype` to be one of {', '.join(DTYPES)}, got {name!r}.")
    return fast_dtype(cpu) if name == "auto" else getattr(torch, name)


@cache
def fast_dtype(cpu: bool = False) -> torch.dtype:
    """
    bfloat16, but float32 on processors that only imitate bfloat16, several times slower than they compute in float32.

    Timed on one matrix product, about a tenth of a second once per process: a processor's flags have other names on
    each architecture, and not every build of torch uses them.
    """
    if not cpu and torch.accelerator.is_available():
        return torch.bfloat16
    seconds = {dtype: _seconds_per_product(dtype) for dtype in (torch.bfloat16, torch.float32)}
    imitated = seconds[torch.bfloat16] > IMITATED * seconds[torch.float32]
    return torch.float32 if imitated else torch.bfloat16


def _seconds_per_product(dtype: torch.dtype) -> float:
    operands = {"x": torch.ones(256, 512, dtype=dtype), "w": torch.ones(512, 512, dtype=dtype)}
    timer = Timer("linear(x, w)", globals=operands | {"linear": F.linear})
    return timer.blocked_autorange(min_run_time=0.02).median
