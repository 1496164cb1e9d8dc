"""Arguments of the instruction stage."""

from dataclasses import dataclass, field

from .training_config import ICAETrainingConfig


@dataclass
class ICAESFTConfig(ICAETrainingConfig):
    r"""
    Arguments of [`ICAESFTTrainer`], besides those of [`ICAETrainingConfig`].

    Args:
        max_prompts (`int`, *optional*, defaults to `4`):
            Neighbouring rows about the same context share its encoder pass, up to so many.
        pretraining_share (`float`, *optional*, defaults to `0.1`):
            Share of samples that train reconstruction and continuation, of the same contexts or of the trainer's
            `documents`, so that less of either is forgotten (results/mixing_reconstruction.json).
        distillation_weight (`float`, *optional*, defaults to `0.0`):
            Share of the loss that comes from the frozen base with the whole context, see
            [`~ICAEForConditionalGeneration.forward`]. Takes no memory for another model, but a forward pass.
        preference_weight (`float`, *optional*, defaults to `0.0`):
            Weight of the preference loss (DPO, arXiv 2305.18290) where rows have a `rejected` response too. The
            response preferred to it trains by its cross entropy as well, as all do. `icae write-preferences` makes
            such rows of a model's own answers.
        beta (`float`, *optional*, defaults to `0.1`):
            Of this loss, as in `trl.DPOConfig`: the higher, the less the model may leave what it was at the start.
        max_context_length (`int`, *optional*):
            Rows with more context tokens are left out, and counted. Default: what the base has positions for.
        eval_generations (`int`, *optional*, defaults to `16`):
            Held-out prompts that are really answered at each evaluation, for token F1 and exact match.
        max_new_tokens (`int`, *optional*, defaults to `48`):
            Length of these answers.
    """

    max_prompts: int = field(default=4, metadata={"help": "Rows about one context that share its encoder pass."})
    pretraining_share: float = field(
        default=0.1, metadata={"help": "Share of samples that train reconstruction and continuation."}
    )
    distillation_weight: float = field(
        default=0.0, metadata={"help": "Share of the loss that the frozen base with the whole context teaches."}
    )
    preference_weight: float = field(
        default=0.0, metadata={"help": "Weight of the preference loss, where rows have a `rejected` response."}
    )
    beta: float = field(default=0.1, metadata={"help": "Of the preference loss: how near to the start it stays."})
    max_context_length: int | None = field(
        default=None, metadata={"help": "Rows with more context tokens are left out, and counted."}
    )
    eval_generations: int = field(
        default=16, metadata={"help": "Held-out prompts that are answered at each evaluation."}
    )
    max_new_tokens: int = field(default=48, metadata={"help": "Length of these answers."})

    # Parameters whose default values are overridden from SFTConfig
    learning_rate: float = field(
        default=5e-5, metadata={"help": "The initial learning rate for AdamW. Paper, table 8: 5e-5."}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=True, metadata={"help": "A batch without mixed-in samples gives the task embeddings no gradient."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.max_prompts < 1:
            raise ValueError(f"Expected `max_prompts` of at least 1 per context, got {self.max_prompts}.")
        if self.preference_weight < 0 or self.beta <= 0:
            raise ValueError(
                "Expected a `preference_weight` of at least 0 and a `beta` above 0, got "
                f"{self.preference_weight} and {self.beta}."
            )
        if self.preference_weight and self.distillation_weight:
            raise ValueError(
                "Expected `distillation_weight` or `preference_weight`, got both: preference is between probabilities "
                "of responses, distillation replaces them by a divergence. Tune in two runs."
            )
        for name in ("pretraining_share", "distillation_weight"):
            share = getattr(self, name)
            if not 0 <= share <= 1 or (share == 1 and name == "pretraining_share"):
                raise ValueError(
                    f"Expected `{name}` to be a share, at least 0 and {'at most' if name[0] == 'd' else 'below'} 1, "
                    f"got {share}."
                )
