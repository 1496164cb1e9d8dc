"""
`attn_implementation="grouped"`: attention for training on CPUs.

transformers' eager attention copies the keys and values of grouped-query models once per query head and sums their
gradients again; torch's fused kernel has a slow backward pass on CPUs. Here all query heads that share a key head are
one matrix product. Importing this module makes the name known to transformers.
"""

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask


def grouped_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    What eager attention computes. Query `(B, H, T, D)`, key and value `(B, G, S, D)`, additive mask `(B, 1, T, S)`;
    returns the output, `(B, T, H, D)`, and the attention weights, `(B, H, T, S)`.
    """
    rows, heads, length, size = query.shape
    groups, width = key.shape[1:3]
    scaling = size**-0.5 if scaling is None else scaling
    query = (query * scaling).reshape(rows, groups, -1, size)  # (B, G, H / G * T, D)
    scores = (query @ key.transpose(2, 3)).view(rows, groups, -1, length, width)
    if softcap is not None:  # Gemma 2
        scores = softcap * torch.tanh(scores / softcap)
    if attention_mask is not None:
        scores = scores + attention_mask[:, :, None]
    if s_aux is not None:  # gpt-oss: each head can also look at nothing
        nothing = s_aux.view(groups, -1, 1, 1).expand(rows, -1, -1, length, 1)
        weights = torch.cat([scores, nothing], dim=-1).softmax(dim=-1)[..., :-1]
    else:
        weights = scores.softmax(dim=-1)
    weights = F.dropout(weights, dropout, module.training)
    output = weights.view(rows, groups, -1, width) @ value  # (B, G, H / G * T, D)
    output = output.view(rows, heads, length, size).transpose(1, 2).contiguous()
    return output, weights.view(rows, heads, length, width)


AttentionInterface.register("grouped", grouped_attention)
AttentionMaskInterface.register("grouped", eager_mask)
