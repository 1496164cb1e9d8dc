# Copyright 2026 The ICAE authors. Licensed under the Apache License, Version 2.0.
"""
Gradient checkpointing of a language model that is run twice, with and without its adapter, and that sees its memory
through a cache.

transformers' own checkpointing drops the cache, and recomputes a layer with the adapter in whatever state it is at the
time of the backward pass. Here the cache goes in and out as tensors, and the adapter is set as it was.
"""

from functools import partial

import torch
from transformers import DynamicCache


class LayerView:
    """The cache of one layer during a checkpointed call: explicit tensors in, explicit tensors out."""

    def __init__(self, keys: torch.Tensor | None, values: torch.Tensor | None):
        self.keys, self.values = keys, values

    def update(self, keys, values, *args, **kwargs):
        self.new_keys, self.new_values = keys, values
        if self.keys is not None and self.values is not None:
            keys, values = torch.cat([self.keys, keys], dim=-2), torch.cat([self.values, values], dim=-2)
        return keys, values

    def get_seq_length(self, *args) -> int:
        return 0 if self.keys is None else self.keys.shape[-2]


def checkpointed_forward(model, layer, index: int, checkpoint_func, hidden_states, *args, before=None, **kwargs):
    """
    What stands in place of a layer's forward method.

    Args:
        model ([`ICAEPreTrainedModel`]): whose `adapter` switch is remembered and set again.
        layer (`nn.Module`): the layer.
        index (`int`): the layer's index in the cache.
        checkpoint_func (`Callable`): `torch.utils.checkpoint.checkpoint` with its options bound.
        hidden_states, args, kwargs: arguments of the layer.
        before (`Callable`, *optional*): what stood in place of its forward method before.
    """
    forward = before or partial(type(layer).forward, layer)
    name = "layer_past" if "layer_past" in kwargs else "past_key_values"
    cache = kwargs.get(name)
    if not torch.is_grad_enabled() or not isinstance(cache, DynamicCache):
        return forward(hidden_states, *args, **kwargs)
    adapter_enabled = model.adapter_enabled
    seen = cache.layers[index] if index < len(cache.layers) else None

    gives_tuple = False

    def run(hidden_states, keys, values):
        nonlocal gives_tuple
        view = LayerView(keys, values)
        with model.adapter(adapter_enabled):
            output = forward(hidden_states, *args, **{**kwargs, name: view})
        gives_tuple = isinstance(output, tuple)  # GPT-J's; re-entrant checkpointing finds no tensors inside of one
        return *(output if gives_tuple else (output,)), view.new_keys, view.new_values

    past = (None, None) if seen is None or not seen.is_initialized else (seen.keys, seen.values)
    *output, keys, values = checkpoint_func(run, hidden_states, *past)
    cache.update(keys, values, index)
    return tuple(output) if gives_tuple else output[0]
