"""How an ICAE compresses and reads back: the model and its memory."""

from .memory_icae import ICAEMemory
from .modeling_icae import ICAEForConditionalGeneration, ICAEOutput


__all__ = ["ICAEForConditionalGeneration", "ICAEMemory", "ICAEOutput"]
