"""The training stages of an ICAE, on TRL."""

from . import cpu_attention  # noqa: F401  # registers the name "grouped"
from .pretraining_config import ICAEPretrainingConfig
from .pretraining_data import DataCollatorForICAEPretraining, prepare_pretraining_dataset
from .pretraining_trainer import ICAEPretrainingTrainer


__all__ = [
    "DataCollatorForICAEPretraining",
    "ICAEPretrainingConfig",
    "ICAEPretrainingTrainer",
    "prepare_pretraining_dataset",
]
