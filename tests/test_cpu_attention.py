"""`attn_implementation="grouped"` computes what transformers' eager attention computes."""

import pytest
import torch

import icae.trainers.cpu_attention  # noqa: F401  (registers the name)
from tiny import FAMILIES, make_base


@pytest.mark.parametrize("family", [*FAMILIES, "gpt_oss"])
def test_losses_and_gradients_are_those_of_eager_attention(make_icae, ragged, family):
    ids, mask = ragged
    results = []
    for name in ("eager", "grouped"):
        base = make_base(family, **({"num_local_experts": 4} if family == "gpt_oss" else {}))
        for index, layer in enumerate(base.base_model.layers if family == "gpt_oss" else ()):
            torch.nn.init.normal_(layer.self_attn.sinks, generator=torch.Generator().manual_seed(index))
        base.set_attn_implementation(name)
        model = make_icae(base=base)
        output = model(ids, mask, continuation_ids=ids[:, :6])
        output.loss.backward()
        assert base.config._attn_implementation == name
        results.append([output.loss.detach(), *(p.grad for p in model.trainable_parameters().values())])
    for eager, grouped in zip(*results, strict=True):
        torch.testing.assert_close(grouped, eager, atol=1e-5, rtol=1e-4)


def test_the_mask_is_kept(make_icae, ragged):
    base = make_base()
    base.set_attn_implementation("grouped")
    model = make_icae(base=base)
    ids, mask = ragged
    batch = model.compress(ids, mask)
    alone = model.compress(ids[1][mask[1].bool()][None])
    torch.testing.assert_close(batch[1].slots, alone.slots, atol=1e-5, rtol=1e-4)
