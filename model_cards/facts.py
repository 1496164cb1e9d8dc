"""
What a card states and the weights do not tell: `icae_card.json`, kept beside every checkpoint.

Training writes it ([`CardCallback`]), `icae card` adds results to it, and a run that goes on from a checkpoint carries
its stages over. What is unknown is `None` or empty, and the card says so in words.
"""

import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from huggingface_hub.utils import validate_repo_id
from transformers import PreTrainedModel
from transformers.utils import cached_file

from icae.modeling_icae.pretrained_icae import ADAPTER_FOLDER, SLOTS_FILE


CARD_FACTS = "icae_card.json"
# Facts of models in memory that have been trained, beyond those of the files that they were loaded from.
TRAINED: WeakKeyDictionary[PreTrainedModel, "CardFacts"] = WeakKeyDictionary()
INSTRUCTION_STAGE = "ICAE SFT"  # the name of its trainer
# What the Hub takes in a card's metadata.
LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]{2,8})*|code|multilingual")


@strict
@dataclass
class DataSource:
    """
    A data set.

    Args:
        name (`str`):
            What readers know it by.
        license (`str`, *optional*):
            Its licence, as its source states it.
        hub_id (`str`, *optional*):
            Its id on the Hub; goes into the card's metadata.
    """

    name: str
    license: str | None = None
    hub_id: str | None = None


@strict
@dataclass
class TrainingStage:
    """
    One training run.

    Args:
        name (`str`):
            The trainer: `"ICAE pretraining"` or `"ICAE SFT"`.
        steps (`int`):
            Optimizer steps.
        rows_per_step (`int`):
            Contexts per step, over all processes.
        context_tokens (`int`, *optional*):
            Context tokens trained on.
        learning_rate (`float`), schedule (`str`), warmup_steps (`int`), optimizer (`str`), seed (`int`):
            The recipe.
        settings (`dict[str, Any]`, *optional*):
            Those of the trainer's own, for example `autoencoding_weight`.
        data (`list[DataSource]`, *optional*):
            What it was trained on.
        started_from (`str`, *optional*):
            The checkpoint it went on from, where that has no facts of its own to carry over.
        hardware (`str`, *optional*), seconds (`float`, *optional*):
            What it ran on and how long, evaluations included.
        versions (`dict[str, str]`, *optional*):
            Of Python and the libraries.
        evaluation (`dict[str, float]`, *optional*):
            The last held-out evaluation, with its controls; losses in nats per target token.
        curves (`str`, *optional*):
            Name of the file in `results/` (without `.json`, made by `icae.evaluation.curves`) that `context_tokens`
            and `evaluation` are taken from by `icae card --results`.
    """

    name: str
    steps: int
    rows_per_step: int
    learning_rate: float
    schedule: str
    warmup_steps: int
    optimizer: str
    seed: int
    context_tokens: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    data: list[DataSource] = field(default_factory=list)
    started_from: str | None = None
    hardware: str | None = None
    seconds: float | None = None
    versions: dict[str, str] = field(default_factory=dict)
    evaluation: dict[str, float] = field(default_factory=dict)
    curves: str | None = None


@strict
@dataclass
class Evaluation:
    """
    A table of results, with its controls.

    Args:
        rows (`dict[str, dict[str, float]]`):
            By what was measured (a checkpoint, or what answers were read from), the measures.
        context_tokens (`int`):
            Held-out context tokens.
        command (`str`), commit (`str`, *optional*), date (`str`):
            How it was made.
        samples (`int`, *optional*), slots (`int`, *optional*):
            Held-out rows and the slots that their contexts became.
    """

    rows: dict[str, dict[str, float]]
    context_tokens: int
    command: str
    date: str
    commit: str | None = None
    samples: int | None = None
    slots: int | None = None


@strict
@dataclass
class CardFacts:
    """
    All that a card states beside what `config.json` says.

    Args:
        name (`str`, *optional*):
            Name of the model. Default: the name of its repository or folder.
        repo_id (`str`, *optional*), branch (`str`, *optional*), revision (`str`, *optional*):
            Where it lies on the Hub, if not in its main branch, and the commit or tag that the quickstart pins.
        license (`str`, *optional*):
            Licence of adapter and slots, as the Hub spells it (`"apache-2.0"`).
        language (`list[str]`, *optional*):
            Language codes (`"en"`).
        tags (`list[str]`, *optional*):
            Tags beside those of all ICAEs.
        origin (`str`, *optional*):
            Where the weights come from, if no stage made them.
        limits (`list[str]`, *optional*):
            Limits of this model, besides those of all ICAEs.
        stages (`list[TrainingStage]`, *optional*):
            The runs that made it, first to last.
        reconstruction (`Evaluation`, *optional*):
            Held-out text from its slots; the last row is this model.
        answers (`Evaluation`, *optional*):
            Answers from slots and from other things; the row `"icae"` is this model.

    Raises:
        `ValueError`: if licence or language are not written as on the Hub.
    """

    name: str | None = None
    repo_id: str | None = None
    branch: str | None = None
    revision: str | None = None
    license: str | None = None
    language: list[str] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)
    origin: str | None = None
    limits: list[str] = field(default_factory=list)
    stages: list[TrainingStage] = field(default_factory=list)
    reconstruction: Evaluation | None = None
    answers: Evaluation | None = None

    def __post_init__(self):
        if self.license is not None and not LICENSE.fullmatch(self.license):
            raise ValueError(
                f"Expected a licence as the Hub spells it, for example 'apache-2.0' or 'other', got {self.license!r}."
            )
        for language in self.language:
            if not LANGUAGE.fullmatch(language):
                raise ValueError(
                    "Expected languages as codes, for example 'en', 'pt-BR', 'multilingual' or 'code', got "
                    f"{language!r}."
                )

    @classmethod
    def load(cls, folder: str | Path) -> "CardFacts":
        """
        The facts beside a saved model; none are known if the folder has no file of them.

        Raises:
            `ValueError`: if the file is damaged.
        """
        file = Path(folder, CARD_FACTS)
        if not file.is_file():
            return cls()
        try:
            known = json.loads(file.read_text(encoding="utf-8"))
            for stage in known.get("stages", ()):
                stage["data"] = [DataSource(**source) for source in stage.get("data", ())]
            known["stages"] = [TrainingStage(**stage) for stage in known.get("stages", ())]
            for name in ("reconstruction", "answers"):
                known[name] = known.get(name) and Evaluation(**known[name])
            return cls(**known)
        except (ValueError, TypeError, AttributeError, StrictDataclassError) as error:
            raise ValueError(
                f"Expected facts for a model card in {str(file)!r}, got a file that does not hold them ({error}); "
                "mend it, or delete it and the card will say that they are not known."
            ) from error

    @classmethod
    def of(cls, model: PreTrainedModel) -> "CardFacts":
        """Those of its training, or beside the files that it was loaded from, in a folder or on the Hub."""
        if model in TRAINED:
            return TRAINED[model]
        source = model.name_or_path
        if is_hub_id(source):
            silent = ("_raise_exceptions_for_missing_entries", "_raise_exceptions_for_connection_errors")
            try:
                file = cached_file(source, CARD_FACTS, **dict.fromkeys(silent, False), **model._hub_kwargs)
            except OSError:  # the repository, or the folder that it was, is gone
                file = None
            source = os.path.dirname(file or "")
        return cls.load(source) if source else cls()

    def save(self, folder: str | Path) -> None:
        """Writes them beside a saved model."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        Path(folder, CARD_FACTS).write_text(
            json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )

    def at(self, repo_id: str, branch: str | None = None) -> "CardFacts":
        """The facts of the same model at another place."""
        revision = self.revision if repo_id == self.repo_id else None  # a commit is one repository's
        return replace(self, repo_id=repo_id, branch=branch, revision=revision)

    def named(self, folder: str | Path) -> "CardFacts":
        """With a name, by default that of the repository or of the folder."""
        return replace(self, name=self.name or Path(self.repo_id or Path(folder).resolve()).name)

    @property
    def answers_prompts(self) -> bool | None:
        """Whether it was trained to answer prompts; `None` if its training is not known."""
        return any(stage.name == INSTRUCTION_STAGE for stage in self.stages) if self.stages else None

    def add_results(self, results: str | Path, model: str | Path) -> None:
        """
        Takes over what `icae evaluate reconstruction`, `icae evaluate answers` and `icae.evaluation.curves` wrote.

        Args:
            results (`str` or `Path`):
                Folder with `reconstruction.json` and `answers.json`, either of which may be missing, and with the
                `curves` of stages.
            model (`str` or `Path`):
                Folder of the saved ICAE that they must be of.

        Raises:
            `ValueError`: if a file that a stage names is missing, if there is none at all, or if one is damaged or of
                another model.
        """
        folder = Path(results)
        found = {
            name: _read(folder / f"{name}.json")
            for name in ("reconstruction", "answers", *(stage.curves for stage in self.stages if stage.curves))
            if (folder / f"{name}.json").is_file()
        }
        missing = [stage.curves for stage in self.stages if stage.curves and stage.curves not in found]
        if missing or not found:
            raise ValueError(
                f"Expected results in {str(folder)!r}, found no {missing[0] if missing else 'reconstruction'}.json; "
                "make them with `icae evaluate` and `python -m icae.evaluation.curves`."
            )
        own = weights_digest(model)
        self.reconstruction = self.answers = None
        for name, rows in (("reconstruction", "models"), ("answers", "summary")):
            if name not in found:
                continue
            file = folder / f"{name}.json"
            try:
                evaluation = _evaluation(found[name], rows)
                weights = [*found[name].get("weights", {}).values()][-1:]  # the last row is this model
            except (KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"Expected what `icae evaluate {name}` writes in {file}, got {error!r}.") from error
            if weights != [own]:
                raise ValueError(
                    f"Expected results of the model in {str(model)!r} (weights {own}) in {file}, got those of another "
                    f"one ({', '.join(weights) or 'not recorded'}); make them with `icae evaluate {name}`."
                )
            setattr(self, name, evaluation)
        for stage in self.stages:
            if stage.curves:
                (run,) = found[stage.curves]["runs"].values()
                stage.context_tokens = int(run["context_tokens"][-1])
                stage.evaluation = {
                    name: values[-1]
                    for name, values in run.items()
                    if name not in ("config", "trained", "context_tokens")
                }


def weights_digest(source: str | Path, **hub_kwargs) -> str:
    """What the weights of a saved ICAE are recognised by, wherever it lies: of its files of slots and adapter."""
    digest = hashlib.sha256()
    for name in (SLOTS_FILE, f"{ADAPTER_FOLDER}/adapter_model.safetensors"):
        with open(cached_file(str(source), name, **hub_kwargs), "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def is_hub_id(name: str | None) -> bool:
    """Whether a model of this name is looked for on the Hub: it is the id of a repository, and no folder here."""
    try:
        validate_repo_id(name or "")
    except HFValidationError:
        return False
    return not os.path.exists(name or "")


def _read(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"Expected results in {file}, got a damaged file ({error}).") from error


def _evaluation(record: dict[str, Any], rows: str) -> Evaluation:
    made_by = record["made_by"]
    return Evaluation(
        rows={
            name: {measure: float(value) for measure, value in row.items() if isinstance(value, int | float)}
            for name, row in record[rows].items()
        },
        context_tokens=record["context_tokens"],
        command=made_by["command"],
        date=made_by["date"],
        commit=made_by["commit"],
        samples=record.get("rows") or record["arguments"].get("samples"),
        slots=record.get("slots"),
    )
