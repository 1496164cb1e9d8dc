"""What readers of the Hub see: model cards, filled while a model is trained."""

from .card import is_changed, is_generated, is_written, model_card, write_card
from .facts import CARD_FACTS, CardFacts, DataSource, Evaluation, TrainingStage


__all__ = [
    "CARD_FACTS",
    "CardFacts",
    "DataSource",
    "Evaluation",
    "TrainingStage",
    "is_changed",
    "is_generated",
    "is_written",
    "model_card",
    "write_card",
]
