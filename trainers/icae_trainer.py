"""What both training stages share: an ICAE inside TRL's trainer."""

import tempfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from huggingface_hub import CommitInfo
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback
from transformers.trainer_utils import HubStrategy
from transformers.utils import PushInProgress, logging
from trl import SFTTrainer

from icae.hub_upload import (
    assemble,
    check,
    check_base_id,
    check_training_state,
    training_state,
    upload,
    verify,
)
from icae.model_cards import write_card
from icae.model_cards.callback import CardCallback
from icae.model_cards.card import PAPER, TAGS
from icae.modeling_icae import ICAEForConditionalGeneration, ICAEOutput


logger = logging.get_logger(__name__)
SHORT_NAMES = {"autoencoding": "ae", "continuation": "lm", "instruction": "response"}
GROUPS = {"memory_embeddings": "slots", "task_embeddings": "tasks"}  # all others: the adapter


class ICAETrainer(SFTTrainer):
    """
    Base of [`ICAEPretrainingTrainer`] and [`ICAESFTTrainer`], which prepare data and weigh the losses.

    Besides the loss, it logs in training: the loss of each task, the norm of the slots and, per group of trained
    tensors, of the clipped gradients, and the context tokens seen (`num_tokens`). In evaluation: the loss and
    teacher-forced accuracy of each task, and every loss with **another text's slots** (the control: far above, or the
    slots are not read).

    Args:
        model ([`ICAEForConditionalGeneration`]):
            The model, from `from_base` or from `from_pretrained(..., is_trainable=True)`.
        args ([`ICAEPretrainingConfig`] or [`ICAESFTConfig`]):
            The arguments.
        train_dataset, eval_dataset (`Dataset` or `IterableDataset`):
            The data, as rows of text or already prepared.
        processing_class (`PreTrainedTokenizerBase`, *optional*):
            The tokenizer, by default the model's.
        callbacks, optimizers:
            As in `transformers.Trainer`.

    `trainer.card` ([`CardCallback`]) keeps what the model card states; licence, language and data can be set there.
    """

    _tag_names = TAGS
    _paper = PAPER
    model: ICAEForConditionalGeneration
    push_in_progress: PushInProgress | None
    _collator: Callable[[], Any]

    def __init__(
        self,
        model: ICAEForConditionalGeneration,
        args: Any,
        train_dataset: Dataset | IterableDataset,
        eval_dataset: Dataset | IterableDataset | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers=(None, None),
        peft_config=None,
    ):
        if peft_config is not None:
            raise ValueError(
                "Expected no `peft_config`: an ICAE brings its own adapter, and a second one around the whole model "
                "would also change the frozen decoder. Set `lora_r`, `lora_alpha` and `lora_target_modules` in "
                "`ICAEConfig`."
            )
        if not any(parameter.requires_grad for parameter in model.trainable_parameters().values()):
            raise ValueError("Expected a trainable model, got a frozen one; load it with `is_trainable=True`.")
        model.tokenizer = processing_class or model.tokenizer
        train_dataset = self._prepare(train_dataset, model, args, training=True)
        if eval_dataset is not None:
            eval_dataset = self._prepare(eval_dataset, model, args, training=False)
        self.card = CardCallback(self)
        self._uploads = ThreadPoolExecutor(max_workers=1)
        super().__init__(
            model=model,
            args=args,
            data_collator=self._collator(),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=model.tokenizer,
            callbacks=[*(callbacks or []), _GradientNorms(self), self.card],
            optimizers=optimizers,
        )
        # SFTTrainer replaces `forward` by one that knows only plain language models; the class's own comes back.
        self.model.__dict__.pop("forward", None)

    @staticmethod
    def _prepare(dataset, model: ICAEForConditionalGeneration, args, training: bool):
        """The samples that the collator takes."""
        raise NotImplementedError

    def _weights(self, inputs: dict[str, Any]) -> dict[str, float]:
        """How the losses are weighed: arguments of the model's forward method."""
        raise NotImplementedError

    def _generation_metrics(self, dataset) -> dict[str, float]:
        """Metrics of texts that are really written."""
        return {}

    def _position_metrics(self, outputs: ICAEOutput) -> dict[str, float]:
        """Metrics by the position in the text."""
        return {}

    # ------------------------------------------------------------------------------------------------------- training

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs: ICAEOutput = model(**inputs, **self._weights(inputs))
        if self.model.training:
            metrics = self._metrics["train"]
            for task, loss in outputs.task_losses.items():
                metrics[f"{SHORT_NAMES[task]}_loss"].append(loss.item())
            slots = outputs.memory.slots.detach()[outputs.memory.mask]
            metrics["slot_norm"].append(slots.norm(dim=-1, dtype=torch.float32).mean().item())
            # In the trainer's state, which is saved, so that the count goes on after a resume.
            tokens = self.accelerator.gather(inputs["context_mask"].sum()).sum().item()
            self.state.num_input_tokens_seen += tokens
            metrics["num_tokens"] = [self.state.num_input_tokens_seen]
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    # ----------------------------------------------------------------------------------------------------- evaluation

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        self.model.eval()
        self._metrics["eval"].clear()
        self._metrics["eval"]["num_tokens"] = [self.state.num_input_tokens_seen]
        for name, value in self._generation_metrics(dataset).items():
            self._metrics["eval"][name].append(value)
        # The metrics join the logs in SFTTrainer.log, with the prefix "eval_".
        return Trainer.evaluate(self, eval_dataset, ignore_keys=ignore_keys, metric_key_prefix=metric_key_prefix)

    @torch.no_grad()
    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        outputs: ICAEOutput = model(**inputs, **self._weights(inputs))
        metrics = self._metrics["eval"]
        for task, loss in outputs.task_losses.items():
            metrics[f"{SHORT_NAMES[task]}_loss"].append(loss.item())
        for task, mask in outputs.token_masks.items():
            accuracy = outputs.token_correct[task][mask].float().mean().item()
            metrics[f"{SHORT_NAMES[task]}_accuracy"].append(accuracy)
        for name, value in self._position_metrics(outputs).items():
            metrics[name].append(value)
        if (other := _rows_of_other_texts(inputs["context_ids"], inputs["context_mask"])) is not None:
            outputs_other = model(**inputs, memory=outputs.memory[other], **self._weights(inputs))
            for task, loss in outputs_other.task_losses.items():
                metrics[f"{SHORT_NAMES[task]}_loss_other_text"].append(loss.item())
        return outputs.loss, None, None

    # ---------------------------------------------------------------------------------------------------- checkpoints

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        (model or self.model).load_icae_weights(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        self.model.load_icae_weights(self.state.best_model_checkpoint)

    # ------------------------------------------------------------------------------------------------------- the Hub

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        check_base_id(self.model.config)  # now, not after hours of training
        if private is not None:
            self.args.hub_private_repo = private  # transformers 5.19 has no argument for it
        super().init_hf_repo(token=token)

    def push_to_hub(
        self,
        commit_message: str = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        *,
        create_pr: bool = False,
        commit_description: str | None = None,
        base: str | None = None,
    ) -> CommitInfo | Future | None:
        """
        Saves the model to `args.output_dir` and pushes it as `icae push` does: complete, checked, in one commit. What
        else lies in the folder stays here.

        Args:
            commit_message, blocking, token, revision, private:
                As in `transformers.Trainer`.
            create_pr, commit_description:
                As in [`~icae.hub_upload.upload`].
            base (`str`, *optional*):
                Folder of the base, see [`~icae.hub_upload.verify`].

        Returns:
            `CommitInfo`, or a `Future` of it if not `blocking`; `None` in other processes than the first.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        replace(self.card.facts(), repo_id=self.hub_model_id).save(self.args.output_dir)
        write_card(self.args.output_dir)
        bundle = self._bundle(self.args.output_dir, base)
        self._finish_current_push()
        job = self._upload(
            bundle,
            token=token or self.args.hub_token,
            revision=revision or self.args.hub_revision,
            commit_message=commit_message,
            commit_description=commit_description,
            create_pr=create_pr,
        )
        return job.result() if blocking else job

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # Trainer's own copies and pushes files whose names it knows, without slots and adapter.
        strategy = self.args.hub_strategy
        running = [job for job in self.push_in_progress.jobs if not job.done()] if self.push_in_progress else []
        skipped = running and not self.args.hub_always_push
        if not self.is_world_process_zero() or strategy == HubStrategy.END or skipped:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        where = {
            HubStrategy.CHECKPOINT: "last-checkpoint",
            HubStrategy.ALL_CHECKPOINTS: Path(checkpoint_folder).name,
        }.get(strategy)
        self.card.facts().save(checkpoint_folder)
        subfolders = {}
        try:
            if where:
                subfolders[where] = training_state(checkpoint_folder)
                check_training_state(subfolders[where])
            bundle = self._bundle(checkpoint_folder)
        except ValueError as error:
            _warn(error)
            return
        job = self._upload(
            bundle,
            token=self.args.hub_token,
            revision=self.args.hub_revision,
            commit_message=f"Training in progress, step {self.state.global_step}",
            subfolders=subfolders,
        )
        job.add_done_callback(_warn_if_failed)
        self.push_in_progress = PushInProgress([*running, job])

    def _bundle(self, checkpoint: str, base: str | None = None) -> tempfile.TemporaryDirectory:
        """A checkpoint in the layout of the Hub, checked and verified."""
        bundle = tempfile.TemporaryDirectory()
        assemble(checkpoint, bundle.name, tokenizer=self.model.tokenizer, repo_id=self.hub_model_id)
        check(bundle.name)
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):  # there, one process alone cannot run the model
            verify(bundle.name, self.model, base=base)
        return bundle

    def _upload(self, bundle: tempfile.TemporaryDirectory, **kwargs) -> Future:
        """Uploads in the background, one push after the other."""

        def upload_and_remove() -> CommitInfo:
            with bundle:
                return upload(bundle.name, self.hub_model_id, **kwargs)

        return self._uploads.submit(upload_and_remove)

    def create_model_card(self, *args, **kwargs) -> None:
        """Writes the card of an ICAE, from the facts that [`CardCallback`] keeps; arguments are not needed."""
        if self.is_world_process_zero():
            self.card.write_card()


def _rows_of_other_texts(context_ids: torch.Tensor, context_mask: torch.Tensor) -> list[int] | None:
    """For each row of a batch the next one with another context; None if a row has none."""
    rows = len(context_ids)
    contexts = [ids[mask.bool()].tolist() for ids, mask in zip(context_ids, context_mask, strict=True)]
    others = []
    for row, context in enumerate(contexts):
        behind = [(row + step) % rows for step in range(1, rows)]
        other = next((one for one in behind if contexts[one] != context), None)
        if other is None:
            return None
        others.append(other)
    return others


def _warn_if_failed(push: Future) -> None:
    if error := push.exception():
        _warn(error)


def _warn(error: BaseException) -> None:
    """Training goes on; what failed to go out lies in the checkpoint's folder."""
    logger.warning(f"A push to the Hub failed, the checkpoint is only in `output_dir`: {error}")


class _GradientNorms(TrainerCallback):
    """Logs the norm of the clipped gradients of each group of trained tensors, at logging steps."""

    def __init__(self, trainer: ICAETrainer):
        self.trainer = trainer

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if (state.global_step + 1) % args.logging_steps:
            return
        groups: dict[str, list[torch.Tensor]] = {}
        for name, parameter in self.trainer.model.trainable_parameters().items():
            if parameter.grad is not None:
                groups.setdefault(GROUPS.get(name, "adapter"), []).append(parameter.grad)
        for group, gradients in groups.items():
            norm = torch.nn.utils.get_total_norm(gradients).item()
            self.trainer._metrics["train"][f"grad_norm_{group}"].append(norm)


def last_checkpoint(output_dir: str) -> str | None:
    """The newest checkpoint in a training folder."""
    found = sorted(Path(output_dir).glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    return str(found[-1]) if found else None
