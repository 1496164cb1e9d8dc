"""The training stages of an ICAE, on TRL."""

from . import cpu_attention  # noqa: F401  # registers the name "grouped"
from .pretraining_config import ICAEPretrainingConfig
from .pretraining_data import DataCollatorForICAEPretraining, prepare_pretraining_dataset
from .pretraining_trainer import ICAEPretrainingTrainer
from .sft_config import ICAESFTConfig
from .sft_data import DataCollatorForICAESFT, prepare_sft_dataset
from .sft_trainer import ICAESFTTrainer


__all__ = [
    "DataCollatorForICAEPretraining",
    "DataCollatorForICAESFT",
    "ICAEPretrainingConfig",
    "ICAEPretrainingTrainer",
    "ICAESFTConfig",
    "ICAESFTTrainer",
    "prepare_pretraining_dataset",
    "prepare_sft_dataset",
]
