"""The instruction stage: answers from compressed contexts (paper, section 2.3)."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from datasets import Dataset
from tqdm.auto import tqdm

from icae.evaluation.measures import exact_match, token_f1
from icae.modeling_icae import GREEDY, ICAEForConditionalGeneration, ICAEOutput

from .icae_trainer import ICAETrainer
from .sft_config import ICAESFTConfig
from .sft_data import SAMPLE_FEATURES, DataCollatorForICAESFT, prepare_sft_dataset


class ICAESFTTrainer(ICAETrainer):
    """
    Tunes an ICAE on (context, prompt, response) triples: the context is compressed, and the frozen base answers the
    prompt from the slots. The loss is on the response only.

    Besides what [`ICAETrainer`] logs, evaluation logs token F1 and exact match of real answers and, with a
    `pretraining_share`, how well the held-out contexts are still reconstructed, where the base has positions for it.
    Its loss weighs both tasks with the weights of training.

    **Preferences.** With a `preference_weight`, rows that have a `rejected` response are trained by direct preference
    optimisation (DPO, arXiv 2305.18290) as well: the probability of the response rises against that of the rejected
    one, compared with what both are for the model that the trainer is given. That takes no second model, for these
    probabilities are computed when training begins; to resume, give the trainer the model of the start again, not the
    checkpoint. Logged are TRL's `rewards/accuracies` and `rewards/margins`. Evaluation does not read rejected
    responses.

    Args:
        model ([`ICAEForConditionalGeneration`]):
            The model; a pretrained one comes from `from_pretrained(..., is_trainable=True)`.
        args ([`ICAESFTConfig`]):
            The arguments.
        train_dataset, eval_dataset (`Dataset` or `IterableDataset`):
            Triples, see [`prepare_sft_dataset`] for the columns, or samples from it.
        documents (`Dataset` or `IterableDataset`, *optional*):
            Texts that the mixed-in samples are cut from, instead of the contexts, see [`prepare_sft_dataset`].
        processing_class, callbacks, optimizers:
            As in [`ICAETrainer`].
    """

    _name = "ICAE SFT"
    args: ICAESFTConfig
    train_dataset: Any  # samples, see `prepare_sft_dataset`
    _collator = DataCollatorForICAESFT
    _arguments_class = ICAESFTConfig

    def __init__(self, model, args, train_dataset, eval_dataset=None, *arguments, documents=None, **options):
        self._documents = documents
        super().__init__(model, args, train_dataset, eval_dataset, *arguments, **options)
        if args.preference_weight and self.is_deepspeed_enabled:
            raise ValueError(
                "Expected a `preference_weight` of 0 under DeepSpeed, where the model cannot be run before "
                f"training, got {args.preference_weight}; train it in one process or under DDP."
            )

    def _prepare(self, dataset, model: ICAEForConditionalGeneration, args: ICAESFTConfig, training: bool):
        if training and args.preference_weight and not isinstance(dataset, Dataset):
            raise ValueError(
                "Expected a data set in memory with a `preference_weight`, got a streamed one: how likely its "
                "responses are is computed before training; load it without streaming."
            )
        if training and not isinstance(dataset, Dataset) and "rejected" in (dataset.column_names or ()):
            raise ValueError(
                "Expected a stream without a column `rejected`, got one: preferences are trained with a data set in "
                "memory and a `preference_weight`; remove the column, or load the rows."
            )
        if "context_ids" in (dataset.column_names or ()):
            if training and self._documents is not None:
                raise ValueError("Expected triples with `documents`, got samples; give `documents` to what made them.")
            samples = dataset
        else:
            samples = prepare_sft_dataset(
                dataset,
                model,
                max_prompts=args.max_prompts if training else 1,
                pretraining_share=args.pretraining_share if training else 0.0,
                documents=self._documents if training else None,
                max_spans=args.max_spans,
                continuation_length=args.continuation_length,
                shuffled_share=args.shuffled_share if training else 0.0,
                max_context_length=args.max_context_length,
                seed=args.seed if args.data_seed is None else args.data_seed,
                num_proc=args.dataset_num_proc,
            )
        if args.autoencoding_weight == 0:
            samples = samples.filter(_trains_without_autoencoding, input_columns=["prompt_ids", "continuation_ids"])
        if not training:
            # A stream would no longer know its columns.
            features = {} if isinstance(samples, Dataset) else {"features": SAMPLE_FEATURES}
            return samples.map(_without_rejected, **features)
        if isinstance(samples, Dataset):
            samples = _check_preferences(samples, args.preference_weight)
        return samples

    def train(self, *args, **kwargs):
        if self.args.preference_weight and "reference_margins" not in self.train_dataset.column_names:
            self._add_reference_margins()
        return super().train(*args, **kwargs)

    @torch.no_grad()
    def _add_reference_margins(self) -> None:
        """To each sample, how much likelier its responses are now than the rejected ones, in nats."""
        training = self.model.training
        self.model.eval()  # without dropout
        self._move_model_to_device(self.model, self.args.device)
        rejected = list(self.train_dataset["rejected_ids"])
        pairs = [index for index, of_prompts in enumerate(rejected) if any(of_prompts)]
        own = pairs[self.args.process_index :: self.args.world_size]
        size = self.args.per_device_train_batch_size
        margins: list[float] = []
        for first in tqdm(range(0, len(own), size), desc="before training", disable=not self.is_world_process_zero()):
            samples = [self.train_dataset[index] for index in own[first : first + size]]
            batch = self._prepare_inputs(self.data_collator(samples))
            with self.compute_loss_context_manager():
                outputs = self.model(**batch, autoencoding_weight=0.0)
            margins += _margins(outputs, batch["rejected_rows"]).tolist()
        self.model.train(training)
        rest = iter(margins)
        found = [(index, [next(rest) for ids in rejected[index] if ids]) for index in own]
        by_index = dict(gather_object(found))
        column = [by_index.get(index, []) for index in range(len(rejected))]
        self.train_dataset = self.train_dataset.add_column("reference_margins", column)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        reference = inputs.pop("reference_margins", None)
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        if self.args.preference_weight:
            weights, factors = self._weights_in_step(inputs)
            metrics = self._metrics["train"]
            if reference is not None:
                rewards = self.args.beta * (_margins(outputs, inputs["rejected_rows"]) - reference)
                weight = self.args.preference_weight * weights["instruction"] * factors["pairs"]
                loss = outputs.loss = loss - weight * F.logsigmoid(rewards).mean()
                metrics["rewards/accuracies"].append(factors["pairs"] * (rewards > 0).float().mean().item())
                metrics["rewards/margins"].append(factors["pairs"] * rewards.mean().item())
            elif "pairs" in factors:  # other batches of the step have them
                metrics["rewards/accuracies"].append(0.0)
                metrics["rewards/margins"].append(0.0)
        return (loss, outputs) if return_outputs else loss

    def _document_lengths(self, dataset: Dataset) -> Iterator[int]:
        rows = dataset.select_columns(["length", "prompt_ids"])
        return (row["length"] for row in rows if not row["prompt_ids"])

    def _held_out_share(self) -> float:
        return self.args.pretraining_share

    def _training_options(self) -> dict[str, float]:
        # Not of held-out losses: runs are compared by them.
        return {"distillation_weight": self.args.distillation_weight}

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        if self.args.pretraining_share:
            lengths = inputs["context_mask"].sum(dim=1)
            positions = self.model.config.num_positions
            # In a sequential layout the context stands there three times: read, as slots, and written.
            inputs["autoencoding_rows"] = lengths > 0 if positions is None else 3 * lengths < positions
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)

    @torch.no_grad()
    def _generation_metrics(self, dataset) -> dict[str, float]:
        samples = list(dataset.take(self.args.eval_generations)) if self.args.eval_generations else []
        samples = [sample for sample in samples if sample["prompt_ids"]]  # others only train reconstruction
        results: dict[str, list[float]] = {"f1": [], "exact_match": []}
        decode = self.model.tokenizer.batch_decode
        for first in range(0, len(samples), self.args.per_device_eval_batch_size):
            batch = samples[first : first + self.args.per_device_eval_batch_size]
            contexts = [
                [ids.tolist() for ids in torch.tensor(sample["context_ids"]).split(sample["context_lengths"])]
                for sample in batch
            ]
            prompts = [sample["prompt_ids"][0] for sample in batch]
            # Not `max_new_tokens`, of which the base may have too few positions left.
            length = max(map(len, prompts)) + self.args.max_new_tokens
            output = self.model.generate(contexts, prompts, max_length=length, max_new_tokens=None, **GREEDY)
            answers = decode(output, skip_special_tokens=True)
            references = decode([sample["response_ids"][0] for sample in batch], skip_special_tokens=True)
            for answer, reference in zip(answers, references, strict=True):
                results["f1"].append(token_f1(answer, reference))
                results["exact_match"].append(exact_match(answer, reference))
        return {name: sum(values) / len(values) for name, values in results.items() if values}


def _without_rejected(sample: dict[str, Any]) -> dict[str, Any]:
    return {"rejected_ids": [[] for _ in sample["prompt_ids"]]}


def _margins(outputs: ICAEOutput, rejected_rows: torch.Tensor) -> torch.Tensor:
    """How much likelier each preferred response is than the rejected one in the row behind it, in nats."""
    nats = outputs.token_losses["instruction"].sum(dim=1)
    rejected = rejected_rows.nonzero()[:, 0]
    return nats[rejected] - nats[rejected - 1]


def _check_preferences(samples: Dataset, weight: float) -> Dataset:
    """
    The samples, without margins that another trainer has computed. Raises a `ValueError` if there are rejected
    responses without a weight, or a weight without them.
    """
    found = "rejected_ids" in samples.column_names and any(map(any, samples["rejected_ids"]))
    if found and not weight:
        raise ValueError(
            "Expected a `preference_weight` above 0 with `rejected` responses, got 0; set it, or tune on rows without."
        )
    if weight and not found:
        raise ValueError(
            f"Expected rows with a `rejected` response for a `preference_weight` of {weight}, got none that is short "
            "enough; write them with `icae write-preferences`, or leave the weight at 0."
        )
    return samples.remove_columns([*{"reference_margins"} & {*samples.column_names}])


def _trains_without_autoencoding(prompt_ids: list[list[int]], continuation_ids: list[int]) -> bool:
    """Whether a sample has another target than its context."""
    return bool(prompt_ids or continuation_ids)
