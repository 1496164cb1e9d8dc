"""Whether a folder gives a stranger the same model."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open

from icae.modeling_icae import ICAEForConditionalGeneration

from . import alone


# Relative distances. Equal on one machine and device; another device, or another attention, rounds differently.
TOLERANCE = 1e-3
TOLERANCE_IN_16_BITS = 5e-2
TIMEOUT = 1800  # seconds, for loading the base and a few forward passes


def verify(folder: str | Path, model: ICAEForConditionalGeneration, *, base: str | None = None) -> None:
    """
    Loads `folder` in a fresh process — isolated, offline, without this package, with the folder's own code — and
    compares what it says about a fixed input with the live model.

    Compared are the fingerprint of the weights, the slots, the losses of reading them back and of going on behind
    them, the scores of an answer's first token, and the tokenizer. A live base that is quantised is loaded plainly
    there, so that only fingerprint and tokenizer are compared.

    Args:
        folder (`str` or `Path`):
            The folder, as [`assemble`] made it.
        model ([`ICAEForConditionalGeneration`]):
            The model that it should be.
        base (`str`, *optional*):
            Folder of the base. By default, the folder that the model's base came from, or what the Hub's cache has of
            the base that the configuration names.

    Raises:
        `ValueError`: if the folder does not load there in half an hour, or is another model.
    """
    live = model.language_model
    if base is None and Path(live.name_or_path or " ").is_dir():
        base = live.name_or_path
    with _at_rest(model):
        expected = alone.outputs(model)
    prompt = expected.pop("prompt")
    options = {
        "base_model": base,
        "dtype": str(live.dtype).removeprefix("torch."),
        # Weights that are in training are compared in float32, as they are stored.
        "is_trainable": any(parameter.requires_grad for parameter in model.parameters()),
    }
    if (cache := model._hub_kwargs.get("cache_dir")) is not None:
        options["cache_dir"] = str(Path(cache).absolute())
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "outputs.safetensors"
        command = [sys.executable, "-I", alone.__file__, str(Path(folder).resolve()), json.dumps(options), str(output)]
        command += [os.path.abspath(path) for path in sys.path if path]
        surroundings = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(Path(scratch) / "modules")}
        try:
            done = subprocess.run(
                command, cwd=scratch, env=surroundings, capture_output=True, text=True, check=False, timeout=TIMEOUT
            )
        except subprocess.TimeoutExpired as error:
            raise ValueError(
                f"Expected the folder to load in a fresh process within {TIMEOUT} seconds, got no answer; see what "
                "else takes memory and processor of this machine, and push again."
            ) from error
        if done.returncode:
            reason = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
            raise ValueError(
                "Expected the folder to load in a fresh process that has neither this package nor a network, but: "
                f"{reason[0]} If it is the base that cannot be found, give its folder as `base`, or load it once so "
                "that it is in the Hub's cache."
            )
        with safe_open(output, framework="pt") as file:
            fingerprint = file.metadata()["fingerprint"]
            found = {name: file.get_tensor(name) for name in file.keys()}
    if fingerprint != model.fingerprint or not torch.equal(found["prompt"], prompt):
        what = "tokenizer" if fingerprint == model.fingerprint else "weights"
        raise ValueError(
            f"Expected the folder to be the live model (fingerprint {model.fingerprint}), got another one's {what} "
            f"(fingerprint {fingerprint}); assemble it again from the right checkpoint."
        )
    if getattr(live.config, "quantization_config", None) is not None:
        return
    limit = TOLERANCE_IN_16_BITS if live.dtype.itemsize == 2 else TOLERANCE
    for name in expected:
        distance = ((found[name] - expected[name]).float().norm() / expected[name].float().norm()).item()
        if not distance <= limit:
            raise ValueError(
                f"Expected the same {name} from the folder as from the live model, got others (relative distance "
                f"{distance:.1e}, at most {limit:.0e}); if the base was changed after loading, load "
                "it again."
            )


@contextmanager
def _at_rest(model: ICAEForConditionalGeneration) -> Iterator[None]:
    """The model as others run it, in eval mode and without the autocast that a trainer puts around `forward`."""
    was_training, patched = model.training, model.__dict__.pop("forward", None)
    try:
        with torch.autocast(model.device.type, enabled=False):
            yield model.eval()
    finally:
        model.train(was_training)
        if patched is not None:
            model.__dict__["forward"] = patched
