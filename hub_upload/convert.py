"""
`icae convert FILE --base BASE -o FOLDER`: a release of the official code (getao/icae) in this package's layout.

    official, k slots                                     here
    memory_token_embed.weight   rows 0 … k-1              memory_embeddings
                                row k [AE], k+1 [LM]      task_embeddings
                                row k+2 [FT]              no place, left out
    icae.base_model.model.NAME.lora_A.default.weight      adapter/, NAME.lora_A.weight (and lora_B)
    icae.base_model.model.NAME, decoder.NAME              the frozen base, left out

Version 1 is a `.pt` of Llama 2 (numbers stand where the base's weights were), version 2 are safetensors of Mistral;
what training with the official code saves has the same names. What the file does not tell, and what official inference
does otherwise, is printed and goes into the model card.
"""

import argparse
import pickle
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedModel

from icae.configuration_icae import ICAEConfig
from icae.model_cards import CardFacts, write_card
from icae.modeling_icae import ICAEForConditionalGeneration
from icae.modeling_icae.pretrained_icae import ADAPTER


EMBEDDINGS = "memory_token_embed.weight"
INNER = "icae.base_model.model."  # PEFT's name for the language model inside
SPECIAL = 3  # [AE], [LM] and [FT], behind the memory tokens
TOKENS_PER_SLOT = 4  # `mean_compression_rate`; `model_max_length` 512 over `mem_size` 128 in version 1
RELEASES = ("v1", "v2")


def convert(
    file: str | Path, base: str | PreTrainedModel, folder: str | Path, *, release: str | None = None
) -> list[str]:
    """
    Writes an official release in this package's layout, with a card that states where it comes from.

    Args:
        file (`str` or `Path`):
            The release, or a checkpoint that the official code trained. Anything but `.safetensors` is read as a file
            of `torch.save`, with `weights_only=True`.
        base (`str` or `PreTrainedModel`):
            Hub id or folder of its base, or the loaded base, which then belongs to the ICAE.
        folder (`str` or `Path`):
            Where to write.
        release (`str`, *optional*):
            `"v1"` or `"v2"`; by default `"v2"` for safetensors. Version 1 ends its texts with the start token.

    Returns:
        `list[str]`: what was left out, what differs from official inference, what could not be verified.

    Raises:
        `ValueError`: if `folder` holds something, if the file cannot be read as tensors, or if a tensor is unknown,
            missing or of a shape that does not fit the base.
    """
    file = Path(file)
    if Path(folder).is_dir() and any(Path(folder).iterdir()):
        raise ValueError(f"Expected a new or empty folder to write to, got {str(folder)!r}; name another one.")
    release = release or ("v2" if file.suffix == ".safetensors" else "v1")
    embeddings, adapter, of_base = _parts(_read(file), file)
    slots = len(embeddings) - SPECIAL
    config = ICAEConfig.paper(
        span_length=TOKENS_PER_SLOT * slots,
        num_memory_slots=slots,
        lora_r=min(len(matrix) for name, matrix in adapter.items() if ".lora_A." in name),
        lora_target_modules=list({name.split(".")[-3] for name in adapter}),
    )
    options = {"dtype": torch.bfloat16} if isinstance(base, str) else {}  # not float16, as Llama 2 is stored
    model = ICAEForConditionalGeneration.from_base(base, config, **options)
    _fill(model, embeddings, adapter, file)
    if release == "v1":
        model.generation_config.eos_token_id = [model.config.start_token_id, *model.end_token_ids]
    model.save_pretrained(folder)

    notes = _notes(release, model.config, of_base)
    CardFacts(
        origin=f"Converted from `{file.name}`, a checkpoint of the official code "
        f"([getao/icae](https://github.com/getao/icae), {release}), with `icae convert`.",
        limits=[f"{note[0].upper()}{note[1:]}." for note in notes],
    ).save(folder)
    write_card(folder)
    return notes


def _read(file: Path) -> dict[str, Any]:
    try:
        tensors = load_file(file) if file.suffix == ".safetensors" else torch.load(file, "cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"Expected tensors in {str(file)!r}, and nothing that would have to run as code, got a file that cannot "
            f"be read so ({str(error).splitlines()[0]}); download it again, and name safetensors `.safetensors`."
        ) from error
    if not isinstance(tensors, dict):
        raise ValueError(f"Expected a state dict in {str(file)!r}, got a {type(tensors).__name__}.")
    return tensors


def _parts(tensors: dict[str, Any], file: Path) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
    """The embeddings of shape `(k + 3, H)`, the adapter by PEFT's names, and the number of weights of the base."""
    embeddings = tensors.pop(EMBEDDINGS, None)
    if not isinstance(embeddings, torch.Tensor) or embeddings.dim() != 2 or len(embeddings) <= SPECIAL:
        found = tuple(embeddings.shape) if isinstance(embeddings, torch.Tensor) else type(embeddings).__name__
        raise ValueError(
            f"Expected {EMBEDDINGS!r} of shape (slots + {SPECIAL}, hidden size) in {str(file)!r}, got {found}; give a "
            "checkpoint of the official code, as `mistral_7b_ft_icae.safetensors`."
        )
    adapter, of_base = {}, 0
    for name, tensor in tensors.items():
        if name.startswith(INNER) and name.endswith((".lora_A.default.weight", ".lora_B.default.weight")):
            adapter[name.removeprefix(INNER).replace(".default.", ".")] = tensor
        elif name.startswith((INNER, "decoder.")) and ".lora_" not in name:
            of_base += 1
        else:
            raise ValueError(
                f"Expected only {EMBEDDINGS!r}, '{INNER}…' and 'decoder.…' in {str(file)!r}, got {name!r}, which this "
                "layout has no place for; without it the slots would be others."
            )
    if not any(".lora_A." in name for name in adapter):
        raise ValueError(
            f"Expected the encoder's LoRA in {str(file)!r}, as '{INNER}….lora_A.default.weight', got none; give the "
            "file of the whole ICAE."
        )
    return embeddings, adapter, of_base


@torch.no_grad()
def _fill(model: ICAEForConditionalGeneration, embeddings, adapter: dict[str, torch.Tensor], file: Path) -> None:
    known = get_peft_model_state_dict(model.language_model, adapter_name=ADAPTER)
    expected = {name: tuple(tensor.shape) for name, tensor in known.items()}
    slots, size = model.memory_embeddings.shape
    expected[EMBEDDINGS] = (slots + SPECIAL, size)
    found = {name: tuple(tensor.shape) for name, tensor in adapter.items()} | {EMBEDDINGS: tuple(embeddings.shape)}
    if odd := sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)):
        raise ValueError(
            f"Expected tensors in {str(file)!r} as the base {model.config.base_model_name_or_path!r} needs them, but "
            f"{len(odd)} are missing, left over or of another shape, first {odd[0]!r}: expected "
            f"{expected.get(odd[0])}, got {found.get(odd[0])}; give the base that it was trained on."
        )
    memory, tasks, _ = embeddings.split([slots, 2, 1])
    model.memory_embeddings.copy_(memory)
    model.task_embeddings.copy_(tasks)
    set_peft_model_state_dict(model.language_model, adapter, adapter_name=ADAPTER)


def _notes(release: str, config: ICAEConfig, of_base: int) -> list[str]:
    slots, span = config.num_memory_slots, config.span_length
    prompts = "[FT] prompt [FT]" if release == "v1" else "[INST] slots [FT] prompt [/INST]"
    return [
        *([f"left out: {of_base} weights of the base that the file holds"] if of_base else []),
        "left out: the embedding of [FT], which official prompts put behind the slots "
        f"({prompts}); here the base's chat template stands around them, so answers are worse until it is tuned again "
        "(`icae sft`)",
        f"differs: a context of fewer than {slots} tokens gets as many slots as tokens, in official code {slots}",
        f"differs: longer contexts become spans of {span} tokens, each behind a start token; official code cuts them "
        "into equal parts, of which only the first has one",
        "differs: the decoder reads a start token in front of the slots; official reconstruction has none",
        "could not verify: that this is the base it was trained on; only shapes were compared",
        f"could not verify: the adapter's scale of {config.lora_alpha:g} / {config.lora_r} and spans of {span} "
        "tokens, which are the official defaults and not in the file",
        "could not verify: that [LM] was trained, which official pretraining only does with "
        "`add_special_token_for_lm`; continuation reads it",
    ]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="icae convert", description="Official ICAE checkpoints (getao/icae) in this package's layout."
    )
    parser.add_argument("file", metavar="FILE", help="`.pt` (version 1) or `.safetensors` (version 2)")
    parser.add_argument("--base", required=True, help="folder or Hub id of the base it was trained on")
    parser.add_argument("--format", choices=RELEASES, help="default: v2 for safetensors, else v1")
    parser.add_argument("-o", "--output", required=True, metavar="FOLDER", help="where to write")
    arguments = parser.parse_args(argv)
    notes = convert(arguments.file, arguments.base, arguments.output, release=arguments.format)
    print("\n".join([arguments.output, *notes]))


if __name__ == "__main__":
    main()
