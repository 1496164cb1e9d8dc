"""Arguments that both training stages share."""

from dataclasses import dataclass, field
from typing import Any

from trl import SFTConfig


# Options of SFTConfig that the stages of an ICAE have no place for: the value that leaves each alone, and what to do.
UNUSED: dict[str, tuple[Any, str]] = {
    "max_length": (None, "contexts are compressed span by span; `max_context_length` leaves long ones out"),
    "loss_type": (
        "nll",
        "`distillation_weight` and `preference_weight` are the other losses of the instruction stage",
    ),
    "label_smoothing_factor": (0.0, "losses are plain cross entropies"),
    "neftune_noise_alpha": (None, "the base stays as it is, and its embeddings with it"),
    "assistant_only_loss": (False, "the loss is on the last response, and on no other turn"),
    "completion_only_loss": (None, "the loss is on the response only"),
    "chat_template_path": (None, "set `model.tokenizer.chat_template` before the trainer is made"),
    "eos_token": (None, "texts end with the `eos_token_id` of the base's configuration"),
    "pad_token": (None, "what pads a batch is never read"),
    "dataset_text_field": ("text", "`text_column` of the pretraining stage is the column of the documents"),
    "shuffle_dataset": (False, "shuffle the rows; samples come in random order anyway"),
    "truncation_mode": ("keep_start", "nothing is truncated"),
    "pad_to_multiple_of": (None, "batches are as long as their longest row"),
    "packing_strategy": ("bfd", "rows are not packed"),
    "remove_unused_columns": (False, "the collator chooses the columns"),
    "include_num_input_tokens_seen": ("no", "`num_tokens` of the logs counts context tokens without it"),
    "model_init_kwargs": (None, "the model is loaded before the trainer is made"),
    "trust_remote_code": (False, "the model is loaded before the trainer is made"),
    "dataset_kwargs": ({"skip_prepare_dataset": True}, "the trainer prepares the rows itself"),
    "label_names": (None, "losses come from the model"),
    "batch_eval_metrics": (False, "there is no `compute_metrics`"),
    "include_for_metrics": ([], "there is no `compute_metrics`"),
    "liger_kernel_config": (None, "the losses are computed in chunks as they are"),
    "use_liger_kernel": (False, "the losses are computed in chunks as they are"),
    "fp16": (False, "activations of language models leave its range; load the base in bfloat16"),
}


@dataclass
class ICAETrainingConfig(SFTConfig):
    r"""
    Base of [`ICAEPretrainingConfig`] and [`ICAESFTConfig`]: only what is new or has another default than in
    [SFTConfig](https://huggingface.co/docs/trl/sft_trainer). What of it would have no effect is refused.

    Args:
        autoencoding_weight (`float`, *optional*, defaults to `0.5`):
            Weight λ of the autoencoding loss; continuation has 1 - λ. Paper, section 2.3: 0.4 to 0.6 is best; 1 and 0
            are its ablations (table 5).
        continuation_length (`int`, *optional*, defaults to `32`):
            Tokens behind the context that the continuation task predicts; 0 trains autoencoding only.
        max_spans (`int`, *optional*, defaults to `2`):
            Contexts that these two tasks are trained on have 1 to `max_spans` whole spans. Paper, section 3.3.3:
            concatenated memories work only if a few samples of several spans are trained on.
        shuffled_share (`float`, *optional*, defaults to `0.0`):
            Share of documents whose words are shuffled, for autoencoding only. In sentences the base can guess many
            words and the order of others; here the slots must keep them, and after as many tokens normal text is
            reconstructed better, but a share of 1 forgets continuation (results/shuffled_throughout.json).
    """

    autoencoding_weight: float = field(default=0.5, metadata={"help": "Weight λ of autoencoding. Paper: 0.4 to 0.6."})
    continuation_length: int = field(
        default=32, metadata={"help": "Tokens of the continuation task; 0 trains autoencoding only."}
    )
    max_spans: int = field(
        default=2, metadata={"help": "Contexts of these two tasks have 1 to `max_spans` whole spans."}
    )
    shuffled_share: float = field(
        default=0.0, metadata={"help": "Share of documents with shuffled words, for autoencoding only."}
    )

    # Parameters whose default values are overridden from SFTConfig
    warmup_steps: float = field(default=300, metadata={"help": "Steps of linear warm-up. Paper, table 8: 300."})
    max_grad_norm: float = field(default=2.0, metadata={"help": "Gradient clipping. Paper, table 8: 2.0."})
    adam_beta2: float = field(default=0.95, metadata={"help": "Beta2 of AdamW (UPL; the paper gives none)."})
    bf16: bool = field(
        default=False,
        metadata={
            "help": "Autocast around the whole step. Not needed: a base in bfloat16 computes in bfloat16 and keeps "
            "the adapter in float32 by itself, and autocast would slow its decoder pass down."
        },
    )
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "Recompute activations in the backward pass; exact for both passes."}
    )
    max_length: int | None = field(default=None, metadata={"help": "Not used, see `max_context_length`."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "The collator chooses the columns."})
    dataset_kwargs: dict[str, Any] | None = field(default_factory=lambda: {"skip_prepare_dataset": True})

    def __post_init__(self):
        super().__post_init__()
        for name, (unused, advice) in UNUSED.items():
            if getattr(self, name) != unused:
                raise ValueError(
                    f"Expected `{name}` to be {unused!r}, for it would have no effect here, got "
                    f"{getattr(self, name)!r}: {advice}."
                )
        if self.packing or self.padding_free or self.eval_packing:
            raise ValueError(
                "Expected `packing`, `eval_packing` and `padding_free` to be off, got "
                f"{self.packing}, {self.eval_packing} and {self.padding_free}: packed rows would share one memory, "
                "and the decoder of one text would see the slots of another. Spans of all rows already run as one "
                "batch; leave all off."
            )
        if self.max_spans < 1 or self.continuation_length < 0:
            raise ValueError(
                "Expected `max_spans` of at least 1 and a `continuation_length` of at least 0, got "
                f"{self.max_spans} and {self.continuation_length}."
            )
        if not 0 <= self.autoencoding_weight <= 1:
            raise ValueError(
                f"Expected `autoencoding_weight` in [0, 1], got {self.autoencoding_weight}; the paper's λ is 0.4 to "
                "0.6."
            )
        if not 0 <= self.shuffled_share <= 1 or (self.shuffled_share and self.autoencoding_weight == 0):
            raise ValueError(
                "Expected `shuffled_share` in [0, 1], and 0 without autoencoding, all that shuffled documents train, "
                f"got {self.shuffled_share} with an `autoencoding_weight` of {self.autoencoding_weight}."
            )
        if self.continuation_length == 0:
            self.autoencoding_weight = 1.0
