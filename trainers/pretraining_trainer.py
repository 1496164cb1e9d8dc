"""The pretraining stage: autoencoding and continuation on every sample (paper, section 2.2)."""

import torch
from sacrebleu.metrics import BLEU

from icae.modeling_icae import GREEDY, ICAEForConditionalGeneration, ICAEOutput

from .icae_trainer import ICAETrainer
from .pretraining_config import ICAEPretrainingConfig
from .pretraining_data import DataCollatorForICAEPretraining, prepare_pretraining_dataset


class ICAEPretrainingTrainer(ICAETrainer):
    """
    Pretrains an ICAE on plain documents.

    Each sample is a context and the tokens behind it. The context is compressed once; the frozen base then rewrites it
    from the slots (autoencoding) and goes on (continuation). Losses are weighted λ : 1 - λ.

    Besides what [`ICAETrainer`] logs, evaluation logs the autoencoding accuracy of each quarter of the context, and
    BLEU and exactly matching prefix of real reconstructions.

    Args:
        model ([`ICAEForConditionalGeneration`]):
            The model, from `from_base` or from `from_pretrained(..., is_trainable=True)`.
        args ([`ICAEPretrainingConfig`]):
            The arguments.
        train_dataset, eval_dataset (`Dataset` or `IterableDataset`):
            Documents (a text column), or samples from [`prepare_pretraining_dataset`].
        processing_class, callbacks, optimizers:
            As in [`ICAETrainer`].
    """

    _name = "ICAE pretraining"
    args: ICAEPretrainingConfig
    _collator = DataCollatorForICAEPretraining
    _arguments_class = ICAEPretrainingConfig

    def _prepare(self, dataset, model: ICAEForConditionalGeneration, args: ICAEPretrainingConfig, training: bool):
        if "context_ids" in (dataset.column_names or ()):
            samples = dataset
        else:
            samples = prepare_pretraining_dataset(
                dataset,
                model.tokenizer,
                span_length=model.config.span_length,
                max_spans=args.max_spans,
                short_share=args.short_share,
                continuation_length=args.continuation_length,
                shuffled_share=args.shuffled_share if training else 0.0,
                seed=args.seed if args.data_seed is None else args.data_seed,
                text_column=args.text_column,
                num_proc=args.dataset_num_proc,
            )
        if args.autoencoding_weight == 0:
            samples = samples.filter(bool, input_columns=["continuation_ids"])
        return samples

    def _hits_by_place(self, outputs: ICAEOutput, masks: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if "autoencoding" not in masks:
            return {}
        correct, mask = outputs.token_correct["autoencoding"], masks["autoencoding"]
        places = torch.arange(mask.shape[1], device=mask.device)
        quarter = (4 * places // mask.sum(dim=1, keepdim=True).clamp(min=1)).clamp(max=3)
        parts = {number + 1: correct[mask & (quarter == number)] for number in range(4)}
        # Texts of two tokens have none in some quarters.
        return {f"ae_accuracy_quarter_{number}": hits for number, hits in parts.items() if len(hits)}

    @torch.no_grad()
    def _generation_metrics(self, dataset) -> dict[str, float]:
        """BLEU (paper, section 3.3.1) and the share of the context before the first wrong token (the paper's "EM")."""
        if self.args.eval_reconstructions == 0:
            return {}
        samples = list(dataset.take(self.args.eval_reconstructions))
        contexts = [list(sample["context_ids"]) for sample in samples]
        memory = self.model.compress(contexts)
        longest = max(map(len, contexts))
        output = self.model.generate(memory=memory, task="autoencoding", max_new_tokens=longest + 1, **GREEDY)
        decoded = output.tolist()
        prefixes = []
        for context, ids in zip(contexts, decoded, strict=True):
            same = [int(left == right) for left, right in zip(context, ids, strict=False)]
            prefixes.append(same.index(0) / len(context) if 0 in same else len(same) / len(context))
        tokenizer = self.model.tokenizer
        texts = tokenizer.batch_decode(decoded, skip_special_tokens=True)
        bleu = BLEU().corpus_score(texts, [tokenizer.batch_decode(contexts, skip_special_tokens=True)])
        return {"bleu": bleu.score / 100, "exact_prefix": sum(prefixes) / len(prefixes)}
