"""What must not leave this machine, and what a repository must have: checks that need no model."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from transformers.trainer_pt_utils import safe_globals

from icae.configuration_icae import ICAEConfig
from icae.model_cards.facts import is_hub_id
from icae.modeling_icae import ICAEForConditionalGeneration

from .layout import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CODE,
    OPTIMIZER,
    PICKLES,
    REQUIRED,
    TOKENIZER,
    TRAINER_STATE,
    WEIGHTS,
    files_of,
    matches,
)


# An absolute path, one below a home folder or one that climbs: as a word of a value in a JSON file (one from the
# current folder only as the whole value), and inside a text, where only the usual roots are told from other slashes.
WORD = r"(?<![^\s=\"'`])"
PATH_IN_VALUE = re.compile(
    rf"{WORD}(?:/|~(?=[A-Za-z])|[A-Za-z]:[\\/]|file:/*)[\w.~-]+[\\/][^\s\"'`]*|(?:{WORD}(?:~|\.\.)|^\.)/[\w.-][^\s\"'`]*"
)
PATH_IN_TEXT = re.compile(
    r"(?<![\w.:/])(?:/(?:home|root|tmp|mnt|data|work|workspace|scratch|content|kaggle|opt|srv|var|Users|Volumes|nfs|gpfs"
    r"|lustre|fsx|datasets|storage|shared)\d*/|~/|[A-Z]:\\|file://)[^\s\"'`)<>]+"
)
SECRETS = {
    "a Hugging Face token": re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]{30,}"),
    "a private key": re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
    "an AWS key": re.compile(r"\bAKIA[0-9A-Z]{16}\b"),
    "a GitHub token": re.compile(r"\b(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_\w{50,})"),
    "an OpenAI or Anthropic key": re.compile(r"\bsk-(?:proj-|ant-)?[A-Za-z0-9_-]{32,}"),
    "a Weights & Biases key": re.compile(r"(?i)\bwandb_api_key\W{1,4}[0-9a-f]{40}\b"),
}
HEADER_BYTES = 1_000_000  # names and shapes in a safetensors file; any text beside the tokenizer
TOKEN_BYTES = 1_000  # of a tokenizer's files per token of the vocabulary


def check(folder: str | Path) -> None:
    """
    Refuses a folder that should not become a Hub repository.

    Args:
        folder (`str` or `Path`):
            The folder, as [`assemble`] made it.

    Raises:
        `ValueError`: if a file is missing, undeclared, a pickle or larger than the configuration says; if the code is
            not this package's; if a path of this machine or a secret is in it; if the base is no Hub id.
    """
    files = files_of(folder)
    _check_names(set(files))
    for name, source in CODE.items():
        if files[name].read_bytes() != source.read_bytes():
            raise ValueError(
                f"Expected {name!r} to be this package's file byte for byte, got another one; assemble the folder "
                "again, and change the model's code in the package."
            )
    config = ICAEConfig.from_pretrained(folder)
    if config.text_config is None:
        raise ValueError("Expected a `config.json` that describes the base in `text_config`, got one without.")
    check_base_id(config)
    found = json.loads(files[ADAPTER_CONFIG].read_text(encoding="utf-8"))["base_model_name_or_path"]
    if found != config.base_model_name_or_path:
        raise ValueError(
            f"Expected one base in both configurations, got {config.base_model_name_or_path!r} in 'config.json' and "
            f"{found!r} in {ADAPTER_CONFIG!r}; assemble the folder again."
        )
    _check_sizes(files, config)
    for name, file in files.items():
        if name not in WEIGHTS:
            _check_text(name, file.read_text(encoding="utf-8", errors="replace"))  # a SentencePiece model is no text


def check_training_state(folder: str | Path) -> None:
    """
    Refuses a state to resume from that should not leave this machine.

    Args:
        folder (`str` or `Path`):
            The folder, as [`training_state`] made it. Its files of torch may hold what transformers reads of them when
            it resumes, with `weights_only=True`: tensors and random states, no code.

    Raises:
        `ValueError`: if a file of torch holds more or cannot be read, if a file is larger than the configuration says,
            or if a path of this machine or a secret is in a text.
    """
    files = files_of(folder)
    grows = files.pop(TRAINER_STATE)  # with the length of the run
    _check_sizes(files, ICAEConfig.from_pretrained(folder))
    for name, file in (files | {TRAINER_STATE: grows}).items():
        if matches(name, PICKLES):
            try:
                with safe_globals():
                    torch.load(file, map_location="meta", weights_only=True)
            except (UnpicklingError, RuntimeError, EOFError) as error:
                raise ValueError(
                    f"Expected only tensors and random states in {name!r}, got a damaged file or what may run code "
                    'when it is opened; push without the state to resume from, by `hub_strategy="every_save"`.'
                ) from error
        elif name not in WEIGHTS:
            _check_text(name, file.read_text(encoding="utf-8", errors="replace"))


def check_base_id(config: ICAEConfig) -> None:
    """
    Refuses a configuration whose base only this machine can find.

    Raises:
        `ValueError`: if `base_model_name_or_path` is no Hub id.
    """
    name = config.base_model_name_or_path
    if not is_hub_id(name):
        raise ValueError(
            f"Expected `base_model_name_or_path` to be the Hub id of the base, as in 'org/name', got {name!r}, which "
            "others cannot load. Set it in the checkpoint's config.json, or as `model.config.base_model_name_or_path` "
            'before saving, or from the start: `from_base(folder, ICAEConfig(base_model_name_or_path="org/name"))`.'
        )


def _check_names(names: set[str]) -> None:
    if pickles := sorted(name for name in names if matches(Path(name).name, PICKLES)):
        raise ValueError(
            f"Expected no pickles, which run code when they are opened, got {', '.join(pickles)}; remove them, "
            "weights are stored as safetensors."
        )
    if "adapter_config.json" in names:
        raise ValueError(
            "Expected no 'adapter_config.json' at the root, got one: transformers would take the repository for a "
            f"plain adapter and load the bare base instead of the ICAE; the adapter's place is {ADAPTER_CONFIG!r}."
        )
    if missing := sorted(REQUIRED - names):
        raise ValueError(f"Expected the whole layout, but {', '.join(missing)} is missing; assemble it again.")
    if others := sorted(name for name in names - REQUIRED if not matches(name, TOKENIZER)):
        raise ValueError(
            f"Expected only files of an ICAE and its tokenizer, got also {', '.join(others)}; remove them, and add "
            "files of your own to the repository by themselves."
        )


def _check_sizes(files: dict[str, Path], config: ICAEConfig) -> None:
    """
    Weights hold at most 4 bytes for each number that the configuration declares, or 8 beside a base in float64; an
    optimizer four times as much.
    """
    with torch.device("meta"):
        model = ICAEForConditionalGeneration(config)
    slots = ("memory_embeddings", "task_embeddings")
    limits = dict.fromkeys(WEIGHTS, HEADER_BYTES)
    for name, parameter in model.trainable_parameters().items():
        size = max(4, model.language_model.dtype.itemsize)
        limits[WEIGHTS[0] if name in slots else ADAPTER_WEIGHTS] += size * parameter.numel()
    limits |= dict.fromkeys(OPTIMIZER, 4 * sum(limits.values()))
    for name, file in files.items():
        if name in limits:
            limit = limits[name]
        elif matches(name, TOKENIZER):
            limit = TOKEN_BYTES * config.text_config.vocab_size + HEADER_BYTES
        else:
            limit = HEADER_BYTES
        if (size := file.stat().st_size) > limit:
            raise ValueError(
                f"Expected {name!r} to take at most {limit:,} bytes, as the configuration says, got {size:,}; it "
                "holds more than an ICAE, perhaps a base's weights: save the checkpoint again."
            )


def _check_text(name: str, text: str) -> None:
    for what, pattern in SECRETS.items():
        if match := pattern.search(text):
            raise ValueError(
                f"Expected no secrets, got what looks like {what} in {name!r} ({match[0][:8]}…); remove it there, and "
                "revoke it if others may have seen it."
            )
    paths: list[str] = []
    if name == "README.md":
        paths = PATH_IN_TEXT.findall(text)
    elif name.endswith(".json") and Path(name).name not in (
        "tokenizer.json",
        "vocab.json",
    ):  # words like "/usr/bin" are theirs
        paths = [match[0] for value in _strings(json.loads(text)) if (match := PATH_IN_VALUE.search(value))]
    if paths:
        raise ValueError(
            f"Expected no paths of this machine, got {paths[0]!r} in {name!r}; give a Hub id, or remove it from the "
            "checkpoint's file."
        )


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _strings(one)
