"""What `icae pretrain` and `icae sft` share: their arguments, the model, the data, the run."""

import gc
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from glob import glob
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets, load_dataset
from trl import TrlParser

from icae.configuration_icae import ICAEConfig
from icae.dtypes import resolve_dtype
from icae.embedded import EMBEDDED_BASE_ID, embedded_base
from icae.evaluation.files import read_rows
from icae.evaluation.record import write_record
from icae.model_cards import DataSource
from icae.modeling_icae import ICAEForConditionalGeneration

from .icae_trainer import ICAETrainer, last_checkpoint


@dataclass
class ScriptArguments:
    """What to train, and on what."""

    base_model: str = field(default="embedded", metadata={"help": 'Hub id or folder of the base, or "embedded".'})
    init_from: str | None = field(default=None, metadata={"help": "An ICAE checkpoint to go on from."})
    dtype: str = field(
        default="auto",
        metadata={"help": "dtype of the frozen base. auto: float32 on processors that only imitate bfloat16."},
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": 'Attention of the base; "grouped" is the fastest to train on a CPU.'}
    )
    dataset_name: str | None = field(default=None, metadata={"help": "Data set on the Hub."})
    dataset_config: str | None = field(default=None, metadata={"help": "Its configuration."})
    train_files: list[str] | None = field(default=None, metadata={"help": "Local Parquet files, in place of it."})
    eval_files: list[str] | None = field(default=None, metadata={"help": "Local Parquet files to evaluate on."})
    train_split: str = field(default="train", metadata={"help": "Split of the data set to train on."})
    eval_split: str | None = field(default=None, metadata={"help": "Split to evaluate on."})
    streaming: bool = field(default=False, metadata={"help": "Stream the data set instead of downloading it."})
    train_samples: int | None = field(
        default=None,
        metadata={
            "help": "So many rows of the training data, drawn with `seed`; of triples in memory, those about one "
            "context together. Default: all."
        },
    )
    document_characters: int | None = field(
        default=None,
        metadata={
            "help": "Of each local file of documents so many characters only, in whole documents drawn with `seed`, "
            "so that no kind of text drowns the others. Default: all."
        },
    )
    eval_samples: int = field(default=64, metadata={"help": "Held-out samples of each evaluation."})
    resume: bool = field(default=False, metadata={"help": "Go on from the last checkpoint in `output_dir`."})
    license: str | None = field(default=None, metadata={"help": "For the model card: licence of what is trained."})
    language: list[str] | None = field(default=None, metadata={"help": "For the model card: codes of languages."})
    data_sources: list[str] | None = field(
        default=None,
        metadata={"help": 'For the model card: what the data is, as "NAME" or "NAME=LICENCE". Default: its id.'},
    )


@dataclass
class ICAEArguments:
    """
    Fields of [`ICAEConfig`] for a new model, by default as there; of a model to go on from, what it is expected to be.
    """

    memory_type: str | None = field(default=None, metadata={"help": "key_values (default), or hidden_states (paper)."})
    span_length: int | None = field(
        default=None, metadata={"help": "Tokens compressed at once. Default: 128. Paper: 512."}
    )
    compression_ratio: float | None = field(default=None, metadata={"help": "Tokens per slot. Default and paper: 4."})
    num_memory_slots: int | None = field(default=None, metadata={"help": "Slots per span, instead. Paper: 128."})
    encoder_layout: str | None = field(default=None, metadata={"help": "uniform (default), or sequential (paper)."})
    decoder_layout: str | None = field(default=None, metadata={"help": "uniform (default), or sequential (paper)."})
    lora_r: int | None = field(default=None, metadata={"help": "Rank of the adapter. Default: 32. Paper: 128."})
    lora_alpha: float | None = field(default=None, metadata={"help": "Scale of the adapter. Default: 64."})
    lora_dropout: float | None = field(default=None, metadata={"help": "Dropout of the adapter. Default: 0."})
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Modules of the adapter. Default: all-linear. Paper: q_proj v_proj."}
    )


def read_arguments(command: str, kinds: Sequence[type], argv: list[str] | None) -> tuple:
    """
    What the configuration file and the words behind it say.

    Raises:
        `ValueError`: if `--config` comes without a file.
    """
    words = sys.argv[1:] if argv is None else argv
    if words[-1:] == ["--config"]:
        raise ValueError("Expected a YAML file behind `--config`, got none.")
    return TrlParser(kinds, prog=f"icae {command}").parse_args_and_config(words)


def load_model(script: ScriptArguments, icae: ICAEArguments, *, cpu: bool) -> ICAEForConditionalGeneration:
    """
    A new model, or the one to go on from. `cpu`: it will be trained there, whatever else there is.

    Raises:
        `ValueError`: if the one to go on from is of another architecture than what the arguments ask for.
    """
    options: dict[str, Any] = {"dtype": resolve_dtype(script.dtype, cpu)}
    if script.attn_implementation:
        options["attn_implementation"] = script.attn_implementation
    embedded = script.base_model == "embedded"
    base = embedded_base() if embedded else script.base_model
    given = {name: value for name, value in vars(icae).items() if value is not None}
    if given.get("lora_target_modules") == ["all-linear"]:
        given["lora_target_modules"] = "all-linear"
    if "num_memory_slots" in given:
        given["compression_ratio"] = None  # which a file may name
    config = ICAEConfig(base_model_name_or_path=EMBEDDED_BASE_ID if embedded else None, **given)
    if not script.init_from:
        return ICAEForConditionalGeneration.from_base(base, config, **options)
    model = ICAEForConditionalGeneration.from_pretrained(
        script.init_from, base_model=base, is_trainable=True, **options
    )
    asked = {name: getattr(config, name) for name in given}
    own = {name: getattr(model.config, name) for name in asked}
    if asked != own:
        raise ValueError(
            f"Expected the architecture of {script.init_from!r}, {own}, got {asked}; leave that out, or train a new "
            "model without `init_from`."
        )
    return model


def load_documents(script: ScriptArguments, files: list[str] | None, seed: int, text_column: str = "text"):
    """
    The documents of local Parquet files, or none without files. With `document_characters`, of each file as many whole
    documents, drawn with `seed`, as it takes to reach so many characters: the last one may go over.

    Raises:
        `ValueError`: if `document_characters` comes without files, with streaming, or without a column `text_column`,
            or if a document is missing.
    """
    if script.document_characters is None:
        return read_rows(files, script.streaming) if files else None
    if not files or script.streaming:
        raise ValueError(
            "Expected `document_characters` with local files of documents that are not streamed, got "
            f"{'streamed ones' if files else 'none'}; leave it out, or give such files."
        )
    parts = []
    for file in chain(*(sorted(glob(pattern)) or [pattern] for pattern in files)):
        documents = read_rows([file]).select_columns(text_column)
        shuffled = documents.shuffle(seed=seed)
        if None in (texts := shuffled[text_column][:]):
            row = documents[text_column][:].index(None)
            raise ValueError(f"Expected documents that are text, got none in row {row} of {file}.")
        lengths = np.array([len(text) for text in texts])
        before = np.cumsum(lengths) - lengths
        parts.append(shuffled.take(int((before < script.document_characters).sum())))
    return concatenate_datasets(parts)


def load_data(script: ScriptArguments, seed: int, text_column: str | None = None, max_prompts: int = 1):
    """
    The data sets to train and to evaluate on; with a `text_column`, of documents. With several `max_prompts`, which
    share a context's encoder pass, what is drawn of triples in memory has those about one context together.
    """
    streaming, evaluation = script.streaming, None
    if not script.train_files and not script.dataset_name:
        raise ValueError("Expected `dataset_name` or `train_files`, got neither; name the data to train on.")
    if script.eval_split and script.train_files:
        raise ValueError(
            f"Expected `eval_files` beside `train_files`, got `eval_split` ({script.eval_split!r}), which is one of a "
            "`dataset_name`."
        )
    name = (script.dataset_name, script.dataset_config)
    if text_column is not None:
        train = load_documents(script, script.train_files, seed, text_column)
    else:
        train = read_rows(script.train_files, streaming) if script.train_files else None
    if train is None:
        train = load_dataset(*name, split=script.train_split, streaming=streaming)
    if script.eval_files:
        evaluation = read_rows(script.eval_files)
    elif script.eval_split:
        evaluation = load_dataset(*name, split=script.eval_split, streaming=streaming)
    if script.train_samples is not None:
        names = train.column_names or ()
        is_pwc = {"input", "prompt", "answer"} <= set(names)
        if max_prompts > 1 and not streaming and ("context" in names or is_pwc):
            train = shuffle_contexts(train, "context" if "context" in names else "input", seed)
        else:
            train = train.shuffle(seed=seed)
        train = train.take(script.train_samples)
        if streaming:  # kept, because every pass would draw others
            train = Dataset.from_list(list(train), features=train.features).to_iterable_dataset()
    return train, evaluation


def shuffle_contexts(triples: Dataset, column: str, seed: int) -> Dataset:
    """Shuffles triples so that neighbours about the same context, which stands in `column`, stay together."""
    groups = groupby(enumerate(triples[column]), lambda row: row[1])
    indices = [[index for index, _ in group] for _, group in groups]
    order = np.random.default_rng(seed).permutation(len(indices))
    return triples.select([index for group in order for index in indices[group]])


def data_sources(script: ScriptArguments) -> list[DataSource]:
    """What the model card says of the training data: as the script says, or the id of the data set on the Hub. (Names
    of local files tell readers nothing.)"""
    if script.data_sources is not None:
        parts = [source.partition("=") for source in script.data_sources]
        return [DataSource(name.strip(), license.strip() or None) for name, _, license in parts]
    if script.train_files or script.dataset_name is None:
        return []
    return [DataSource(script.dataset_name, hub_id=script.dataset_name)]


def run(trainer: ICAETrainer, script: ScriptArguments, icae: ICAEArguments) -> None:
    """
    Trains, from the last checkpoint if the script says so, and saves the model, its state and the arguments. What is
    complete stays as it is. Several processes part at the end.

    Raises:
        `ValueError`: if the run was begun with a base in another dtype, if a new one would mix with an old one, or if
            `run.json` is not of a run.
    """
    output_dir = trainer.args.output_dir
    file = Path(output_dir, "run.json")
    checkpoint = last_checkpoint(output_dir)
    before = json.loads(file.read_text()) if file.is_file() else {}
    if file.is_file() and not (isinstance(before, dict) and {"arguments", "seed"} <= before.keys()):
        raise ValueError(
            f"Expected no run.json in {output_dir!r}, or that of a run, got another file of this name; give another "
            "`--output_dir`."
        )
    if checkpoint and not script.resume:
        raise ValueError(
            f"Expected a folder without checkpoints, got {output_dir!r}; go on from them with `--resume true`, remove "
            "them, or give another `--output_dir`."
        )
    complete = "steps" in before and 0 < trainer.args.max_steps <= before.get("max_steps", before["steps"])
    if not checkpoint and "steps" in before and not (script.resume and complete):
        raise ValueError(
            f"Expected a folder without a run, got {output_dir!r}, which holds a finished one and no checkpoints to "
            "go on from; remove it, or give another `--output_dir`."
        )
    dtype = str(trainer.model.language_model.dtype).removeprefix("torch.")
    own = {name: getattr(trainer.model.config, name) for name in vars(icae)}
    record = {"arguments": vars(script) | own | {"dtype": dtype}, "seed": trainer.args.seed}
    if checkpoint is None and "steps" not in before:
        if trainer.is_world_process_zero():
            write_record(file, record)
    elif before:
        if before["seed"] != record["seed"]:
            raise ValueError(
                f"Expected the seed {before['seed']}, with which the run in {output_dir!r} was begun, got "
                f"{record['seed']}: it would not go on exactly."
            )
        if (begun := before["arguments"]["dtype"]) != dtype:
            raise ValueError(
                f"Expected a base in {begun}, with which the run in {output_dir!r} was begun, got {dtype}: it would "
                f"not go on exactly. `auto` depends on the machine; set `--dtype {begun}`."
            )
        if complete:
            # Transformers would train another step first, inside of an epoch, and more where a run was stopped early.
            trainer.accelerator.print(f"{output_dir} is complete: {before['steps']} steps")
            _end_training(trainer)
            return
    trainer.card.license, trainer.card.language = script.license, script.language or []
    trainer.card.data = data_sources(script)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    trainer.save_state()
    if trainer.is_world_process_zero():
        write_record(file, record | {"steps": trainer.state.global_step, "max_steps": trainer.state.max_steps})
    _end_training(trainer)


def _end_training(trainer: ICAETrainer) -> None:
    """
    Ends the work of several processes together. Gloo's threads live as long as anything holds their group, also after
    it is destroyed: here the wrapped model, which is in reference cycles. One of them that still has a tensor to free
    when Python ends aborts the process (pytorch#179291).
    """
    trainer.model_wrapped = trainer.model
    trainer.accelerator.free_memory()
    gc.collect()  # `free_memory` itself collects before it lets go of the model
    trainer.accelerator.end_training()
