"""
In-context Autoencoder: a compressed, reusable memory of long contexts for any Hugging Face causal language model.

Importing the package registers it with transformers, so that `AutoConfig` and `AutoModel` know ICAE checkpoints.
"""

from importlib.metadata import version

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .configuration_icae import ICAEConfig
from .embedded import EMBEDDED_CHECKPOINT, embedded_base
from .modeling_icae import ICAEContextGenerationPipeline, ICAEForConditionalGeneration, ICAEMemory, ICAEOutput


__version__ = version("icae")
__all__ = [
    "EMBEDDED_CHECKPOINT",
    "ICAEConfig",
    "ICAEContextGenerationPipeline",
    "ICAEForConditionalGeneration",
    "ICAEMemory",
    "ICAEOutput",
    "embedded_base",
]

AutoConfig.register("icae", ICAEConfig, exist_ok=True)
for auto_class in (AutoModel, AutoModelForCausalLM):  # as a checkpoint's own code is found
    auto_class.register(ICAEConfig, ICAEForConditionalGeneration, exist_ok=True)
