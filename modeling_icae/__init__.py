"""How an ICAE compresses and reads back: the model and its memory."""

from .memory_icae import ICAEMemory
from .modeling_icae import GREEDY, ICAEForConditionalGeneration, ICAEOutput
from .pipeline_icae import ICAEContextGenerationPipeline


__all__ = ["GREEDY", "ICAEContextGenerationPipeline", "ICAEForConditionalGeneration", "ICAEMemory", "ICAEOutput"]
