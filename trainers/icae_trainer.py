"""What both training stages share: an ICAE inside TRL's trainer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback
from trl import SFTTrainer

from icae.modeling_icae import ICAEForConditionalGeneration, ICAEOutput


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
    """

    _tag_names = ("icae", "context-compression", "custom_code")
    _paper = {
        "title": "In-context Autoencoder for Context Compression in a Large Language Model",
        "id": "2307.06945",
        # docstyle-ignore
        "citation": """@inproceedings{ge2024incontext,
  title = {In-context Autoencoder for Context Compression in a Large Language Model},
  author = {Tao Ge and Jing Hu and Lei Wang and Xun Wang and Si-Qing Chen and Furu Wei},
  booktitle = {International Conference on Learning Representations},
  year = {2024},
}""",
    }
    model: ICAEForConditionalGeneration
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
        super().__init__(
            model=model,
            args=args,
            data_collator=self._collator(),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=model.tokenizer,
            callbacks=[*(callbacks or []), _GradientNorms(self)],
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
        rows = len(outputs.memory)
        if rows > 1:
            other = outputs.memory[[*range(1, rows), 0]]
            outputs_other = model(**inputs, memory=other, **self._weights(inputs))
            for task, loss in outputs_other.task_losses.items():
                metrics[f"{SHORT_NAMES[task]}_loss_other_text"].append(loss.item())
        return outputs.loss, None, None

    # ---------------------------------------------------------------------------------------------------- checkpoints

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        (model or self.model).load_icae_weights(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        self.model.load_icae_weights(self.state.best_model_checkpoint)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # Trainer copies only files whose names it knows; slots and adapter would be missing in the pushed repository.
        if self.is_world_process_zero():
            self.model.save_pretrained(self.args.output_dir)
        super()._push_from_checkpoint(checkpoint_folder)

    def create_model_card(self, *args, **kwargs) -> None:
        """TRL's card would present the model as a text-generation pipeline; an ICAE card comes with `icae push`."""


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
