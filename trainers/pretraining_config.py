"""Arguments of the pretraining stage."""

from dataclasses import dataclass, field
from typing import Any

from trl import SFTConfig


@dataclass
class ICAEPretrainingConfig(SFTConfig):
    r"""
    Arguments of [`ICAEPretrainingTrainer`]: only what is new or has another default than in
    [SFTConfig](https://huggingface.co/docs/trl/sft_trainer).

    Args:
        autoencoding_weight (`float`, *optional*, defaults to `0.5`):
            Weight λ of the autoencoding loss; continuation has 1 - λ. Paper, section 2.3: 0.4 to 0.6 is best.
        max_spans (`int`, *optional*, defaults to `2`):
            Contexts have 1 to `max_spans` whole spans. Paper, section 3.3.3: concatenated memories work only if a few
            samples of several spans are trained on.
        short_share (`float`, *optional*, defaults to `0.1`):
            Share of contexts that are cut short at a random length, so that lengths other than whole spans are known.
        continuation_length (`int`, *optional*, defaults to `32`):
            Tokens behind the context that the continuation task predicts; 0 trains autoencoding only.
        eval_reconstructions (`int`, *optional*, defaults to `8`):
            Held-out contexts that are really decoded at each evaluation, for BLEU and the exactly matching prefix.
        text_column (`str`, *optional*, defaults to `"text"`):
            Column of the data set that holds the documents.
    """

    autoencoding_weight: float = field(default=0.5, metadata={"help": "Weight λ of autoencoding. Paper: 0.4 to 0.6."})
    max_spans: int = field(default=2, metadata={"help": "Contexts have 1 to `max_spans` whole spans."})
    short_share: float = field(default=0.1, metadata={"help": "Share of contexts cut short at a random length."})
    continuation_length: int = field(
        default=32, metadata={"help": "Tokens of the continuation task; 0 trains autoencoding only."}
    )
    eval_reconstructions: int = field(
        default=8, metadata={"help": "Held-out contexts that are decoded at each evaluation."}
    )
    text_column: str = field(default="text", metadata={"help": "Column of the data set that holds the documents."})

    # Parameters whose default values are overridden from SFTConfig
    learning_rate: float = field(
        default=1e-4, metadata={"help": "The initial learning rate for AdamW. Paper, table 8: 1e-4."}
    )
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
    remove_unused_columns: bool = field(default=False, metadata={"help": "The collator chooses the columns."})
    dataset_kwargs: dict[str, Any] | None = field(default_factory=lambda: {"skip_prepare_dataset": True})
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Every trained tensor gets a gradient in every step."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.packing or self.padding_free:
            raise ValueError(
                "Expected `packing=False` and `padding_free=False`, got "
                f"{self.packing} and {self.padding_free}: packed rows would share one memory, and the decoder of one "
                "text would see the slots of another. Spans of all rows already run as one batch; leave both off."
            )
        if not 0 < self.autoencoding_weight <= 1:
            raise ValueError(
                f"Expected `autoencoding_weight` in (0, 1], got {self.autoencoding_weight}; the paper's λ is 0.4 to "
                "0.6."
            )
        if self.continuation_length == 0:
            self.autoencoding_weight = 1.0
