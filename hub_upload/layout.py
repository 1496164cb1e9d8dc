"""The files of an ICAE on the Hub, and how they are put together from a checkpoint."""

import json
import shutil
from fnmatch import fnmatchcase
from pathlib import Path

from peft import PeftConfig
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.tokenization_utils_base import (
    ADDED_TOKENS_FILE,
    FULL_TOKENIZER_FILE,
    SPECIAL_TOKENS_MAP_FILE,
    TOKENIZER_CONFIG_FILE,
)

from icae.configuration_icae import ICAEConfig
from icae.model_cards import CARD_FACTS, CardFacts, is_changed, model_card
from icae.modeling_icae import ICAEForConditionalGeneration
from icae.modeling_icae.pretrained_icae import ADAPTER_FOLDER, AUTO_MAP, CUSTOM_PIPELINES, SLOTS_FILE


ADAPTER_CONFIG = f"{ADAPTER_FOLDER}/adapter_config.json"
ADAPTER_WEIGHTS = f"{ADAPTER_FOLDER}/adapter_model.safetensors"
WEIGHTS = (SLOTS_FILE, ADAPTER_WEIGHTS)
DESCRIPTION = ("config.json", "generation_config.json", ADAPTER_CONFIG, CARD_FACTS, "README.md")
CODE = {file.name: file for file in ICAEForConditionalGeneration._code_files()}
REQUIRED = {*WEIGHTS, *DESCRIPTION, *CODE, TOKENIZER_CONFIG_FILE}
# The names under which tokenizers of all kinds are saved.
TOKENIZER = {
    TOKENIZER_CONFIG_FILE,
    FULL_TOKENIZER_FILE,
    SPECIAL_TOKENS_MAP_FILE,
    ADDED_TOKENS_FILE,
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "spm.model",
    "source.spm",
    "target.spm",
    "tekken.json",
    "*.tiktoken",
}
TRAINER_STATE = "trainer_state.json"
PICKLES = {"*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt"}
# What a trainer resumes from, beside the layout itself. Its arguments hold the token and are not needed.
OPTIMIZER = {"optimizer.pt", "optimizer.bin"}
STATE = OPTIMIZER | {"scheduler.pt", "scaler.pt", "rng_state*.pth", TRAINER_STATE}
# What other tokenizers, other ways of saving and trainers left in a repository. All else belongs to its owner.
STALE = (TOKENIZER - {"*.tiktoken"}) | {
    f"{ADAPTER_FOLDER}/*",
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model-*-of-*.bin",
    "pytorch_model.bin.index.json",
    "optimizer.pt",
    "scheduler.pt",
    "scaler.pt",
    "rng_state*.pth",
    TRAINER_STATE,
    "training_args.bin",
}
# A repository that holds one of these is some model's.
OF_MODELS = {
    "adapter_config.json",
    "adapter_model.*",
    "model*.safetensors",
    "model_index.json",
    "pytorch_model*.bin",
}


def matches(name: str, patterns: set[str]) -> bool:
    """Whether a path inside a repository matches a pattern of the same depth."""
    return any(name.count("/") == pattern.count("/") and fnmatchcase(name, pattern) for pattern in patterns)


def files_of(folder: str | Path) -> dict[str, Path]:
    """The files of a folder by their path in the repository, sorted."""
    found = (path for path in Path(folder).rglob("*") if path.is_file())
    return dict(sorted((path.relative_to(folder).as_posix(), path) for path in found))


def training_state(checkpoint: str | Path, folder: str | Path) -> None:
    """
    Copies what a trainer resumes from: the ICAE itself, its tokenizer, and the states of optimizer, schedule, scaler,
    random generators and trainer. All else stays behind, for example the trainer's arguments, which hold the token,
    what FSDP and DeepSpeed save of the base, logs, and links. The best checkpoint is named without the folders that
    it lies in here.

    Args:
        checkpoint (`str` or `Path`):
            A trainer's checkpoint. It may be deleted afterwards.
        folder (`str` or `Path`):
            Where to put the copies; made if missing.
    """
    for name, file in files_of(checkpoint).items():
        if matches(name, REQUIRED | TOKENIZER | STATE) and not file.is_symlink():
            copy = Path(folder, name)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)
    described = Path(folder, TRAINER_STATE)
    state = json.loads(described.read_text(encoding="utf-8"))
    if state["best_model_checkpoint"]:
        state["best_model_checkpoint"] = Path(state["best_model_checkpoint"]).name
        described.write_text(json.dumps(state, indent=2), encoding="utf-8")


def assemble(
    checkpoint: str | Path,
    folder: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    repo_id: str | None = None,
    branch: str | None = None,
) -> None:
    """
    Puts the complete layout together in `folder`: the checkpoint's weights and its configuration, the code of this
    package byte for byte, the tokenizer and a model card. Nothing else of the checkpoint is taken over.

    Args:
        checkpoint (`str` or `Path`):
            A folder as `save_pretrained` or a trainer wrote it. Its `README.md` is kept as the card if somebody wrote
            or changed it, and made again if it was generated.
        folder (`str` or `Path`):
            Where to put the files; made if missing.
        tokenizer (`PreTrainedTokenizerBase`, *optional*):
            The tokenizer, by default the checkpoint's own.
        repo_id (`str`, *optional*):
            The repository that the card should name.
        branch (`str`, *optional*):
            Its branch, if not `main`.

    Raises:
        `ValueError`: if the checkpoint lacks weights or its configuration, or if no tokenizer is known.
    """
    checkpoint, folder = Path(checkpoint), Path(folder)
    needed = [*WEIGHTS, "config.json", "generation_config.json", ADAPTER_CONFIG]
    if missing := [name for name in needed if not (checkpoint / name).is_file()]:
        raise ValueError(
            f"Expected a saved ICAE in the folder {str(checkpoint)!r}, but {', '.join(missing)} is not there; save it "
            "with `save_pretrained`, or give one of a trainer's checkpoint folders."
        )
    if tokenizer is None and not (checkpoint / TOKENIZER_CONFIG_FILE).is_file():
        raise ValueError(f"Expected a tokenizer in {str(checkpoint)!r}, got none; give the base's as `tokenizer`.")
    (folder / ADAPTER_FOLDER).mkdir(parents=True, exist_ok=True)

    config = ICAEConfig.from_pretrained(checkpoint)
    config.auto_map, config.custom_pipelines = AUTO_MAP, CUSTOM_PIPELINES
    config.save_pretrained(folder)
    adapter_config = PeftConfig.from_pretrained(checkpoint / ADAPTER_FOLDER)
    adapter_config.base_model_name_or_path = config.base_model_name_or_path
    adapter_config.revision = config.base_model_revision
    if isinstance(adapter_config.target_modules, set):  # in no order of its own
        adapter_config.target_modules = sorted(adapter_config.target_modules)
    adapter_config.save_pretrained(folder / ADAPTER_FOLDER)

    for name in (*WEIGHTS, "generation_config.json"):
        shutil.copyfile(checkpoint / name, folder / name)
    for name, file in CODE.items():
        shutil.copyfile(file, folder / name)
    # The configuration is at hand; its file names code, which would have to be trusted.
    tokenizer = tokenizer or AutoTokenizer.from_pretrained(checkpoint, config=config)
    tokenizer.save_pretrained(folder)
    described = json.loads((folder / TOKENIZER_CONFIG_FILE).read_text(encoding="utf-8"))
    for name in ("is_local", "local_files_only"):  # how it was loaded here
        described.pop(name, None)
    text = json.dumps(described, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    (folder / TOKENIZER_CONFIG_FILE).write_text(text, encoding="utf-8")
    facts = CardFacts.load(checkpoint)
    if repo_id is not None:
        facts = facts.at(repo_id, branch)
    if facts.repo_id is None:
        facts.name = facts.name or checkpoint.resolve().name
    facts.save(folder)
    card = checkpoint / "README.md"
    if is_changed(card):
        shutil.copyfile(card, folder / "README.md")
    else:
        (folder / "README.md").write_text(model_card(folder), encoding="utf-8")
