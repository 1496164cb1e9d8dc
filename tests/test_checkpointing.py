"""Gradient checkpointing: two passes over one set of layers, one with the adapter, one without, joined by a cache."""

import copy
from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from tiny import FAMILIES, make_base


MEMORY_TYPES = ["key_values", "hidden_states"]
close = torch.testing.assert_close


@pytest.fixture(params=MEMORY_TYPES)
def model(request, make_icae):
    return make_icae(memory_type=request.param).train()


def gradients(model, ids, mask, seed=0):
    """Gradients of all three tasks at once."""
    model.zero_grad()
    torch.manual_seed(seed)
    output = model(
        ids,
        mask,
        continuation_ids=ids[:, :6],
        prompt_ids=ids[:, 6:9],
        response_ids=ids[:, 9:14],
        autoencoding_weight=0.5,
        continuation_weight=0.5,
    )
    output.loss.backward()
    assert set(output.task_losses) == {"autoencoding", "continuation", "instruction"}
    return {name: parameter.grad.clone() for name, parameter in model.trainable_parameters().items()}


def same(found, expected, atol=1e-6):
    assert found.keys() == expected.keys() and any(gradient.abs().max() > 1e-3 for gradient in expected.values())
    for name, gradient in expected.items():
        close(found[name], gradient, atol=atol, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("memory_type", MEMORY_TYPES)
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_gradients_of_every_family_are_those_without(make_icae, ragged, family, memory_type, use_reentrant):
    model = make_icae(family, memory_type=memory_type).train()
    expected = gradients(model, *ragged)
    model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    same(gradients(model, *ragged), expected)


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("family", ["gptj", "codegen"])
def test_gradients_of_layers_that_give_a_tuple_are_those_without(make_icae, ragged, family, use_reentrant):
    base = make_base(family, n_embd=32, n_layer=2, n_head=4, rotary_dim=8, n_positions=512, n_inner=48)
    model = make_icae(base=base).train()
    expected = gradients(model, *ragged)
    model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    same(gradients(model, *ragged), expected)


@pytest.mark.parametrize("layout", ["uniform", "sequential"])
@pytest.mark.parametrize("memory_type", MEMORY_TYPES)
def test_the_layout_makes_no_difference(make_icae, ragged, memory_type, layout):
    model = make_icae(memory_type=memory_type, encoder_layout=layout, decoder_layout=layout).train()
    expected = gradients(model, *ragged)
    model.activation_checkpointing_enable({"use_reentrant": False})
    same(gradients(model, *ragged), expected)


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("memory_type", MEMORY_TYPES)
def test_dropout_is_drawn_again_as_it_was(make_icae, ragged, memory_type, use_reentrant):
    model = make_icae(memory_type=memory_type, lora_dropout=0.5).train()
    expected = gradients(model, *ragged)
    other = gradients(model, *ragged, seed=1)
    assert any(not torch.equal(other[name], gradient) for name, gradient in expected.items()), "nothing is dropped"
    model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    same(gradients(model, *ragged), expected)


def test_gradients_add_up_over_micro_batches(model, ragged):
    ids, mask = ragged

    def accumulated():
        model.zero_grad()
        for part in (slice(0, 2), slice(2, 4)):
            model(ids[part], mask[part]).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.trainable_parameters().items()}

    model.activation_checkpointing_disable()
    expected = accumulated()
    model.activation_checkpointing_enable({"use_reentrant": False})
    same(accumulated(), expected)


def test_two_passes_before_one_backward_do_not_disturb_each_other(model, ragged):
    """The backward of the first comes after the second has switched the adapter to and fro."""
    ids, mask = ragged

    def together():
        model.zero_grad()
        first, second = model(ids[:2], mask[:2]).loss, model(ids[2:], mask[2:]).loss
        (first + second).backward()
        return {name: parameter.grad.clone() for name, parameter in model.trainable_parameters().items()}

    expected = together()
    model.activation_checkpointing_enable({"use_reentrant": False})
    same(together(), expected)


def test_the_adapter_rests_after_a_checkpointed_backward(model, ragged):
    model.activation_checkpointing_enable({"use_reentrant": False})
    gradients(model, *ragged)
    assert not model.adapter_enabled
    ids = ragged[0]
    assert torch.equal(model.language_model(ids).logits, make_base()(ids).logits)


def test_less_is_kept_for_the_backward_pass(model, ragged):
    def kept():
        total = {}

        def pack(tensor):
            if not isinstance(tensor, torch.nn.Parameter):
                total[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(*ragged).loss
        return sum(total.values()), loss.item()

    plain, expected = kept()
    model.activation_checkpointing_enable({"use_reentrant": False})
    checkpointed, loss = kept()
    assert loss == pytest.approx(expected, abs=1e-6)
    assert checkpointed < 0.6 * plain


def test_the_frozen_base_gets_no_gradient(model, ragged):
    model.activation_checkpointing_enable({"use_reentrant": False})
    gradients(model, *ragged)
    trained = set(model.trainable_parameters())
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if name not in trained)


def test_every_second_layer_can_be_checkpointed(make_icae, ragged):
    model = make_icae(base=make_base(num_hidden_layers=4)).train()
    expected = gradients(model, *ragged)
    model._set_gradient_checkpointing(True, partial(checkpoint, use_reentrant=False), every_n_layers=2)
    layers = [module for module in model.language_model.modules() if isinstance(module, GradientCheckpointingLayer)]
    assert ["forward" in layer.__dict__ for layer in layers] == [True, False, True, False]
    same(gradients(model, *ragged), expected)


def test_switching_it_on_twice_and_off_leaves_the_layers_as_they_were(model, ragged):
    expected = gradients(model, *ragged)
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.activation_checkpointing_enable({"use_reentrant": False})
    same(gradients(model, *ragged), expected)
    model.activation_checkpointing_disable()
    layers = [module for module in model.language_model.modules() if isinstance(module, GradientCheckpointingLayer)]
    assert layers and not any("forward" in layer.__dict__ for layer in layers)
    same(gradients(model, *ragged), expected)


def test_compressing_and_generating_are_the_same_with_it(model, ragged):
    model.eval()
    memory = model.compress(*ragged)
    answer = model.generate(memory=memory, task="autoencoding", max_new_tokens=6, do_sample=False)
    losses = model(*ragged).token_losses["autoencoding"]
    model.activation_checkpointing_enable({"use_reentrant": False})
    assert torch.equal(model.compress(*ragged).slots, memory.slots)
    again = model.generate(memory=memory, task="autoencoding", max_new_tokens=6, do_sample=False)
    assert torch.equal(again, answer)
    close(model(*ragged).token_losses["autoencoding"], losses)


def test_bfloat16_gradients_are_those_without(make_icae, ragged):
    model = make_icae(base=make_base().bfloat16()).train()
    expected = gradients(model, *ragged)
    model.activation_checkpointing_enable({"use_reentrant": False})
    same(gradients(model, *ragged), expected, atol=1e-3)


def test_a_copy_computes_the_same_with_its_own_weights(model, ragged):
    model.activation_checkpointing_enable({"use_reentrant": False})
    expected = model(*ragged).loss
    twin = copy.deepcopy(model)
    close(twin(*ragged).loss, expected)
    with torch.no_grad():
        for parameter in model.trainable_parameters().values():
            parameter.zero_()
    close(twin(*ragged).loss, expected)
