# Copyright 2026 The ICAE authors. Licensed under the Apache License, Version 2.0.
"""Configuration of an In-context Autoencoder (ICAE, arXiv 2307.06945) around any decoder-only language model."""

import math
from typing import Any, cast

from transformers import AutoConfig, PreTrainedConfig


MEMORY_TYPES = ("key_values", "hidden_states")
LAYOUTS = ("uniform", "sequential")
TASKS = ("autoencoding", "continuation", "instruction")


class ICAEConfig(PreTrainedConfig):
    r"""
    Configuration of an [`ICAEForConditionalGeneration`]: which language model it extends, how text becomes memory
    slots, and the LoRA adapter that does it.

    Args:
        text_config (`PreTrainedConfig` or `dict`, *optional*):
            Configuration of the base language model. Filled by [`ICAEForConditionalGeneration.from_base`].
        base_model_name_or_path (`str`, *optional*):
            Hub id or local path of the frozen base. Its weights are never copied into an ICAE checkpoint.
        base_model_revision (`str`, *optional*):
            Revision of the base on the Hub.
        base_model_fingerprint (`str`, *optional*):
            Digest of the base's embeddings and norms; loading on another base is refused.
        memory_type (`str`, *optional*, defaults to `"key_values"`):
            What a memory slot is. `"key_values"`: the keys and values of every layer at the slot's position, which
            the frozen model reads from its cache (after 500xCompressor, arXiv 2408.03094). `"hidden_states"`: the last
            hidden state at the slot's position, which the frozen model reads as an input embedding (paper, section
            2.2).
        span_length (`int`, *optional*, defaults to 128):
            Longest run of context tokens that is compressed at once. Longer contexts become several spans. Paper: 512.
        compression_ratio (`float`, *optional*, defaults to 4.0):
            Context tokens per slot: a span of `S` tokens gets `ceil(S / compression_ratio)` slots. Paper: 4.
            Set it to `None` when `num_memory_slots` is given.
        num_memory_slots (`int`, *optional*):
            A fixed number of slots per span, whatever its length (paper: 128), but never more slots than tokens.
        encoder_layout (`str`, *optional*, defaults to `"uniform"`):
            Position ids of the slots in the encoder. `"uniform"` puts each in the middle of its part of the span
            (after EPL, 1azybug/UPL), `"sequential"` appends them (paper).
        decoder_layout (`str` or `dict[str, str]`, *optional*, defaults to `"uniform"`):
            Position ids in the decoder, for all tasks or per task (`"autoencoding"`, `"continuation"`,
            `"instruction"`). `"uniform"`: slots stand where their text stood; autoencoding rewrites that text from its
            first position on, the other tasks go on behind it. `"sequential"`: slots and text are numbered one after
            the other (paper). The keys of `"key_values"` slots are already rotated, so there `"sequential"` only moves
            the text behind the last position of the memory.
        lora_r (`int`, *optional*, defaults to 32):
            Rank of the encoder's adapter. Paper: 128.
        lora_alpha (`float`, *optional*, defaults to 64):
            Scale of the adapter, applied as `lora_alpha / lora_r`. Official code: 32.
        lora_dropout (`float`, *optional*, defaults to 0.0):
            Dropout on the adapter's input. Official code: 0.05.
        lora_target_modules (`str` or `list[str]`, *optional*, defaults to `"all-linear"`):
            Modules that the adapter changes. Paper: query and value projections.

    Example:

    ```python
    >>> from icae import ICAEConfig

    >>> config = ICAEConfig(span_length=128, compression_ratio=4)
    >>> config.slots_for(100)
    25
    ```
    """

    model_type = "icae"
    sub_configs = {"text_config": AutoConfig}

    def __init__(
        self,
        text_config: PreTrainedConfig | dict[str, Any] | None = None,
        base_model_name_or_path: str | None = None,
        base_model_revision: str | None = None,
        base_model_fingerprint: str | None = None,
        memory_type: str = "key_values",
        span_length: int = 128,
        compression_ratio: float | None = 4.0,
        num_memory_slots: int | None = None,
        encoder_layout: str = "uniform",
        decoder_layout: str | dict[str, str] = "uniform",
        lora_r: int = 32,
        lora_alpha: float = 64,
        lora_dropout: float = 0.0,
        lora_target_modules: str | list[str] = "all-linear",
        **kwargs,
    ):
        if isinstance(text_config, dict):
            if "model_type" not in text_config:
                raise ValueError(f"Expected `text_config` with the base's `model_type`, got {text_config}.")
            text_config = AutoConfig.for_model(**text_config)
        if not isinstance(text_config, PreTrainedConfig | None):
            raise ValueError(
                f"Expected `text_config` as the base's configuration or a dict of it, got {text_config!r}; "
                "`from_base` takes a name."
            )
        self.text_config: Any = text_config
        self.base_model_name_or_path = base_model_name_or_path
        self.base_model_revision = base_model_revision
        self.base_model_fingerprint = base_model_fingerprint
        self.memory_type = memory_type
        self.span_length = span_length
        self.compression_ratio = compression_ratio
        self.num_memory_slots = num_memory_slots
        self.encoder_layout = encoder_layout
        per_task = isinstance(decoder_layout, dict)
        self.decoder_layout: dict[str, Any] = (
            dict(decoder_layout) if per_task else dict.fromkeys(TASKS, decoder_layout)  # type: ignore[arg-type]
        )
        self.lora_r = lora_r
        self.lora_alpha = lora_alpha
        self.lora_dropout = lora_dropout
        by_name = isinstance(lora_target_modules, str)  # a pattern; of a list, the order says nothing
        self.lora_target_modules = lora_target_modules if by_name else sorted(lora_target_modules or [])
        self._check()
        super().__init__(**kwargs)

    @classmethod
    def paper(cls, **overrides) -> "ICAEConfig":
        """The values of the paper (section 2, table 8); the adapter's scale and dropout are the official code's."""
        values: dict[str, Any] = {
            "memory_type": "hidden_states",
            "span_length": 512,
            "compression_ratio": None,
            "num_memory_slots": 128,
            "encoder_layout": "sequential",
            "decoder_layout": "sequential",
            "lora_r": 128,
            "lora_alpha": 32,
            "lora_dropout": 0.05,
            "lora_target_modules": ["q_proj", "v_proj"],
        }
        return cls(**(values | overrides))

    @property
    def max_slots_per_span(self) -> int:
        """Slots of a span of `span_length` tokens."""
        return self.slots_for(self.span_length)

    @property
    def start_token_id(self) -> int:
        """First token of every pass: the beginning-of-sequence token, or the end token of bases without one.

        Language models use their first token as an attention sink, so it must not be a slot or a word of the context.
        """
        config = self.text_config
        token_id = config.bos_token_id if config.bos_token_id is not None else config.eos_token_id
        return token_id[0] if isinstance(token_id, list) else token_id

    @property
    def num_positions(self) -> int | None:
        """Position ids that the base can tell apart, `None` without a limit.

        Bases with LongRoPE (Phi-3, 128k) rotate all keys of a pass in another way once one of them stands behind the
        positions of their own pretraining. Slots are kept between passes, so they have these alone.
        """
        limit = getattr(self.text_config, "max_position_embeddings", None)
        rotations = getattr(self.text_config, "rope_parameters", None) or {}
        for rotation in (rotations, *rotations.values()):  # some bases have several, by the type of the layer
            if isinstance(rotation, dict) and rotation.get("rope_type") == "longrope":
                limit = min(limit, rotation["original_max_position_embeddings"])
        return limit

    def slots_for(self, num_tokens: int) -> int:
        """Number of slots of one span of `num_tokens` tokens."""
        if self.compression_ratio is not None:
            return math.ceil(num_tokens / self.compression_ratio)
        return min(num_tokens, cast(int, self.num_memory_slots))

    def _check(self) -> None:
        def expect(condition: bool, message: str) -> None:
            if not condition:
                raise ValueError(message)

        expect(
            self.memory_type in MEMORY_TYPES,
            f"Expected `memory_type` to be one of {MEMORY_TYPES}, got {self.memory_type!r}.",
        )
        expect(
            type(self.span_length) is int and self.span_length >= 2,
            f"Expected `span_length` as a whole number of at least 2 tokens, got {self.span_length!r}.",
        )
        expect(
            (self.compression_ratio is None) != (self.num_memory_slots is None),
            "Expected exactly one of `compression_ratio` and `num_memory_slots`, got "
            f"{self.compression_ratio} and {self.num_memory_slots}; set the other one to None.",
        )
        if self.compression_ratio is not None:
            ratio = self.compression_ratio
            expect(
                type(ratio) in (int, float) and 1 <= ratio < math.inf,
                f"Expected `compression_ratio`, a number of at least 1 token per slot, got {ratio!r}; more slots than "
                "tokens compress nothing.",
            )
        if self.num_memory_slots is not None:
            expect(
                isinstance(self.num_memory_slots, int) and 1 <= self.num_memory_slots <= self.span_length,
                f"Expected `num_memory_slots` between 1 and `span_length` ({self.span_length}), got "
                f"{self.num_memory_slots!r}; raise `span_length` or take fewer slots.",
            )
        expect(
            self.encoder_layout in LAYOUTS,
            f"Expected `encoder_layout` to be one of {LAYOUTS}, got {self.encoder_layout!r}.",
        )
        expect(
            set(self.decoder_layout) == set(TASKS) and all(x in LAYOUTS for x in self.decoder_layout.values()),
            f"Expected `decoder_layout` to be one of {LAYOUTS} or a dict that gives one for each of {TASKS}, got "
            f"{self.decoder_layout}.",
        )
        if self.memory_type == "key_values":
            overlaid = [task for task in TASKS if self.decoder_layout[task] == "uniform"]
            expect(
                self.encoder_layout == "uniform" or not overlaid,
                "Expected `encoder_layout='uniform'` beside a uniform decoder, because the encoder fixes the "
                f"positions of `key_values` slots; got 'sequential' with a uniform decoder for {overlaid}: set "
                "`decoder_layout='sequential'`.",
            )
        expect(
            type(self.lora_r) is int and self.lora_r >= 1,
            f"Expected `lora_r` of at least 1, got {self.lora_r!r}.",
        )
        expect(
            type(self.lora_alpha) in (int, float) and 0 < self.lora_alpha < math.inf,
            f"Expected `lora_alpha`, a number above 0, got {self.lora_alpha!r}.",
        )
        expect(bool(self.lora_target_modules), "Expected `lora_target_modules` with at least one name, got none.")
        expect(
            type(self.lora_dropout) in (int, float) and 0 <= self.lora_dropout < 1,
            f"Expected `lora_dropout`, a number in [0, 1), got {self.lora_dropout!r}.",
        )
        if self.text_config is not None:
            limit = self.num_positions
            expect(
                limit is None or self.span_length < limit,
                f"Expected `span_length` below the base's {limit} positions, got {self.span_length}; lower it.",
            )


__all__ = ["ICAEConfig"]
