"""Everything the tests need is made here, in process and seeded: no test uses the network."""

import os


os.environ["HF_HUB_OFFLINE"] = "1"

import logging

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers import logging as transformers_logging

from icae import ICAEConfig, ICAEForConditionalGeneration
from tiny import VOCABULARY, make_base, make_tokenizer


RECENT = hasattr(PreTrainedModel, "activation_checkpointing_enable")  # transformers 5.23
if not RECENT:
    PreTrainedModel.activation_checkpointing_enable = PreTrainedModel.gradient_checkpointing_enable
    PreTrainedModel.activation_checkpointing_disable = PreTrainedModel.gradient_checkpointing_disable


class _Deprecations(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        if "deprecated" in record.getMessage():
            raise AssertionError(f"deprecated: {record.getMessage()}")


@pytest.fixture(autouse=True, scope="session")
def _strict():
    """One thread, and transformers' deprecation warnings are failures (old versions cause some themselves)."""
    torch.set_num_threads(1)
    if RECENT:
        transformers_logging.get_logger("transformers").addHandler(_Deprecations())


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """Each test has its own, which it may change."""
    return make_tokenizer()


@pytest.fixture
def make_icae(tokenizer):
    """Makes a tiny ICAE whose adapter already does something."""

    def make(family: str = "llama", base=None, **config) -> ICAEForConditionalGeneration:
        config = {"span_length": 16, "lora_r": 4, "lora_alpha": 8} | config
        base = make_base(family) if base is None else base
        torch.manual_seed(1)
        model = ICAEForConditionalGeneration.from_base(base, ICAEConfig(**config), tokenizer=tokenizer)
        with torch.no_grad():
            for name, parameter in model.trainable_parameters().items():
                if "lora_B" in name:
                    parameter.normal_(std=0.1)
        return model

    return make


@pytest.fixture
def ragged():
    """Ids and mask of four rows: two full spans and a half, half a span, one token more than a span, left-padded."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(5, len(VOCABULARY), (4, 40), generator=generator)
    mask = torch.zeros(4, 40, dtype=torch.long)
    mask[0, :], mask[1, :8], mask[2, :17], mask[3, 10:] = 1, 1, 1, 1
    return ids, mask
