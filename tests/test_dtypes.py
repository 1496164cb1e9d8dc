import pytest
import torch

from icae import dtypes
from icae.dtypes import fast_dtype, resolve_dtype
from icae.evaluation.arguments import evaluation_parser, parse


@pytest.fixture
def takes(monkeypatch):
    """Sets how long a product takes in each dtype, on a machine without accelerator."""

    def set_seconds(bfloat16: float, float32: float) -> None:
        seconds = {torch.bfloat16: bfloat16, torch.float32: float32}
        monkeypatch.setattr(dtypes, "_seconds_per_product", seconds.__getitem__)
        fast_dtype.cache_clear()

    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    yield set_seconds
    fast_dtype.cache_clear()


def test_a_processor_that_imitates_bfloat16_computes_in_float32(takes):
    takes(bfloat16=8.0, float32=1.0)
    assert resolve_dtype("auto") == torch.float32


@pytest.mark.parametrize("bfloat16", [0.5, 1.0, 1.4])
def test_one_that_is_about_as_fast_in_bfloat16_takes_the_smaller(takes, bfloat16):
    takes(bfloat16=bfloat16, float32=1.0)
    assert resolve_dtype("auto") == torch.bfloat16


def test_a_machine_with_an_accelerator_computes_in_bfloat16(takes, monkeypatch):
    takes(bfloat16=8.0, float32=1.0)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert resolve_dtype("auto") == torch.bfloat16
    assert resolve_dtype("auto", cpu=True) == torch.float32  # `use_cpu` of a trainer


def test_a_dtype_by_name_is_that_dtype(takes):
    takes(bfloat16=8.0, float32=1.0)
    assert resolve_dtype("bfloat16") == torch.bfloat16 and resolve_dtype("float32") == torch.float32


def test_another_name_is_refused():
    with pytest.raises(ValueError, match="to be one of auto, bfloat16, float32, got 'float16'"):
        resolve_dtype("float16")


def test_this_machine_is_timed_once(monkeypatch):
    timed = []
    time_one = dtypes._seconds_per_product
    monkeypatch.setattr(dtypes, "_seconds_per_product", lambda dtype: timed.append(dtype) or time_one(dtype))
    fast_dtype.cache_clear()
    first = fast_dtype(cpu=True)
    assert first in (torch.bfloat16, torch.float32) and fast_dtype(cpu=True) == first
    assert timed == [torch.bfloat16, torch.float32]


@pytest.mark.parametrize("words", [[], ["--quick"]])
def test_records_of_evaluations_name_the_dtype_that_was_used(takes, words):
    takes(bfloat16=8.0, float32=1.0)
    arguments = parse(evaluation_parser("evaluate probes", "…"), words, {})
    assert arguments.dtype == "float32"
    assert parse(evaluation_parser("evaluate probes", "…"), [*words, "--dtype", "bfloat16"], {}).dtype == "bfloat16"
