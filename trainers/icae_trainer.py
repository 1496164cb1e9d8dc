"""What both training stages share: an ICAE inside TRL's trainer."""

import os
import tempfile
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from huggingface_hub import CommitInfo
from torch.utils.data import Sampler
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback
from transformers.trainer_pt_utils import LengthGroupedSampler, get_length_grouped_indices
from transformers.trainer_utils import HubStrategy
from transformers.utils import PushInProgress, logging
from trl import SFTTrainer

from icae.configuration_icae import ICAEConfig
from icae.hub_upload import (
    assemble,
    check,
    check_base_id,
    check_training_state,
    repository,
    training_state,
    upload,
    verify,
)
from icae.model_cards import DataSource, write_card
from icae.model_cards.callback import CardCallback
from icae.model_cards.card import PAPER, TAGS
from icae.model_cards.facts import is_hub_id
from icae.modeling_icae import ICAEForConditionalGeneration, ICAEMemory, ICAEOutput
from icae.modeling_icae.pretrained_icae import bases_differ, check_folder

from .average import ARCHITECTURE
from .training_config import ICAETrainingConfig


logger = logging.get_logger(__name__)
SHORT_NAMES = {"autoencoding": "ae", "continuation": "lm", "instruction": "response"}
ENDS = ("eos_token_id", "bos_token_id", "pad_token_id")
# What is counted of an optimizer step: targets of each task, pairs of responses, contexts, and those of documents.
COUNTED = (*SHORT_NAMES, "pairs", "contexts", "documents")
GROUPS = {"memory_embeddings": "slots", "task_embeddings": "tasks"}  # all others: the adapter


class ICAETrainer(SFTTrainer):
    """
    Base of [`ICAEPretrainingTrainer`] and [`ICAESFTTrainer`], which prepare data and weigh the losses.

    The loss of an optimizer step is the same however its rows are cut into batches, by gradient accumulation or for
    several processes: each task's loss is a mean over all of its targets in the step. (With
    `average_tokens_across_devices=False`, over those of each process.)

    Besides the loss, it logs in training: the loss of each task, the norm of the slots and, per group of trained
    tensors, of the clipped gradients, and the context tokens seen (`num_tokens`). In evaluation: the loss and
    teacher-forced accuracy of each task, and every loss with **another text's slots** (the control, of batches that
    hold another text: far above, or the slots are not read).

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

    Raises:
        `TypeError`: if the model is a name, `args` are another trainer's or none, or the data is no data set.
        `ValueError`: if the model is frozen, a `peft_config` or several sets to evaluate on are given, one process has
            several GPUs, processes share the model by FSDP, `output_dir` holds another kind of model, or the base has
            too few positions for a context of the training data.

    `trainer.card` ([`CardCallback`]) keeps what the model card states; licence, language and data can be set there.

    With `push_to_hub=True`, each checkpoint that is pushed is first loaded by another process, as
    [`~icae.hub_upload.verify`] says: training waits for that, and the base is in memory once more, on the CPU. Under
    DeepSpeed, where one process alone cannot run the model, pushes are checked but not verified.
    """

    _tag_names = TAGS
    _paper = PAPER
    model: ICAEForConditionalGeneration
    push_in_progress: PushInProgress | None = None
    _prefix = "eval"  # of the metrics of an evaluation
    _step: dict[str, int] | None = None  # what the optimizer step has, see `COUNTED`
    _collator: Callable[[], Any]
    _arguments_class: type[ICAETrainingConfig]

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
        if isinstance(model, str):
            raise TypeError(
                f"Expected a model, got the name {model!r}; load it with "
                "`ICAEForConditionalGeneration.from_pretrained(..., is_trainable=True)`."
            )
        if not isinstance(args, self._arguments_class):
            raise TypeError(f"Expected `args` to be an {self._arguments_class.__name__}, got {type(args).__name__}.")
        if not any(parameter.requires_grad for parameter in model.trainable_parameters().values()):
            raise ValueError("Expected a trainable model, got a frozen one; load it with `is_trainable=True`.")
        if args.n_gpu > 1:
            raise ValueError(
                f"Expected one GPU for each process, got {args.n_gpu} for one: start it with `accelerate launch`, or "
                "choose one GPU with CUDA_VISIBLE_DEVICES."
            )
        model.tokenizer = processing_class or model.tokenizer
        check_folder(Path(args.output_dir))
        _check_rows(train_dataset, "train_dataset")
        self.was_prepared = "context_ids" in (train_dataset.column_names or ())
        train_dataset = self._prepare(train_dataset, model, args, training=True)
        if isinstance(train_dataset, Dataset) and not len(train_dataset):
            raise ValueError("Expected samples to train on, got none: no row has a target; see what is in the data.")
        self._check_positions(train_dataset, model, args)
        if eval_dataset is not None:
            eval_dataset = self._prepare_held_out(eval_dataset, model, args)
        if args.accelerator_config.dispatch_batches is None:
            # Rows of a batch differ in length: what one process reads of a stream cannot be dealt out.
            args.accelerator_config.dispatch_batches = False
        self.card = CardCallback(self)
        self._uploads = ThreadPoolExecutor(max_workers=1)
        super().__init__(
            model=model,
            args=args,
            data_collator=self._collator(),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=model.tokenizer,
            callbacks=[*(callbacks or []), _AsPrepared(self), _GradientNorms(self), _BestCheckpoint(), self.card],
            optimizers=optimizers,
        )
        if self.is_fsdp_enabled:
            raise ValueError(
                "Expected DDP or DeepSpeed ZeRO-2 with several processes, got FSDP: it gathers a layer's weights when "
                "the gradient of its output comes, and those of slots come through the cache. With `accelerate launch "
                "--multi_gpu` each process has the frozen base; load a large one in 4 bits (`quantization_config` of "
                "`from_base`)."
            )
        # SFTTrainer replaces `forward` by one that knows only plain language models; the class's own comes back.
        self.model.__dict__.pop("forward", None)

    def _prepare(self, dataset, model: ICAEForConditionalGeneration, args, training: bool):
        """The samples that the collator takes."""
        raise NotImplementedError

    def _prepare_held_out(self, dataset, model: ICAEForConditionalGeneration, args):
        if isinstance(dataset, dict):
            raise ValueError(
                f"Expected one `eval_dataset`, got {len(dataset)} by name ({', '.join(map(str, dataset))}); join "
                "them, or call `trainer.evaluate` with each."
            )
        _check_rows(dataset, "eval_dataset")
        samples = self._prepare(dataset, model, args, training=False)
        if isinstance(samples, Dataset) and not len(samples):
            raise ValueError("Expected held-out samples, got none: no row has a target; see what is in the data.")
        return samples

    def _document_lengths(self, dataset: Dataset) -> Iterator[int]:
        """Tokens of the contexts that are written out and go on in training."""
        return iter(dataset["length"])

    def _check_positions(self, dataset, model: ICAEForConditionalGeneration, args) -> None:
        """
        Raises a `ValueError`, before hours of training, if the base has not enough positions to write the longest
        context out and to go on behind it. (Streamed ones are seen when they come.)
        """
        positions = model.config.num_positions
        if positions is None or not isinstance(dataset, Dataset) or "length" not in dataset.column_names:
            return
        if _last_position(model.config, max(dataset["length"], default=0), args) < positions:
            return
        longest = max(self._document_lengths(dataset), default=0)
        if (last := _last_position(model.config, longest, args)) >= positions:
            raise ValueError(
                f"Expected contexts that the base, with {positions} positions, can write out and go on behind, got "
                f"one of {longest} tokens, which takes {last + 1}; lower `max_spans` or `continuation_length`."
            )

    def _weights(self, tasks: Collection[str], share: float) -> dict[str, float]:
        """How the losses of these tasks are weighed when a share of the contexts is of documents, not of triples."""
        weight = self.args.autoencoding_weight
        if weight and "continuation" not in tasks:
            weight = 1.0  # one task alone has the whole weight
        return {"autoencoding": share * weight, "continuation": share * (1 - weight), "instruction": 1 - share}

    def _held_out_share(self) -> float:
        """What the losses of documents weigh in that of held-out data."""
        return 1.0

    def _training_options(self) -> dict[str, float]:
        """Further arguments of the model's forward method."""
        return {}

    def _generation_metrics(self, dataset) -> dict[str, float]:
        """Metrics of texts that are really written."""
        return {}

    def _hits_by_place(self, outputs: ICAEOutput, masks: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Where the most likely token is the target, of those in the masks, for metrics by the place in the text."""
        return {}

    # ------------------------------------------------------------------------------------------------------- training

    def _get_train_sampler(self, train_dataset=None) -> Sampler | None:
        sampler = super()._get_train_sampler(train_dataset)
        if isinstance(sampler, LengthGroupedSampler):
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            return _ShuffledGroupsSampler(sampler.lengths, sampler.batch_size * self.args.world_size, seed)
        return sampler

    def train(self, *args, **kwargs):
        configs = (self.model.config.text_config, self.model.generation_config)
        self._ends = [(config, {name: getattr(config, name, None) for name in ENDS}) for config in configs]
        if not self.is_deepspeed_enabled:
            # An evaluation before has prepared the model without DDP, and it would stay so.
            self.accelerator._models = [model for model in self.accelerator._models if model is not self.model]
            self.model.__dict__.pop("_is_accelerate_prepared", None)
        try:
            return super().train(*args, **kwargs)
        finally:
            self._step = None

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, number = super().get_batch_samples(epoch_iterator, num_batches, device)
        counts = torch.stack([_counts(batch) for batch in batches] or [torch.zeros(len(COUNTED))]).sum(dim=0)
        if self.args.average_tokens_across_devices:
            counts = self.accelerator.reduce(counts.to(device), reduction="sum")
        self._step = dict(zip(COUNTED, counts.tolist(), strict=True))
        return batches, number

    def _weights_in_step(self, inputs: dict[str, Any]) -> tuple[dict[str, float], dict[str, float]]:
        """
        How the tasks of an optimizer step are weighed, and by how much a batch's means over what is counted must be
        multiplied so that their mean over the batches and processes is that of the step.
        """
        own = dict(zip(COUNTED, _counts(inputs).tolist(), strict=True))
        step, batches = (self._step, self.current_gradient_accumulation_steps) if self._step else (own, 1)
        if self._step and self.args.average_tokens_across_devices:
            batches *= self.args.world_size
        factors = {name: batches * own[name] / step[name] for name in COUNTED if step[name]}
        return self._weights(factors, step["documents"] / step["contexts"]), factors

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        weights, factors = self._weights_in_step(inputs)
        options = {f"{task}_weight": weight * factors.get(task, 0.0) for task, weight in weights.items()}
        outputs: ICAEOutput = model(**inputs, **options, **self._training_options())
        if self.model.training:
            metrics = self._metrics["train"]
            for task, name in SHORT_NAMES.items():
                if task in outputs.task_losses:
                    metrics[f"{name}_loss"].append(factors[task] * outputs.task_losses[task].item())
                elif task in factors and weights[task]:
                    metrics[f"{name}_loss"].append(0.0)  # other batches of the step have it
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
        if dataset is None:
            raise ValueError("Expected an `eval_dataset`, here or when the trainer was made, got none.")
        if eval_dataset is not None:
            dataset = eval_dataset = self._prepare_held_out(eval_dataset, self.model, self.args)
        self.model.eval()
        self._has_control, self._prefix = False, metric_key_prefix
        self._metrics["eval"].clear()
        measured = {"num_tokens": self.state.num_input_tokens_seen} | self._generation_metrics(dataset)
        for name, value in measured.items():
            self._metrics["eval"][name].append((value, 1))
        logs = Trainer.evaluate(self, eval_dataset, ignore_keys=ignore_keys, metric_key_prefix=metric_key_prefix)
        if not self._has_control:
            logger.warning(
                "No losses with another text's slots: each batch of the `eval_dataset` has one context only. Raise "
                "`per_device_eval_batch_size`, or shuffle the rows."
            )
        return logs

    def predict(self, test_dataset, ignore_keys=None, metric_key_prefix="test"):
        """As in `transformers.Trainer`, the loss of a data set as `eval_dataset` may be; without predictions."""
        samples, training = self._prepare_held_out(test_dataset, self.model, self.args), self.model.training
        output = super().predict(samples, ignore_keys=ignore_keys, metric_key_prefix=metric_key_prefix)
        if (loss := self._held_out_loss(self._held_out_means())) is not None:
            output.metrics[f"{metric_key_prefix}_loss"] = loss
        self.model.train(training)
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.model.training:
            parts = gather_object([dict(self._metrics["train"])])
            for name in sorted({name for part in parts for name in part}):
                self._metrics["train"][name] = [*chain(*(part.get(name, ()) for part in parts))]
        else:
            means = self._held_out_means()
            logs.update({f"{self._prefix}_{name}": value for name, value in means.items()})
            if (loss := self._held_out_loss(means)) is not None:
                logs[f"{self._prefix}_loss"] = loss
        super().log(logs, start_time)

    def _held_out_means(self) -> dict[str, float]:
        """
        Means of what was noted since the last time. Each process has measured its own part of the held-out data;
        decisions on the means must be the same.
        """
        parts, means = gather_object([dict(self._metrics["eval"])]), {}
        for name in sorted({name for part in parts for name in part}):
            values, counts = zip(*chain(*(part.get(name, ()) for part in parts)), strict=True)
            means[name] = sum(value * count for value, count in zip(values, counts, strict=True)) / sum(counts)
        self._metrics["eval"].clear()  # SFTTrainer gives them the prefix "eval" whatever was asked for
        return means

    def _held_out_loss(self, means: dict[str, float]) -> float | None:
        """
        The tasks' losses as they are weighed, which does not depend on the batches; `None` if there are none.
        """
        losses = {task: means[f"{name}_loss"] for task, name in SHORT_NAMES.items() if f"{name}_loss" in means}
        share = self._held_out_share() if "autoencoding" in losses or "continuation" in losses else 0.0
        weights = self._weights(losses, share if "instruction" in losses else 1.0)
        return sum(weights[task] * loss for task, loss in losses.items()) if losses else None

    @torch.no_grad()
    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        counts = dict(zip(COUNTED, _counts(inputs).tolist(), strict=True))
        reconstructs = counts["autoencoding"] > 0 and self.args.autoencoding_weight > 0
        options = {"autoencoding_weight": float(reconstructs), "continuation_weight": 1.0}
        outputs: ICAEOutput = model(**inputs, **options)
        masks = self._masks_of_own_rows(inputs, outputs)
        hits = {f"{SHORT_NAMES[task]}_accuracy": outputs.token_correct[task][mask] for task, mask in masks.items()}
        losses = {f"{SHORT_NAMES[task]}_loss": outputs.token_losses[task][mask] for task, mask in masks.items()}
        for name, found in (losses | hits | self._hits_by_place(outputs, masks)).items():
            self._count(name, found)
        other = _rows_of_other_texts(inputs["context_ids"], inputs["context_mask"])
        if other is not None and self._have_room(outputs.memory, outputs.token_masks):
            self._has_control = True
            outputs_other = model(**inputs, memory=outputs.memory[other], **options)
            for task, mask in masks.items():
                self._count(f"{SHORT_NAMES[task]}_loss_other_text", outputs_other.token_losses[task][mask])
        return outputs.loss, None, None

    def _masks_of_own_rows(self, inputs: dict[str, Any], outputs: ICAEOutput) -> dict[str, torch.Tensor]:
        """The targets of each task, without those of rows that only fill up the last batch of several processes."""
        rows, state = len(inputs["context_ids"]), self.accelerator.gradient_state
        kept = rows
        if state.end_of_dataloader and state.remainder > 0:
            kept = state.remainder - self.args.process_index * rows
        context_of = {"instruction": inputs.get("context_index")}
        masks = {}
        for task, mask in outputs.token_masks.items():
            about = context_of.get(task)
            about = torch.arange(len(mask), device=mask.device) if about is None else about
            masks[task] = mask & (about < kept)[:, None]
        return masks

    def _count(self, name: str, values: torch.Tensor) -> None:
        """Notes a metric of the evaluation, token by token: the mean of all must not depend on the batches."""
        if len(values):
            self._metrics["eval"][name].append((values.float().mean().item(), len(values)))

    def _have_room(self, memory: ICAEMemory, texts: dict[str, torch.Tensor]) -> bool:
        """Whether the base has positions for the longest text of each task behind the memory of any other row."""
        positions = self.model.config.num_positions
        return positions is None or all(
            int(self.model._text_start(memory, task).max()) + mask.shape[1] <= positions
            for task, mask in texts.items()
        )

    # ---------------------------------------------------------------------------------------------------- checkpoints

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        saved = ICAEConfig.from_pretrained(resume_from_checkpoint)
        if bases_differ(saved.base_model_fingerprint, self.model.config.base_model_fingerprint):
            raise ValueError(
                f"Expected the base that the run was begun with ({saved.base_model_fingerprint}), got another one "
                f"({self.model.config.base_model_fingerprint})."
            )
        names = [name for name in (*ARCHITECTURE, "lora_dropout") if name != "base_model_fingerprint"]
        begun, own = ({name: getattr(config, name) for name in names} for config in (saved, self.model.config))
        if odd := [name for name in names if own[name] != begun[name]]:
            raise ValueError(
                f"Expected a model as the run was begun with, {', '.join(f'{name} {begun[name]}' for name in odd)}, "
                f"got {', '.join(f'{name} {own[name]}' for name in odd)}: it would not go on exactly."
            )
        (model or self.model).load_icae_weights(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        self.model.load_icae_weights(self.state.best_model_checkpoint)

    # ------------------------------------------------------------------------------------------------------- the Hub

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Makes the repository, and refuses now, not after hours of training, what no push would be let through to."""
        check_base_id(self.model.config)
        if self.is_world_process_zero():
            _, info = repository(
                self.args.hub_model_id or Path(self.args.output_dir).absolute().name,
                private=self.args.hub_private_repo if private is None else private,
                revision=self.args.hub_revision,
                token=token or self.args.hub_token,
            )
            self.hub_model_id = info.id

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        *,
        create_pr: bool = False,
        commit_description: str | None = None,
        base: str | None = None,
        model_name: str | None = None,
        dataset_name: str | list[str] | None = None,
        license: str | None = None,
        language: str | list[str] | None = None,
        tags: str | list[str] | None = None,
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
            model_name, dataset_name, license, language, tags:
                What the card should say, as if it were set in `trainer.card` before.

        Returns:
            `CommitInfo`, or a `Future` of it if not `blocking`; `None` in other processes than the first.

        Raises:
            `ValueError`: if the model or its repository is refused, see [`~icae.hub_upload.push`].
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        revision = revision or self.args.hub_revision
        private = self.args.hub_private_repo if private is None else private
        card = self.card
        card.name, card.license = model_name or card.name, license or card.license
        card.language, card.tags = _as_list(language) or card.language, _as_list(tags) or card.tags
        for name in _as_list(dataset_name):
            source = DataSource(name, hub_id=name if is_hub_id(name) else None)
            card.data = [*(one for one in card.data if one.name != name), source]
        facts = card.facts()
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        facts.at(self.hub_model_id, revision).save(self.args.output_dir)
        write_card(self.args.output_dir)
        bundle = tempfile.TemporaryDirectory()
        self._prepare_push(self.args.output_dir, f"{bundle.name}/model", revision, base)
        self._finish_current_push()
        job = self._upload(
            bundle,
            private=private,
            token=token or self.args.hub_token,
            revision=revision,
            commit_message=commit_message or "End of training",
            commit_description=commit_description,
            create_pr=create_pr,
        )
        return job.result() if blocking else job

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # Trainer's own copies and pushes files whose names it knows, without slots and adapter.
        strategy = self.args.hub_strategy
        if not self.is_world_process_zero() or strategy == HubStrategy.END:
            return
        running = [job for job in self.push_in_progress.jobs if not job.done()] if self.push_in_progress else []
        if running and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        where = {
            HubStrategy.CHECKPOINT: "last-checkpoint",
            HubStrategy.ALL_CHECKPOINTS: Path(checkpoint_folder).name,
        }.get(strategy)
        # All that is uploaded later: the checkpoint itself may be rotated away by then.
        bundle = tempfile.TemporaryDirectory()
        try:
            self.card.facts().save(checkpoint_folder)
            self._prepare_push(checkpoint_folder, f"{bundle.name}/model", self.args.hub_revision)
        except Exception as error:  # whatever it is, training is worth more than a push
            _warn("the checkpoint", error)
            bundle.cleanup()
            return
        subfolders = {}
        if where:
            try:
                training_state(checkpoint_folder, f"{bundle.name}/state")
                check_training_state(f"{bundle.name}/state")
                subfolders[where] = f"{bundle.name}/state"
            except Exception as error:  # the model itself still goes
                _warn("the state to resume from", error)
        job = self._upload(
            bundle,
            private=self.args.hub_private_repo,
            token=self.args.hub_token,
            revision=self.args.hub_revision,
            commit_message=f"Training in progress, step {self.state.global_step}",
            subfolders=subfolders,
        )
        job.add_done_callback(_warn_if_failed)
        self.push_in_progress = PushInProgress([*running, job])

    def _prepare_push(self, checkpoint: str, folder: str, branch: str | None, base: str | None = None) -> None:
        """Puts a checkpoint into the layout of the Hub, checks and verifies it."""
        assemble(checkpoint, folder, tokenizer=self.model.tokenizer, repo_id=self.hub_model_id, branch=branch)
        check(folder)
        if not self.is_deepspeed_enabled:  # there, one process alone cannot run the model
            verify(folder, self.model, base=base)

    def _upload(self, bundle: tempfile.TemporaryDirectory, **kwargs) -> Future:
        """Uploads in the background, one push after the other."""

        def upload_and_remove() -> CommitInfo:
            with bundle:
                return upload(f"{bundle.name}/model", self.hub_model_id, **kwargs)

        return self._uploads.submit(upload_and_remove)

    def create_model_card(self, *args, **kwargs) -> None:
        """Writes the card of an ICAE, from the facts that [`CardCallback`] keeps; arguments are not needed."""
        if self.is_world_process_zero():
            self.card.write_card()


def _check_rows(dataset, name: str) -> None:
    if not isinstance(dataset, Dataset | IterableDataset):
        raise TypeError(
            f"Expected `{name}` to be a `Dataset` or `IterableDataset`, got {type(dataset).__name__}; choose a split, "
            "or make one with `Dataset.from_list`."
        )


def _counts(inputs: dict[str, Any]) -> torch.Tensor:
    """What a batch has of all that is `COUNTED`, as the model's forward method reads it."""
    lengths = inputs["context_mask"].sum(dim=1)
    nothing = lengths.new_zeros(())
    is_document = inputs.get("autoencoding_rows", torch.ones_like(lengths, dtype=torch.bool))
    rejected = inputs.get("rejected_rows", nothing.bool())
    counts = {
        "autoencoding": (lengths + 1)[is_document].sum(),  # with the end of the text
        "continuation": inputs["continuation_mask"].sum() if "continuation_mask" in inputs else nothing,
        "instruction": (inputs["response_mask"] & ~rejected[..., None]).sum()
        if "response_mask" in inputs
        else nothing,
        "pairs": rejected.sum(),
        "contexts": nothing + len(lengths),
        "documents": is_document.sum(),
    }
    return torch.stack([counts[name] for name in COUNTED])


def _last_position(config: ICAEConfig, tokens: int, args: Any) -> int:
    """Position of the last token when a context of so many is written out, and when text goes on behind it."""
    is_cache = config.memory_type == "key_values"
    spans, rest = divmod(tokens, config.span_length)
    slots = spans * config.slots_for(config.span_length) + (config.slots_for(rest) if rest else 0)

    def behind(task: str) -> int:
        if config.decoder_layout[task] == "sequential" and not is_cache:
            return slots
        return tokens + slots if is_cache and config.encoder_layout == "sequential" else tokens

    last = [0]
    if tokens and args.autoencoding_weight > 0:
        over = config.decoder_layout["autoencoding"] == "uniform"  # written at the positions it was read at
        last.append(tokens if over else behind("autoencoding") + 1 + tokens)
    if tokens and args.autoencoding_weight < 1:
        last.append(behind("continuation") + args.continuation_length)
    return max(last)


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


def _as_list(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())


def _warn_if_failed(push: Future) -> None:
    if error := push.exception():
        _warn("the checkpoint", error)


def _warn(what: str, error: BaseException) -> None:
    """Training goes on; what failed to go out lies in the checkpoint's folder."""
    logger.warning(f"A push to the Hub failed, {what} is only in `output_dir`: {error}")


class _AsPrepared(TrainerCallback):
    """Trains what was prepared, in the order that it was begun in, where transformers and accelerate would not."""

    def __init__(self, trainer: ICAETrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):
        # Transformers has given the configurations the tokenizer's end token, which is not that of the samples, nor,
        # when the ICAE is loaded again, that of the base.
        for config, tokens in self.trainer._ends:
            for name, token in tokens.items():
                setattr(config, name, token)
        # With several processes, accelerate does not find the sampler of an epoch that is gone on with.
        batches: Any = getattr(train_dataloader, "batch_sampler", None)
        while hasattr(batches, "batch_sampler"):
            batches = batches.batch_sampler
        if isinstance(sampler := getattr(batches, "sampler", None), _ShuffledGroupsSampler):
            sampler.set_epoch(int(state.epoch or 0))
        if state.epoch and state.epoch >= 1 and not isinstance(self.trainer.train_dataset, Dataset):
            logger.warning(
                "The run was interrupted after the first pass through a stream. It goes on with the start of the next "
                "pass, not exactly where it was."
            )


class _BestCheckpoint(TrainerCallback):
    """Finds the best checkpoint again in a run that goes on from elsewhere, and forgets a best that is not there."""

    def on_train_begin(self, args, state, control, **kwargs):
        if state.best_global_step and not os.path.isdir(state.best_model_checkpoint or ""):
            best = Path(args.output_dir, f"checkpoint-{state.best_global_step}")
            if best.is_dir():
                state.best_model_checkpoint = str(best)
                return
            logger.warning(
                f"The best checkpoint so far, {best.name!r}, is not in `output_dir`; the best is looked for again."
            )
            state.best_model_checkpoint = state.best_metric = state.best_global_step = None


class _ShuffledGroupsSampler(Sampler):
    """
    Groups of samples of similar length, in random order that depends on the seed and the epoch alone.

    As transformers orders them, from long to short and so again every 50 batches, tasks whose contexts differ in
    length would take turns. The longest sample stays in the first batch, where a lack of memory shows, and what is
    left over in the last.
    """

    def __init__(self, lengths: list[int], group_size: int, seed: int):
        self.lengths, self.group_size, self.seed, self.epoch = lengths, group_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        samples = get_length_grouped_indices(self.lengths, self.group_size, generator=generator)
        groups = [samples[start : start + self.group_size] for start in range(0, len(samples), self.group_size)]
        between = groups[1 : len(samples) // self.group_size]
        order = torch.randperm(len(between), generator=generator)
        groups[1 : 1 + len(between)] = [between[place] for place in order]
        return (sample for group in groups for sample in group)


class _GradientNorms(TrainerCallback):
    """Logs the norm of the clipped gradients of each group of trained tensors, at logging steps."""

    def __init__(self, trainer: ICAETrainer):
        self.trainer = trainer

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if args.logging_strategy != "steps" or (state.global_step + 1) % state.logging_steps:
            return
        groups: dict[str, list[torch.Tensor]] = {}
        for name, parameter in self.trainer.model.trainable_parameters().items():
            if parameter.grad is not None:
                groups.setdefault(GROUPS.get(name, "adapter"), []).append(parameter.grad)
        for group, gradients in groups.items():
            norm = torch.nn.utils.get_total_norm(gradients).item()
            self.trainer._metrics["train"][f"grad_norm_{group}"].append(norm)


def last_checkpoint(output_dir: str) -> str | None:
    """The newest whole checkpoint in a training folder: its `trainer_state.json` is written last."""
    states = Path(output_dir).glob("checkpoint-*/trainer_state.json")
    found = {int(number): state.parent for state in states if (number := state.parent.name.split("-", 1)[1]).isdigit()}
    return str(found[max(found)]) if found else None
