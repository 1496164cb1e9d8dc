"""Arguments of the pretraining stage."""

from dataclasses import dataclass, field

from .training_config import ICAETrainingConfig


@dataclass
class ICAEPretrainingConfig(ICAETrainingConfig):
    r"""
    Arguments of [`ICAEPretrainingTrainer`], besides those of [`ICAETrainingConfig`].

    Args:
        short_share (`float`, *optional*, defaults to `0.1`):
            Share of contexts that are cut short at a random length, so that lengths other than whole spans are known.
        eval_reconstructions (`int`, *optional*, defaults to `8`):
            Held-out contexts that are really decoded at each evaluation, for BLEU and the exactly matching prefix.
        text_column (`str`, *optional*, defaults to `"text"`):
            Column of the data set that holds the documents.
    """

    short_share: float = field(default=0.1, metadata={"help": "Share of contexts cut short at a random length."})
    eval_reconstructions: int = field(
        default=8, metadata={"help": "Held-out contexts that are decoded at each evaluation."}
    )
    text_column: str = field(default="text", metadata={"help": "Column of the data set that holds the documents."})

    # Parameters whose default values are overridden from SFTConfig
    learning_rate: float = field(
        default=1e-4, metadata={"help": "The initial learning rate for AdamW. Paper, table 8: 1e-4."}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Every trained tensor gets a gradient in every step."}
    )

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.short_share <= 1:
            raise ValueError(f"Expected `short_share` in [0, 1], got {self.short_share}.")
