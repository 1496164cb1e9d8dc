"""
`icae card FOLDER`: a model card (`README.md`) from what a saved ICAE and its `icae_card.json` say.

Every sentence and number of a card is generated: from `config.json`, from the facts that training kept beside it, and,
with `--results`, from the files that `icae evaluate` wrote. What is not known is said to be unknown.
"""

import argparse
import hashlib
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import validate_repo_id
from transformers.utils import logging

from icae.configuration_icae import ICAEConfig
from icae.embedded import CHECKPOINT, EMBEDDED_BASE_CODE, EMBEDDED_BASE_FINGERPRINT
from icae.modeling_icae import ICAEForConditionalGeneration

from .facts import CardFacts, Evaluation, TrainingStage, is_hub_id


logger = logging.get_logger(__name__)
TEMPLATE = Path(__file__).with_name("template.md")
MARK = "\n<!-- generated, sha256 "  # of the text above, so that a card that somebody has changed is known
TAGS = ["icae", "context-compression", "custom_code"]
PAPER = {
    "title": "In-context Autoencoder for Context Compression in a Large Language Model",
    "id": "2307.06945",
    # docstyle-ignore
    "citation": """@inproceedings{ge2024incontext,
  title = {In-context Autoencoder for Context Compression in a Large Language Model},
  author = {Tao Ge and Jing Hu and Lei Wang and Xun Wang and Si-Qing Chen and Furu Wei},
  booktitle = {International Conference on Learning Representations},
  year = {2024},
  url = {https://arxiv.org/abs/2307.06945},
}""",
}


@dataclass
class Measure:
    """How a number of an evaluation is shown, and its type in the Hub's model index."""

    label: str
    metric: str
    show: Callable[[float], str]


def _nats(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}"


MEASURES = {
    "ae_loss": Measure("autoencoding loss", "loss", _nats),
    "ae_loss_other_text": Measure("the same with another text's slots", "loss", _nats),
    "ae_accuracy": Measure("autoencoding accuracy", "accuracy", "{:.1%}".format),
    "bleu": Measure("BLEU", "bleu", "{:.2f}".format),
    "exact_prefix": Measure("exact prefix", "exact_prefix", "{:.0%}".format),
    "lm_loss": Measure("continuation loss", "loss", _nats),
    "lm_loss_other_text": Measure("the same with another text's slots", "loss", _nats),
    "response_loss": Measure("response loss", "loss", _nats),
    "response_loss_other_text": Measure("the same with another text's slots", "loss", _nats),
    "loss": Measure("loss of the reference", "loss", _nats),
    "f1": Measure("token F1", "f1", "{:.2f}".format),
    "f1_share_of_full_context": Measure("share of the full context's", "f1_share", "{:.2f}".format),
    "exact_match": Measure("exact match", "exact_match", "{:.2f}".format),
    "short_f1": Measure("F1 of short answers", "f1", "{:.2f}".format),
    "short_exact_match": Measure("exact match of short answers", "exact_match", "{:.2f}".format),
    "long_rougeL": Measure("ROUGE-L of long answers", "rougeL", "{:.2f}".format),
}
SIDE_BY_SIDE = 5  # stages, at most, that are shown in full, a column each
CONTROLS = {
    "full context": "the frozen base reads the whole context, without any tuning to prompts like these",
    "full context, tuned": "the base with a LoRA of the same size, tuned on data of the same kind, reads the whole "
    "context",
    "truncated context": "the frozen base reads as many tokens from the start of the context as there are slots",
    "summary": "the frozen base reads a summary of that length, which it wrote itself",
    "retrieved sentences": "the frozen base reads as many tokens of the sentences that fit the prompt best (BM25)",
    "LLMLingua": "the frozen base reads the context as LLMLingua shortens it to that length",
    "kvpress": "the frozen base has so many of its own keys and values, those that kvpress keeps",
    "no context": "the frozen base reads the prompt alone",
    "untrained slots": "an ICAE without any training",
}


def model_card(folder: str | Path, *, repo_id: str | None = None, revision: str | None = None) -> str:
    """
    The text of `README.md` for a saved ICAE.

    Args:
        folder (`str` or `Path`):
            A folder that `save_pretrained` wrote. If `icae_card.json` lies in it, the card states its facts.
        repo_id (`str`, *optional*), revision (`str`, *optional*):
            Where the model will lie on the Hub, and the commit or tag that the quickstart pins. Default: as in the
            facts.

    Raises:
        `ValueError`: if the folder holds no ICAE, if its facts are damaged, or if no repository can be called
            `repo_id`.
    """
    folder = Path(folder)
    config = ICAEConfig.from_pretrained(folder) if (folder / "config.json").is_file() else ICAEConfig()
    if config.text_config is None:
        raise ValueError(
            f"Expected a saved ICAE with its 'config.json' in {str(folder)!r}, found none; give the folder that "
            "`save_pretrained` wrote."
        )
    facts = CardFacts.load(folder)
    if repo_id is not None:
        validate_repo_id(repo_id)
    if repo_id not in (None, facts.repo_id):
        facts = facts.at(repo_id)
    facts = replace(facts, revision=revision or facts.revision)
    return render(facts.named(folder), config, with_code="auto_map" in vars(config))


def write_card(folder: str | Path, results: str | Path | None = None, **options) -> None:
    """
    Writes `README.md` into the folder of a saved ICAE; with `results`, takes them over into its facts first. A card
    that somebody wrote or changed stays, with a warning.

    Args:
        folder, options:
            As in [`model_card`].
        results (`str` or `Path`, *optional*):
            Folder of results, see [`CardFacts.add_results`].
    """
    if results is not None:
        facts = CardFacts.load(folder)
        facts.add_results(results, folder)
        facts.save(folder)
    put_card(folder, model_card(folder, **options))


def put_card(folder: str | Path, text: str) -> None:
    """Writes a card into a folder, unless there is one that somebody wrote or changed."""
    card = Path(folder, "README.md")
    if is_changed(card):
        logger.warning_once(f"{card} stays as somebody wrote it; remove it to have the card written anew.")
    else:
        card.write_text(text, encoding="utf-8")


def render(facts: CardFacts, config: ICAEConfig, with_code: bool = True) -> str:
    """
    The card of a model.

    Args:
        facts ([`CardFacts`]):
            What is known beside the configuration; `name` is needed.
        config ([`ICAEConfig`]):
            Its configuration, with the base's.
        with_code (`bool`, *optional*, defaults to `True`):
            Whether its code lies beside it, as it does in each repository. If not, the quickstart takes this package.
    """
    facts = replace(facts, name=" ".join((facts.name or "").split()))
    base = config.base_model_name_or_path or ""
    on_hub = is_hub_id(base)
    base_name = base if on_hub else Path(base).name or f"a {config.text_config.model_type} model"
    datasets = sorted({source.hub_id for stage in facts.stages for source in stage.data if source.hub_id})
    results = _model_index(facts)
    numbered = {f"{number}. {stage.name}": stage for number, stage in enumerate(facts.stages, 1)}
    embedded = config.base_model_fingerprint == EMBEDDED_BASE_FINGERPRINT
    saved_with = {"transformers": config.transformers_version} if config.transformers_version else {}
    metadata = ModelCardData(
        model_name=facts.name if results else None,
        language=facts.language or None,
        license=facts.license,
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=base if on_hub else None,
        base_model_relation="adapter" if on_hub else None,
        datasets=datasets or None,
        tags=[*TAGS, *(tag for tag in facts.tags if tag not in TAGS)],
        eval_results=results or None,
    )
    card = ModelCard.from_template(
        metadata,
        template_path=str(TEMPLATE),
        facts=facts,
        config=config,
        code=[file.name for file in ICAEForConditionalGeneration._code_files()] if with_code or facts.repo_id else [],
        embedded_checkpoint=embedded and facts.name == CHECKPOINT.name,
        base_name=base_name,
        base_on_hub=on_hub,
        base_code=EMBEDDED_BASE_CODE if embedded else None,
        base_link=f"[{base}](https://huggingface.co/{base})" if on_hub else f"`{base_name}`",
        slots=config.max_slots_per_span,
        ratio=_ratio(config),
        layouts=_layouts(config),
        modules=_modules(config),
        reconstruction=facts.reconstruction and _table(facts.reconstruction.rows, ""),
        answers=facts.answers and _table(facts.answers.rows, "answers from"),
        controls=[f"*{row}*: {text}" for row, text in CONTROLS.items() if facts.answers and row in facts.answers.rows],
        provenance=_provenance,
        held_out=_table({name: stage.evaluation for name, stage in numbered.items() if stage.evaluation}, "after"),
        stages=_stages(numbered),
        data=_data(facts.stages),
        longest=_longest(facts.stages, config),
        limit=config.num_positions,
        versions=facts.stages[-1].versions if facts.stages else saved_with,
        paper=PAPER,
        package_version=version("icae"),
    )
    text = re.sub(r"\n{3,}", "\n\n", str(card)).rstrip() + "\n"
    return text + _mark(text)


def is_generated(card: str) -> bool:
    """Whether a card is as [`render`] wrote it, from whatever facts; otherwise somebody has changed it."""
    text = card[: card.rfind(MARK)]
    return card == text + _mark(text)


def is_written(card: str) -> bool:
    """Whether somebody wrote or changed a card; one of metadata alone is that of the Hub's page for new models."""
    return not is_generated(card) and bool(ModelCard(card, ignore_metadata_errors=True).text.strip())


def is_changed(card: Path) -> bool:
    """Whether a card lies there that somebody wrote or changed."""
    return card.is_file() and is_written(card.read_text(encoding="utf-8"))


def _mark(text: str) -> str:
    return f"{MARK}{hashlib.sha256(text.encode()).hexdigest()[:16]}; `icae push` keeps a card that was changed -->\n"


def _markdown(rows: list[list[str]]) -> str:
    """A table whose first row is its head."""
    head, *rest = [[re.sub(r"\s*\n\s*", " ", cell).replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |".replace("|  |", "| |") for row in [head, ["---"] * len(head), *rest])


def _table(rows: dict[str, dict[str, float]], corner: str) -> str:
    """The known measures of some rows; empty without any."""
    columns = [name for name in MEASURES if any(name in row for row in rows.values())]

    def cell(row: dict[str, float], column: str) -> str:
        value = row.get(column, math.nan)
        return MEASURES[column].show(value) if math.isfinite(value) else "–"

    head = [corner, *(MEASURES[column].label for column in columns)]
    body = [[name, *(cell(row, column) for column in columns)] for name, row in rows.items()]
    return _markdown([head, *body]) if columns else ""


def _model_index(facts: CardFacts) -> list[EvalResult]:
    """The numbers of this model for the Hub's model index, controls under names of their own."""
    results: list[EvalResult] = []

    def add(dataset: str, row: dict[str, float], control: str = "") -> None:
        of = ""  # what "with another text's slots" is the control of
        for column, measure in MEASURES.items():
            if not math.isfinite(row.get(column, math.nan)):
                continue
            if column.endswith("_other_text"):
                name = f"{of} with another text's slots (control)"
            else:
                name = of = measure.label
            results.append(
                EvalResult(
                    task_type="text-generation",
                    dataset_type=dataset.lower().replace(" ", "-"),
                    dataset_name=dataset,
                    metric_type=measure.metric,
                    metric_name=name + control,
                    metric_value=round(row[column], 4),
                )
            )

    if facts.reconstruction:
        add("Held-out text", list(facts.reconstruction.rows.values())[-1])
    if facts.answers:
        for name, row in facts.answers.rows.items():
            if name == "icae":
                add("Held-out prompts", row)
            elif "f1" in row:
                add("Held-out prompts", {"f1": row["f1"]}, control=f" from {name} (control)")
    if not results and facts.stages:
        add("Held-out samples", facts.stages[-1].evaluation)
    return results


def _ratio(config: ICAEConfig) -> str:
    if config.compression_ratio is None:
        return f"{config.num_memory_slots} slots per span of up to {config.span_length} tokens"
    return f"{config.compression_ratio:g} tokens per slot"


def _layouts(config: ICAEConfig) -> str:
    decoder = set(config.decoder_layout.values())
    spoken = decoder if len(decoder) == 1 else [f"{layout} ({task})" for task, layout in config.decoder_layout.items()]
    return f"{config.encoder_layout} in the encoder, {', '.join(spoken)} in the decoder"


def _modules(config: ICAEConfig) -> str:
    modules = config.lora_target_modules
    if modules == "all-linear":
        return "all linear layers"
    names = [modules] if isinstance(modules, str) else sorted(modules)
    return ", ".join(f"`{name}`" for name in names).replace("|", "\\|")  # it stands in a table


def _data(stages: list[TrainingStage]) -> str:
    """The data sets with their licences; stages that share theirs share a list."""
    groups: dict[str, list[int]] = {}
    for number, stage in enumerate(stages, 1):
        lines = []
        for source in stage.data:
            link = f"[{source.name}](https://huggingface.co/datasets/{source.hub_id})"
            lines.append(f"- {link if source.hub_id else source.name}: {source.license or 'licence not recorded'}")
        groups.setdefault("\n".join(lines), []).append(number)
    paragraphs = []
    for sources, numbers in groups.items():
        which = f"stage{'s' * (len(numbers) > 1)} {_ranges(numbers)}"
        paragraphs.append(f"Data of {which}:\n\n{sources}" if sources else f"The data of {which} was not recorded.")
    return "\n\n".join(paragraphs)


def _ranges(numbers: list[int]) -> str:
    """Rising numbers in words: `1 and 3–5`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    *parts, last = [str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs]
    return f"{', '.join(parts)} and {last}" if parts else last


def _stages(stages: dict[str, TrainingStage]) -> str:
    """The recipes side by side, one column per stage; of many, the sums of each trainer and a folded row per stage."""
    rows: dict[str, Callable[[TrainingStage], str]] = {
        "started from": lambda stage: f"`{stage.started_from}`" if stage.started_from else "",
        "steps": lambda stage: f"{stage.steps:,}",
        "contexts per step": lambda stage: f"{stage.rows_per_step:,}",
        "context tokens": lambda stage: f"{stage.context_tokens:,}" if stage.context_tokens is not None else "",
        "learning rate": lambda stage: f"{stage.learning_rate:g}",
        "schedule": lambda stage: f"{stage.schedule}, {stage.warmup_steps:,} steps of warm-up",
        "optimizer": lambda stage: stage.optimizer,
        "settings": lambda stage: ", ".join(
            f"{name.replace('_', ' ')} {value}" for name, value in stage.settings.items() if value is not None
        ),
        "seed": lambda stage: str(stage.seed),
        "hardware": lambda stage: stage.hardware or "",
        "wall time": lambda stage: _duration(stage.seconds),
    }
    table = [["", *stages]]
    for name, show in rows.items():
        cells = [show(stage) for stage in stages.values()]
        if any(cells):
            table.append([name, *(cell or "not recorded" for cell in cells)])
    if len(stages) <= SIDE_BY_SIDE:
        return _markdown(table)
    every = _markdown([list(row) for row in zip(*table, strict=True)])
    folded = f"<details>\n<summary>All {len(stages)} stages, first to last</summary>\n\n{every}\n\n</details>"
    return f"{_sums(list(stages.values()))}\n\n{folded}"


def _sums(stages: list[TrainingStage]) -> str:
    """What the stages of each trainer come to."""
    table = [["", "stages", "steps", "context tokens", "learning rates", "wall time"]]
    for name in dict.fromkeys(stage.name for stage in stages):
        own = [stage for stage in stages if stage.name == name]
        rates = sorted({stage.learning_rate for stage in own})
        tokens = [stage.context_tokens for stage in own if stage.context_tokens is not None]
        seconds = [stage.seconds for stage in own if stage.seconds is not None]
        table.append(
            [
                name,
                str(len(own)),
                f"{sum(stage.steps for stage in own):,}",
                f"{sum(tokens):,}{_of_some(tokens, own)}" if tokens else "not recorded",
                " to ".join(f"{rate:g}" for rate in dict.fromkeys((rates[0], rates[-1]))),
                f"{_duration(sum(seconds))}{_of_some(seconds, own)}" if seconds else "not recorded",
            ]
        )
    return _markdown(table)


def _of_some(known: list, stages: list[TrainingStage]) -> str:
    """Says of a sum how many stages it leaves out because they did not record it."""
    return f" ({len(stages) - len(known)} not recorded)" if len(known) < len(stages) else ""


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{seconds / 3600:.1f} hours" if seconds >= 3600 else f"{max(1, round(seconds / 60))} minutes"


def _longest(stages: list[TrainingStage], config: ICAEConfig) -> int | None:
    """Tokens of the longest contexts trained on, as far as the settings say; `None` if triples had no limit."""
    lengths = [0]
    for stage in stages:
        tunes, settings = stage.name == "ICAE SFT", stage.settings
        if "longest_context" in settings:  # of samples that were prepared elsewhere
            lengths.append(settings["longest_context"])
            continue
        if tunes and settings:
            if settings.get("max_context_length") is None:
                return None
            lengths.append(settings["max_context_length"])
        if not tunes or settings.get("pretraining_share"):
            lengths.append(settings.get("max_spans", 0) * config.span_length)
    return max(lengths) or None


def _provenance(evaluation: Evaluation) -> str:
    """How a table was made."""
    samples = f"{evaluation.samples:,} held-out samples, " if evaluation.samples is not None else ""
    slots = f" in {evaluation.slots:,} slots" if evaluation.slots is not None else ""
    commit = f", commit {evaluation.commit[:10]}" if evaluation.commit else ""
    size = f"{samples}{evaluation.context_tokens:,} context tokens{slots}"
    return f"{size}; `{evaluation.command}`{commit}, {evaluation.date}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="icae card", description="Writes the model card of a saved ICAE.")
    parser.add_argument("folder", type=Path, help="a saved ICAE; its README.md is written")
    parser.add_argument("--results", type=Path, help="folder of results to take over into its icae_card.json first")
    parser.add_argument("--repo-id", help="where the model will lie on the Hub")
    parser.add_argument("--revision", help="commit or tag that the quickstart pins")
    arguments = parser.parse_args(argv)
    if is_changed(card := arguments.folder / "README.md"):
        raise ValueError(
            f"Expected no card, or one as this command wrote it, got {card}, which somebody changed; move it."
        )
    write_card(arguments.folder, arguments.results, repo_id=arguments.repo_id, revision=arguments.revision)
    print(card)


if __name__ == "__main__":
    main()
