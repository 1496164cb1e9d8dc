"""Keeps the facts of a training run beside its checkpoints, so that the card is filled while a model is trained."""

import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import TrainerCallback
from trl import SFTConfig

from icae.evaluation.record import hardware, versions

from .card import MEASURES, put_card, render
from .facts import TRAINED, CardFacts, DataSource, TrainingStage


# Own fields of the training arguments that have no part in the training itself.
PREPARATION = (
    *("max_spans", "short_share", "continuation_length", "shuffled_share", "max_context_length", "max_prompts"),
    "pretraining_share",
)
NOT_SETTINGS = ("eval_reconstructions", "eval_generations", "max_new_tokens", "text_column")


class CardCallback(TrainerCallback):
    """
    Writes `icae_card.json` beside each checkpoint and into `output_dir`, and at the end the card itself.

    The stages of the checkpoint that a run goes on from are carried over. What a trainer cannot know
    can be set before training:

    ```python
    trainer.card.license = "apache-2.0"
    trainer.card.language = ["en"]
    trainer.card.data = [DataSource("OpenStax textbooks", license="CC BY 4.0")]
    ```

    Args:
        trainer ([`ICAETrainer`]):
            The trainer whose run it describes.
    """

    def __init__(self, trainer):
        self.trainer = trainer
        self.name: str | None = None
        self.license: str | None = None
        self.language: list[str] = []
        self.tags: list[str] = []
        self.data: list[DataSource] = []
        self._earlier = CardFacts()
        self._started_from: str | None = None
        self._start = 0.0
        self._seconds: float | None = None  # of this run before it was interrupted; None: not known
        self._final: TrainingStage | None = None  # when training is over

    def on_init_end(self, args, state, control, **kwargs):
        source = self.trainer.model.name_or_path
        self._earlier = CardFacts.of(self.trainer.model)
        if source and not self._earlier.stages:
            self._started_from = Path(source).name if Path(source).is_dir() else source

    def on_train_begin(self, args, state, control, **kwargs):
        if self._final and state.global_step == 0:  # the second run of this trainer, from the end of its first
            self._earlier = CardFacts.of(self.trainer.model)
        self._start, self._seconds, self._final = time.monotonic(), 0.0, None
        self.facts()  # what was set is refused now, not after hours
        if state.global_step > 0:  # resumed
            interrupted = CardFacts.load(Path(args.output_dir, f"checkpoint-{state.global_step}")).stages
            self._seconds = interrupted[-1].seconds if interrupted else None

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            for folder in (Path(args.output_dir, f"checkpoint-{state.global_step}"), args.output_dir):
                self.facts().save(folder)

    def on_train_end(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            best = args.load_best_model_at_end and state.best_model_checkpoint
            # Of the weights that are now in the model.
            self._final = (CardFacts.load(best).stages if best else [self._stage()])[-1]
            self.facts().save(args.output_dir)
            self.write_card()
        self._final = self._final or self._stage()
        TRAINED[self.trainer.model] = self.facts()

    def on_evaluate(self, args, state, control, **kwargs):
        if self._final:  # after training, of the weights that it has come to
            found = _evaluation_at(state.log_history, state.global_step)
            self._final = replace(self._final, evaluation=found or self._final.evaluation)
            TRAINED[self.trainer.model] = self.facts()

    def facts(self) -> CardFacts:
        """
        All that is known by now: earlier stages, this one, and what was set.

        Raises:
            `ValueError`: if licence or language were set to what the Hub does not take.
        """
        args, known = self.trainer.args, self._earlier
        stages = list(known.stages)
        if self.trainer.state.global_step > 0:
            stages.append(replace(self._final or self._stage(), data=list(self.data)))
        # Results were measured before this stage, so they are not carried over.
        return replace(
            known,
            name=self.name,
            repo_id=args.hub_model_id if args.hub_model_id and "/" in args.hub_model_id else None,
            branch=args.hub_revision,
            revision=None,
            license=self.license or known.license,
            language=self.language or known.language,
            tags=self.tags or known.tags,
            stages=stages,
            reconstruction=None,
            answers=None,
        )

    def write_card(self) -> None:
        """Writes `README.md` into `output_dir`, unless somebody has changed it."""
        folder = self.trainer.args.output_dir
        text = render(self.facts().named(folder), self.trainer.model.config)
        put_card(folder, text)

    def _stage(self) -> TrainingStage:
        args, state = self.trainer.args, self.trainer.state
        return TrainingStage(
            name=self.trainer._name,
            steps=state.global_step,
            # `auto_find_batch_size` may have lowered what the arguments say.
            rows_per_step=(state.train_batch_size or args.train_batch_size)
            * args.gradient_accumulation_steps
            * args.world_size,
            learning_rate=float(args.learning_rate),
            schedule=str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
            warmup_steps=args.get_warmup_steps(state.max_steps),
            optimizer=str(getattr(args.optim, "value", args.optim)),
            seed=args.seed,
            context_tokens=int(state.num_input_tokens_seen),
            settings=_settings(args, self.trainer.train_dataset if self.trainer.was_prepared else None),
            started_from=self._started_from,
            hardware=_hardware(args.world_size),
            seconds=None if self._seconds is None else round(self._seconds + time.monotonic() - self._start, 1),
            versions=versions(),
            evaluation=_evaluation_at(state.log_history, state.global_step),
        )


def _settings(args, samples: Dataset | IterableDataset | None = None) -> dict[str, Any]:
    """
    Fields that the trainer's own arguments add to TRL's, as far as they are used: of `samples`, which were prepared
    elsewhere, not those that the trainer would have prepared them with.
    """
    left_out = {field.name for field in fields(SFTConfig)} | {
        *NOT_SETTINGS,
        *(PREPARATION if samples is not None else ()),
    }
    settings = {
        field.name: value
        for field in fields(args)
        if field.name not in left_out
        and ((value := getattr(args, field.name)) not in (None, False, 0) or field.name == "autoencoding_weight")
    }
    if isinstance(samples, Dataset) and "length" in samples.column_names:
        settings["longest_context"] = max(samples["length"])
    if "preference_weight" not in settings:
        settings.pop("beta", None)
    return settings


def _hardware(processes: int) -> str:
    found = hardware()
    one = found["accelerator"] or f"{found['processor']} (CPU), {found['cores_used']} cores"
    one = one.replace(" 1 cores", " 1 core")
    return f"{processes} × {one}" if processes > 1 else one


def _evaluation_at(history: list[dict[str, float]], step: int) -> dict[str, float]:
    """The last evaluation, if it was at this step: an earlier one is of other weights."""
    # "loss" is the weighted sum of a trainer's tasks, which only that trainer can compare.
    known = {f"eval_{name}": name for name in MEASURES if name != "loss"}
    for entry in reversed(history):
        found = {name: float(entry[key]) for key, name in known.items() if key in entry}
        if found:
            return found if entry["step"] == step else {}
    return {}
