# Copyright 2026 The ICAE authors. Licensed under the Apache License, Version 2.0.
"""The pipeline task `icae-context-generation`: answers to prompts about contexts or memories."""

import itertools
from collections.abc import Iterable
from typing import Any

from transformers import AutoModel, AutoTokenizer, Pipeline
from transformers.pipelines import PIPELINE_REGISTRY

from .memory_icae import ICAEMemory


TASK = "icae-context-generation"
ANSWER_LENGTH = 256  # tokens
LENGTHS = ("max_new_tokens", "max_length")


class ICAEContextGenerationPipeline(Pipeline):
    """
    Answers prompts from compressed contexts.

    An input is a dict with `prompt` — a text, a conversation, or a list of texts that are all asked about the same
    context — and either `context` (a text, or a list of texts, each compressed apart) or `memory` (an
    [`ICAEMemory`] of one row). A bare context goes with `prompt=`, which also is the default for dicts without one.
    Lists, generators and data sets of inputs are answered in batches of `batch_size`; all but lists give an iterator.

    The output for one input is a list of `{"generated_text": …}`, one per `num_return_sequences`; for a list of
    prompts it is a list of such lists. All of generate's arguments can be given, here or at each call, and `window`
    and `span_length` of [`~ICAEForConditionalGeneration.compress`]; without a length, answers have up to 256 tokens,
    or as many as the base has positions left for behind the longest input of a batch.

    Example:

    ```python
    >>> from transformers import pipeline

    >>> pipe = pipeline("icae-context-generation", model="org/icae-llama-7b", trust_remote_code=True)
    >>> pipe({"context": report, "prompt": "Who wrote it?"}, max_new_tokens=16)
    [{'generated_text': 'Ines Okafor'}]
    >>> memory = pipe.model.compress(report)
    >>> pipe([{"memory": memory, "prompt": "Who wrote it?"}, {"context": other, "prompt": "When?"}], batch_size=2)
    ```
    """

    _load_tokenizer = False  # the model brings its own
    _load_processor = _load_image_processor = _load_feature_extractor = _load_video_processor = False
    _pipeline_calls_generate = True

    def __init__(self, model, tokenizer=None, **kwargs):
        if tokenizer is not None:
            model.tokenizer = AutoTokenizer.from_pretrained(tokenizer) if isinstance(tokenizer, str) else tokenizer
        self._given = {name: kwargs.get(name) for name in (*LENGTHS, "generation_config")}
        super().__init__(model=model, tokenizer=model.tokenizer, **kwargs)

    def __call__(self, inputs, **kwargs):
        if isinstance(inputs, list) and not inputs:
            return []
        if isinstance(inputs, Iterable) and not isinstance(inputs, str | dict | list | tuple):
            inputs = (row for row in inputs)  # of all that can be read row by row, Pipeline knows generators
        return super().__call__(inputs, **kwargs)

    def _sanitize_parameters(self, prompt=None, span_length=None, window=None, **generate_kwargs):
        how = {"span_length": span_length, "window": window}
        if how := {name: value for name, value in how.items() if value is not None}:
            generate_kwargs["how_to_compress"] = how
        return ({} if prompt is None else {"prompt": prompt}), generate_kwargs, {}

    def preprocess(self, inputs: dict[str, Any] | str | ICAEMemory, prompt: Any = None) -> dict[str, Any]:
        if isinstance(inputs, ICAEMemory):
            inputs = {"memory": inputs}
        elif not isinstance(inputs, dict):
            inputs = {"context": inputs}
        inputs = {"prompt": prompt} | {name: value for name, value in inputs.items() if value is not None}
        unknown = set(inputs) - {"context", "memory", "prompt"}
        if inputs["prompt"] is None or ("context" in inputs) == ("memory" in inputs) or unknown:
            raise ValueError(
                "Expected a dict with `prompt` and either `context` or `memory`, got the keys "
                f"{sorted(key for key, value in inputs.items() if value is not None)}."
            )
        if "memory" in inputs and not isinstance(inputs["memory"], ICAEMemory):
            raise TypeError(
                f"Expected a memory as `compress` gives it, got {type(inputs['memory']).__name__}; a text goes under "
                "`context`, and of a memory file, `ICAEMemory.load(file)`."
            )
        if "memory" in inputs and len(inputs["memory"]) != 1:
            raise ValueError(
                f"Expected a memory of one row in an input, got {len(inputs['memory'])} rows; give each row of it "
                "(`memory.rows()`) as an input of its own."
            )
        prompts = inputs["prompt"]
        if not isinstance(prompts, str | list | tuple):
            raise ValueError(f"Expected a prompt as str, a list of them, or a conversation, got {prompts!r}.")
        several = isinstance(prompts, list | tuple) and all(isinstance(one, str | list | tuple) for one in prompts)
        return inputs | {"prompts": list(prompts) if several else [prompts], "several": several}

    def _forward(
        self, model_inputs: list[dict[str, Any]], how_to_compress: dict[str, int] | None = None, **generate_kwargs
    ) -> list[dict[str, Any]]:
        contexts = [row["context"] for row in model_inputs if "context" in row]
        compressed = iter(self.model.compress(contexts, **how_to_compress or {}).rows() if contexts else ())
        memories = [row["memory"] if "memory" in row else next(compressed) for row in model_inputs]
        prompts = self.model.encode_prompts([prompt for row in model_inputs for prompt in row["prompts"]])
        memory = memories[0]  # one context and many prompts: its slots are opened once
        if len(memories) > 1:
            asked = zip(memories, model_inputs, strict=True)
            memory = ICAEMemory.stack([memory for memory, row in asked for _ in row["prompts"]])
        output = self.model.generate(memory=memory, prompt=prompts, **self._with_defaults(generate_kwargs, prompts))
        sequences = getattr(output, "sequences", output)
        texts = self.tokenizer.batch_decode(sequences, skip_special_tokens=True)
        sequences_each = len(texts) // len(prompts)
        answers = (texts[first : first + sequences_each] for first in range(0, len(texts), sequences_each))
        return [row | {"answers": [next(answers) for _ in row["prompts"]]} for row in model_inputs]

    def _with_defaults(self, generate_kwargs: dict[str, Any], prompts: list[list[int]]) -> dict[str, Any]:
        """With what was given at the start, and a length if none was."""
        if generate_kwargs.get("generation_config", 0) is None:
            generate_kwargs = {name: value for name, value in generate_kwargs.items() if name != "generation_config"}
        if hasattr(self, "generation_config"):  # transformers 5.19 has prepared it, with a length of its own
            options = {"generation_config": self.generation_config} | generate_kwargs
        else:
            options = self._prepare_generate_kwargs(generate_kwargs)
        # A configuration that comes with the call takes the place of all that was given at the start.
        given = generate_kwargs if "generation_config" in generate_kwargs else self._given | generate_kwargs
        configs = [self.model.generation_config, given.get("generation_config") or self.model.generation_config]
        lengths = [given.get(name) for name in LENGTHS] + [getattr(one, name) for one in configs for name in LENGTHS]
        if all(length is None for length in lengths):
            # Not `max_new_tokens`, of which the base may have too few positions left.
            options["max_length"] = max(map(len, prompts)) + ANSWER_LENGTH
        return options

    def postprocess(self, model_outputs: dict[str, Any]) -> list[Any]:
        answers = [[{"generated_text": text} for text in texts] for texts in model_outputs["answers"]]
        return answers if model_outputs["several"] else answers[0]

    def get_iterator(self, inputs, num_workers, batch_size, preprocess_params, forward_params, postprocess_params):
        """Batches whole inputs, because memories and lists of texts cannot be padded like tensors."""
        if batch_size < 1:
            raise ValueError(f"Expected a `batch_size` of at least 1, got {batch_size}.")
        rows = (self.preprocess(row, **preprocess_params) for row in inputs)
        while batch := list(itertools.islice(rows, batch_size)):
            for outputs in self.forward(batch, **forward_params):
                yield self.postprocess(outputs, **postprocess_params)

    def run_single(self, inputs, preprocess_params, forward_params, postprocess_params):
        return next(self.get_iterator([inputs], 0, 1, preprocess_params, forward_params, postprocess_params))


# A repository's copy of this file leaves the task to the package, if that is there.
if __package__ == "icae.modeling_icae" or TASK not in PIPELINE_REGISTRY.supported_tasks:
    PIPELINE_REGISTRY.register_pipeline(TASK, ICAEContextGenerationPipeline, pt_model=AutoModel, type="text")

__all__ = ["ICAEContextGenerationPipeline"]
