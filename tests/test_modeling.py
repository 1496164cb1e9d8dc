import copy

import pytest
import torch
import torch.nn.functional as F
from transformers.modeling_layers import GradientCheckpointingLayer

from icae import ICAEConfig, ICAEForConditionalGeneration
from tiny import FAMILIES, make_base


MEMORY_TYPES = ["key_values", "hidden_states"]
LAYOUTS = ["uniform", "sequential"]
close = torch.testing.assert_close


@pytest.fixture(params=MEMORY_TYPES)
def model(request, make_icae):
    return make_icae(memory_type=request.param)


def single(ids, mask, row):
    return ids[row][mask[row].bool()][None]


# ------------------------------------------------------------------------------------------------------------ compress


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("memory_type", MEMORY_TYPES)
def test_a_batch_of_any_lengths_equals_its_rows(make_icae, ragged, family, memory_type):
    model = make_icae(family, memory_type=memory_type)
    memory = model.compress(*ragged)
    for row in range(4):
        alone = model.compress(single(*ragged, row))
        count = int(alone.num_slots)
        close(memory.slots[row, :count], alone.slots[0], atol=2e-5, rtol=1e-4)
        assert torch.equal(memory.positions[row, :count], alone.positions[0])


def test_slots_depend_on_neither_the_side_nor_the_content_of_padding(model, ragged):
    ids, mask = ragged
    other_padding = torch.where(mask.bool(), ids, (ids + 7) % 90 + 5)
    left = torch.stack([torch.cat([row[~m.bool()], row[m.bool()]]) for row, m in zip(ids, mask, strict=True)])
    expected = model.compress(ids, mask)
    close(model.compress(other_padding, mask).slots, expected.slots)
    close(model.compress(left, mask.sort(dim=1).values).slots, expected.slots)


def test_slots_do_not_depend_on_how_many_spans_are_encoded_at_once(model, ragged):
    expected = model.compress(*ragged).slots
    for number in (1, 2, 5):
        close(model.compress(*ragged, max_spans_per_batch=number).slots, expected, atol=2e-5, rtol=1e-4)


def test_a_memory_says_how_many_slots_stand_for_how_many_tokens(model, ragged):
    memory = model.compress(*ragged)
    assert memory.spans == [[(4, 16), (4, 16), (2, 8)], [(2, 8)], [(4, 16), (1, 1)], [(4, 16), (4, 14)]]
    assert memory.num_tokens.tolist() == [40, 8, 17, 30] and memory.num_slots.tolist() == [10, 2, 5, 8]
    assert memory.positions[2].tolist() == [4, 8, 12, 16, 17, 0, 0, 0, 0, 0]
    assert memory.end.tolist() == [41, 9, 18, 31]


def test_sequential_slots_stand_behind_their_span(make_icae, ragged):
    memory = make_icae(encoder_layout="sequential", decoder_layout="sequential").compress(*ragged)
    assert memory.positions[2, :5].tolist() == [17, 18, 19, 20, 22]


def test_slots_of_another_text_are_others(model, ragged):
    ids, mask = ragged
    changed = ids.clone()
    changed[0, 3] = (changed[0, 3] + 1) % 90 + 5
    before, after = model.compress(ids, mask).slots, model.compress(changed, mask).slots
    assert (before[0, 0] - after[0, 0]).abs().max() > 1e-3
    assert torch.equal(before[1], after[1])


def test_spans_do_not_see_each_other(model, ragged):
    ids, mask = ragged
    changed = ids.clone()
    changed[0, :16] = changed[0, :16].flip(0)
    before, after = model.compress(ids, mask).slots, model.compress(changed, mask).slots
    close(before[0, 4:], after[0, 4:], atol=2e-5, rtol=1e-4)


def test_bfloat16_gives_bfloat16_slots(make_icae, ragged):
    model = make_icae(base=make_base().bfloat16())
    memory = model.compress(*ragged)
    assert memory.slots.dtype == torch.bfloat16 and torch.isfinite(memory.slots).all()


# ------------------------------------------------------------------------------------------------------------- forward


def reference_loss(base, merged, model, ids, memory_type, layout):
    """The autoencoding loss of one span, from the plain base and a copy with the adapter merged in: hand-made mask,
    no cache, all logits."""
    embed = base.get_input_embeddings()
    length = ids.shape[1]
    num_slots = -(-length // 4)
    text, start = embed(ids), embed(torch.tensor([[1]]))
    slots = model.memory_embeddings[None, :num_slots]
    ends = -(-torch.arange(num_slots + 1) * length // num_slots)
    starts, ends = ends[:-1] + 1, ends[1:]
    middles = (starts + ends + 1) // 2
    slot_positions = middles if layout == "uniform" else length + torch.arange(1, num_slots + 1)
    tokens = torch.arange(1, length + 1)
    encoder_positions = torch.cat([torch.zeros(1, dtype=torch.long), tokens, slot_positions])[None]
    mark = model.task_embeddings[None, :1]
    if memory_type == "hidden_states":
        encoded = merged.model(
            inputs_embeds=torch.cat([start, text, slots], 1),
            position_ids=encoder_positions,
            attention_mask=causal(1 + length + num_slots),
        ).last_hidden_state[:, -num_slots:]
        memory_positions = ends if layout == "uniform" else torch.arange(1, num_slots + 1)
        begin = 0 if layout == "uniform" else num_slots + 1
        positions = torch.cat([torch.zeros(1, dtype=torch.long), memory_positions, begin + torch.arange(length + 1)])
        hidden = base.model(
            inputs_embeds=torch.cat([start, encoded, mark, text], 1),
            position_ids=positions[None],
            attention_mask=causal(2 + num_slots + length),
        ).last_hidden_state
    else:
        kept = {}
        encode(merged, torch.cat([start, text, slots], 1), encoder_positions, num_slots, kept)
        begin = 0 if layout == "uniform" else length + num_slots + 1
        positions = torch.cat([torch.zeros(1, dtype=torch.long), begin + torch.arange(length + 1)])[None]
        hidden = read(base, torch.cat([start, mark, text], 1), positions, kept, num_slots)
    logits = base.lm_head(hidden[:, -length - 1 :])
    return F.cross_entropy(logits[0], torch.cat([ids[0], torch.tensor([2])]))


def causal(size, extra=0):
    """A 4-D mask: each place sees itself and what stands before it; the first `extra` columns are slots."""
    allowed = torch.ones(size, size).tril().bool()
    return torch.where(allowed, 0.0, torch.finfo(torch.float32).min)[None, None]


def encode(merged, embeds, positions, num_slots, kept):
    """Runs the encoder and keeps the rotated keys and the values at the slots, layer by layer."""
    from transformers.models.llama import modeling_llama

    original = modeling_llama.eager_attention_forward

    def spy(module, query, key, value, mask, **kwargs):
        kept[module.layer_idx] = key[:, :, -num_slots:], value[:, :, -num_slots:]
        return original(module, query, key, value, mask, **kwargs)

    run_with(modeling_llama, spy, merged, embeds, positions, causal(embeds.shape[1]))


def read(base, embeds, positions, kept, num_slots):
    """Runs the decoder: the first place is the start token, then come the slots, then the text."""
    from transformers.models.llama import modeling_llama

    original = modeling_llama.eager_attention_forward
    size = embeds.shape[1]
    mask = causal(size + num_slots)[:, :, torch.tensor([0, *range(1 + num_slots, size + num_slots)])]
    plain = causal(size)

    def spy(module, query, key, value, _, **kwargs):
        keys, values = kept[module.layer_idx]
        key = torch.cat([key[:, :, :1], keys, key[:, :, 1:]], 2)
        value = torch.cat([value[:, :, :1], values, value[:, :, 1:]], 2)
        return original(module, query, key, value, mask, **kwargs)

    return run_with(modeling_llama, spy, base, embeds, positions, plain)


def run_with(modeling_llama, attention, model, embeds, positions, mask):
    before = modeling_llama.eager_attention_forward
    modeling_llama.eager_attention_forward = attention
    try:
        return model.model(inputs_embeds=embeds, position_ids=positions, attention_mask=mask).last_hidden_state
    finally:
        modeling_llama.eager_attention_forward = before


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("memory_type", MEMORY_TYPES)
def test_the_loss_equals_an_independent_implementation_with_the_adapter_merged(make_icae, memory_type, layout):
    base = make_base(attn_implementation="eager")
    plain = copy.deepcopy(base)
    model = make_icae(base=base, memory_type=memory_type, encoder_layout=layout, decoder_layout=layout)
    merged = copy.deepcopy(plain)
    for name, layer in model.language_model.named_modules():
        if hasattr(layer, "lora_A"):
            merged.get_submodule(name).weight.data += layer.get_delta_weight("icae")
    ids = torch.randint(5, 90, (1, 14), generator=torch.Generator().manual_seed(3))
    expected = reference_loss(plain, merged, model, ids, memory_type, layout)
    close(model(context_ids=ids).loss, expected, atol=1e-5, rtol=1e-5)


def test_losses_are_means_over_the_targets_of_each_task(model, ragged):
    ids, mask = ragged
    follow, follow_mask = ids[:, :6], mask[:, :6]
    output = model(ids, mask, continuation_ids=follow, continuation_mask=follow_mask, autoencoding_weight=0.4)
    for task, losses in output.token_losses.items():
        targets = output.token_masks[task]
        assert (losses[~targets] == 0).all()
        close(output.task_losses[task], losses.sum() / targets.sum())
    assert output.token_masks["autoencoding"].sum(dim=1).tolist() == [41, 9, 18, 31]  # with the end token
    assert output.token_masks["continuation"].sum(dim=1).tolist() == [6, 6, 6, 0]
    losses = output.task_losses
    close(output.loss, 0.4 * losses["autoencoding"] + 0.6 * losses["continuation"])


def test_a_batch_of_losses_equals_its_rows(model, ragged):
    ids, mask = ragged
    batch = model(ids, mask, continuation_ids=ids[:, :6]).token_losses
    for row in range(4):
        alone = model(single(ids, mask, row), continuation_ids=ids[row : row + 1, :6]).token_losses
        for task, losses in alone.items():
            close(batch[task][row, : losses.shape[1]], losses[0], atol=1e-4, rtol=1e-4)


def test_the_response_is_predicted_from_the_end_of_the_prompt_on(model, ragged):
    ids, mask = ragged
    prompt, response = ids[:, :5], ids[:, 5:9]
    prompt_mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 1, 1, 1, 1]])
    response_mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 1, 1, 1], [1, 1, 1, 1]])
    output = model(
        ids, mask, prompt_ids=prompt, prompt_mask=prompt_mask, response_ids=response, response_mask=response_mask
    )
    assert set(output.task_losses) == {"instruction"}
    assert output.token_masks["instruction"].sum(dim=1).tolist() == [4, 2, 3, 4]
    for row in range(4):
        alone = model(
            single(ids, mask, row),
            prompt_ids=single(prompt, prompt_mask, row),
            response_ids=single(response, response_mask, row),
        )
        targets = output.token_masks["instruction"][row]
        expected = alone.token_losses["instruction"][alone.token_masks["instruction"]]
        close(output.token_losses["instruction"][row][targets], expected, atol=1e-4, rtol=1e-4)


def test_the_decoder_sees_the_context_only_through_the_slots(model, ragged):
    """Behind fixed slots nothing of the context is left: the continuation depends on the memory alone."""
    ids, mask = ragged
    memory = model.compress(ids, mask)
    follow = ids[:, :6]
    expected = model(memory=memory, continuation_ids=follow, autoencoding_weight=0).token_losses["continuation"]
    other = (ids + 11) % 90 + 5
    found = model(context_ids=other, memory=memory, continuation_ids=follow, autoencoding_weight=0)
    assert torch.equal(found.token_losses["continuation"], expected)


def test_every_slot_matters(model, ragged):
    """Position ids that jump make transformers cut a sequence apart when no mask is given; then slots are not seen."""
    ids, mask = ragged
    memory = model.compress(ids, mask)
    before = model(context_ids=ids, context_mask=mask, memory=memory).token_losses["autoencoding"]
    for slot in range(10):
        changed = copy.copy(memory)
        changed.slots = memory.slots.clone()
        changed.slots[0, slot] += 1.0
        after = model(context_ids=ids, context_mask=mask, memory=changed).token_losses["autoencoding"]
        assert (after[0] - before[0]).abs().max() > 1e-4
        close(after[1:], before[1:])


def test_token_correct_marks_the_most_likely_token(model, ragged):
    ids, mask = ragged
    memory = model.compress(ids, mask)
    best = model.generate(memory=memory[1], task="autoencoding", max_new_tokens=1)
    hit = model(context_ids=best, memory=memory[1]).token_correct["autoencoding"]
    miss = model(context_ids=best + 1, memory=memory[1]).token_correct["autoencoding"]
    assert hit[0, 0] and not miss[0, 0]
    assert model.train()(ids, mask).token_correct == {}


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_chunked_loss_equals_the_full_one_with_its_gradients(make_icae, family, monkeypatch):
    model = make_icae(family)
    hidden = torch.randn(10, 32, requires_grad=True)
    labels = torch.randint(0, 90, (10,))
    full = F.cross_entropy(model._logits(hidden), labels, reduction="none")
    (expected,) = torch.autograd.grad((full * torch.arange(10)).sum(), hidden)
    monkeypatch.setattr(type(model), "_loss_chunk_size", 4)
    chunked, _ = model._cross_entropy(hidden, labels)
    (found,) = torch.autograd.grad((chunked * torch.arange(10)).sum(), hidden)
    close(chunked, full)
    close(found, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_base(family):
    base = make_base(family)
    ids = torch.randint(5, 90, (2, 9))
    expected = base(ids).logits
    model = ICAEForConditionalGeneration.from_base(base, ICAEConfig(span_length=16))
    close(model._logits(base.base_model(ids).last_hidden_state), expected)


# ------------------------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("memory_type", MEMORY_TYPES)
def test_every_trained_tensor_moves_and_every_frozen_one_stays_bit_equal(make_icae, ragged, family, memory_type):
    base = make_base(family)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = make_icae(family, base=base, memory_type=memory_type)
    trained = {name: parameter.detach().clone() for name, parameter in model.trainable_parameters().items()}
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(*ragged, continuation_ids=ragged[0][:, :6]).loss.backward()
    optimizer.step()
    for name, parameter in model.trainable_parameters().items():
        assert not torch.equal(parameter, trained[name]), f"{name} did not move"
    after = {name.replace(".base_layer", ""): tensor for name, tensor in base.state_dict().items()}
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), f"{name} of the frozen base moved"


def test_the_adapter_is_on_in_the_encoder_and_off_in_the_decoder(model, ragged):
    seen = []
    layer = model._lora_layers[0]
    layer.register_forward_pre_hook(lambda module, args: seen.append(not module.disable_adapters))
    memory = model.compress(*ragged)
    assert seen == [True]
    seen.clear()
    model.generate(memory=memory, task="autoencoding", max_new_tokens=2)
    assert seen and not any(seen)


def test_the_adapter_goes_back_whatever_happens(model):
    assert not model.adapter_enabled
    with pytest.raises(RuntimeError, match="on purpose"), model.adapter(True):
        assert model.adapter_enabled
        with model.adapter(False):
            assert not model.adapter_enabled
        assert model.adapter_enabled
        raise RuntimeError("on purpose")
    assert not model.adapter_enabled


def test_the_resting_language_model_is_the_frozen_base(make_icae):
    ids = torch.randint(5, 90, (2, 9))
    expected = make_base()(ids).logits
    assert torch.equal(make_icae().language_model(ids).logits, expected)


def test_only_the_adapter_s_dropout_ever_trains(make_icae):
    model = make_icae("gpt2", lora_dropout=0.5).train()  # GPT-2 has dropout of its own
    training = {name for name, module in model.language_model.named_modules() if module.training}
    assert training and all("lora_dropout" in name for name in training)


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_checkpointed_gradients_are_exact(model, ragged, use_reentrant):
    model.train()
    calls = []

    def gradients():
        model.zero_grad()
        model(*ragged, continuation_ids=ragged[0][:, :6]).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.trainable_parameters().items()}

    expected = gradients()
    hook = model._lora_layers[0].register_forward_pre_hook(lambda *args: calls.append(model.adapter_enabled))
    plain = gradients()
    once = len(calls)
    model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    found = gradients()
    assert len(calls) > 2 * once, "nothing was computed again"
    hook.remove()
    for name, gradient in found.items():
        close(plain[name], expected[name])
        close(gradient, expected[name], atol=1e-6, rtol=1e-5)
    model.activation_checkpointing_disable()
    layers = [module for module in model.language_model.modules() if isinstance(module, GradientCheckpointingLayer)]
    assert layers and all("forward" not in layer.__dict__ for layer in layers)


def test_padded_slots_stay_inside_the_positions_of_an_absolute_base(make_icae):
    """A short context beside a long one: the places of slots that it does not have must exist all the same."""
    model = make_icae("gpt2", base=make_base("gpt2", n_positions=130), span_length=128)
    ids = torch.randint(5, 90, (2, 128))
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    assert model.compress(ids, mask).num_slots.tolist() == [2, 32]


# ------------------------------------------------------------------------------------------- tasks, precision, adapter


def test_another_text_s_memory_is_read_as_it_is(model, ragged):
    """The control of the trainer: row i is scored behind the memory of row (i + 1) % 4, and behind nothing else."""
    ids, mask = ragged
    memory = model.compress(ids, mask)
    order = [1, 2, 3, 0]
    control = model(ids, mask, memory=memory[order]).token_losses["autoencoding"]
    own = model(ids, mask, memory=memory).token_losses["autoencoding"]
    for row in range(4):
        alone = model(single(ids, mask, row), memory=memory[order[row]]).token_losses["autoencoding"][0]
        close(control[row, : len(alone)], alone, atol=1e-4, rtol=1e-4)
        assert (control[row] - own[row]).abs().max() > 0.1


def test_forward_reads_what_compress_writes(model, ragged):
    ids, mask = ragged
    memory = model.compress(ids, mask)
    with torch.no_grad():
        output = model(ids, mask)
    close(output.memory.slots, memory.slots)
    assert output.memory.spans == memory.spans
    close(model(ids, mask, memory=memory).loss, output.loss)


def test_only_what_is_asked_for_is_computed(model, ragged):
    ids, mask = ragged
    part = {"continuation_ids": ids[:, :6]}
    answer = {"prompt_ids": ids[:, :3], "response_ids": ids[:, 3:6]}
    cases = [
        ({}, {"autoencoding": 1.0}),
        (part, {"autoencoding": 0.5, "continuation": 0.5}),
        (part | {"autoencoding_weight": 0}, {"continuation": 1.0}),
        (
            part | {"autoencoding_weight": 0.25, "continuation_weight": 2.0},
            {"autoencoding": 0.25, "continuation": 2.0},
        ),
        (answer, {"instruction": 1.0}),
        (answer | {"autoencoding_weight": 0.5}, {"instruction": 1.0, "autoencoding": 0.5}),
        (answer | part, {"instruction": 1.0, "continuation": 1.0}),
    ]
    for arguments, weights in cases:
        output = model(ids, mask, **arguments)
        assert set(output.task_losses) == set(output.token_losses) == set(weights)
        close(output.loss, sum(weights[task] * loss for task, loss in output.task_losses.items()))


def test_the_weight_of_a_task_is_the_weight_of_its_gradient(model, ragged):
    ids, mask = ragged

    def gradient(weight, other):
        model.zero_grad()
        arguments = {"autoencoding_weight": weight, "continuation_weight": other}
        model(ids, mask, continuation_ids=ids[:, :6], **arguments).loss.backward()
        return model.memory_embeddings.grad.clone()

    expected = 0.3 * gradient(1.0, 0.0) + 0.7 * gradient(1e-9, 1.0)
    close(gradient(0.3, 0.7), expected, atol=1e-6, rtol=1e-4)


def test_a_shorter_span_length_is_that_of_a_model_made_for_it(make_icae, ragged):
    long, short = make_icae(span_length=16), make_icae(span_length=8)
    with torch.no_grad():
        for name, parameter in short.trainable_parameters().items():
            own = long.trainable_parameters()[name]
            parameter.copy_(own[: len(parameter)])
    expected, found = short.compress(*ragged), long.compress(*ragged, span_length=8)
    assert found.spans == expected.spans
    close(found.slots, expected.slots, atol=2e-5, rtol=1e-4)
    close(long(*ragged, span_length=8).loss, short(*ragged).loss)


def test_a_fixed_number_of_slots(make_icae, ragged):
    model = make_icae(compression_ratio=None, num_memory_slots=3)
    memory = model.compress(*ragged)
    assert memory.spans[2] == [(3, 16), (1, 1)] and memory.positions[2, :4].tolist() == [6, 11, 16, 17]
    assert model.memory_embeddings.shape == (3, 32) and torch.isfinite(model(*ragged).loss)


def test_a_new_adapter_changes_nothing_yet(ragged):
    """LoRA starts at zero: the slots of a new ICAE are what the base itself makes of its memory embeddings."""
    model = ICAEForConditionalGeneration.from_base(make_base(), ICAEConfig(span_length=16))
    expected = model.compress(*ragged).slots
    with torch.no_grad():
        for name, parameter in model.trainable_parameters().items():
            if "lora_A" in name:
                parameter.normal_()
    assert torch.equal(model.compress(*ragged).slots, expected)


def test_a_new_model_is_the_same_for_the_same_seed():
    def make(seed):
        torch.manual_seed(seed)
        return ICAEForConditionalGeneration.from_base(base, ICAEConfig(span_length=16)).trainable_parameters()

    base = make_base()
    first = {name: parameter.clone() for name, parameter in make(0).items()}
    base = make_base()
    second = make(0)
    assert all(torch.equal(parameter, second[name]) for name, parameter in first.items())
    base = make_base()
    assert not torch.equal(make(1)["memory_embeddings"], first["memory_embeddings"])


def test_memory_embeddings_start_with_mean_and_spread_of_the_words():
    base = make_base(vocab_size=4000)
    words = base.get_input_embeddings().weight
    with torch.no_grad():
        words.add_(torch.linspace(-1, 1, 32))
    model = ICAEForConditionalGeneration.from_base(base, ICAEConfig(span_length=500, compression_ratio=1))
    close(model.memory_embeddings.mean(0), words.mean(0), atol=0.06, rtol=0)
    close(model.memory_embeddings.std(0), words.std(0), atol=0.06, rtol=0)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_eager_attention_gives_the_same_losses(make_icae, ragged, family):
    expected = make_icae(family)(*ragged).loss
    close(make_icae(base=make_base(family, attn_implementation="eager"))(*ragged).loss, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("memory_type", MEMORY_TYPES)
def test_bfloat16_is_near_float32(make_icae, ragged, family, memory_type):
    expected = make_icae(family, memory_type=memory_type)
    model = make_icae(base=make_base(family).bfloat16(), memory_type=memory_type)
    with torch.no_grad():
        for name, parameter in model.trainable_parameters().items():
            parameter.copy_(expected.trainable_parameters()[name])
    exact, found = expected(*ragged), model(*ragged)
    assert found.memory.slots.dtype == torch.bfloat16 and found.loss.dtype == torch.float32
    scale = exact.memory.slots.std()
    assert (found.memory.slots.float() - exact.memory.slots)[exact.memory.mask].std() < 0.1 * scale
    close(found.loss, exact.loss, atol=0.1, rtol=0.05)
    found.loss.backward()
    for parameter in model.trainable_parameters().values():
        assert parameter.grad.dtype == torch.float32 and torch.isfinite(parameter.grad).all()


def test_every_lora_layer_is_on_in_the_encoder_and_off_in_the_decoder(model, ragged):
    seen = []
    for layer in model._lora_layers:
        layer.register_forward_pre_hook(lambda module, args: seen.append(not module.disable_adapters))
    memory = model.compress(*ragged)
    assert len(seen) == len(model._lora_layers) and all(seen)
    seen.clear()
    model(*ragged, memory=memory, continuation_ids=ragged[0][:, :6])
    assert len(seen) >= 2 * len(model._lora_layers) and not any(seen)


def test_the_adapter_goes_back_when_the_encoder_or_the_answer_fails(model, ragged, monkeypatch):
    memory = model.compress(*ragged)

    def fail(*args, **kwargs):
        raise RuntimeError("on purpose")

    with monkeypatch.context() as patch:
        patch.setattr(model.language_model.base_model, "forward", fail)
        for call in (lambda: model.compress(*ragged), lambda: model.generate(memory=memory, task="continuation")):
            with pytest.raises(RuntimeError, match="on purpose"):
                call()
            assert not model.adapter_enabled
    assert torch.equal(model.compress(*ragged).slots, memory.slots)


def test_gradients_reach_nothing_but_what_is_trained(model, ragged):
    model.train()
    model(*ragged, continuation_ids=ragged[0][:, :6]).loss.backward()
    trained = model.trainable_parameters()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None and parameter.grad.abs().sum() > 0) == (name in trained), name


def test_compress_makes_no_graph_and_forward_does(model, ragged):
    assert not model.compress(*ragged).slots.requires_grad
    assert model(*ragged).memory.slots.requires_grad
    with torch.no_grad():
        assert not model(*ragged).loss.requires_grad


def test_the_order_of_a_batch_does_not_matter(model, ragged):
    ids, mask = ragged
    order = torch.tensor([2, 0, 3, 1])
    expected = model(ids, mask).token_losses["autoencoding"]
    close(model(ids[order], mask[order]).token_losses["autoencoding"], expected[order], atol=1e-4, rtol=1e-4)


def test_slots_encoded_behind_their_text_are_read_where_it_stood(make_icae, ragged):
    model = make_icae(memory_type="hidden_states", encoder_layout="sequential", decoder_layout="uniform")
    memory = model.compress(*ragged)
    assert memory.positions[2, :5].tolist() == [4, 8, 12, 16, 17] and memory.end.tolist() == [41, 9, 18, 31]


def test_autocast_gives_the_loss_of_bfloat16(model, ragged):
    expected = model(*ragged).loss
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(*ragged).loss
    loss.backward()
    close(loss, expected, atol=0.1, rtol=0.05)


def test_the_memory_of_a_forward_pass_can_be_asked(model, ragged):
    memory = model.eval()(*ragged).memory
    assert model.generate(memory=memory, task="autoencoding", max_new_tokens=2).shape == (4, 2)


def test_lengths_of_contexts_that_are_not_those_of_the_mask_are_refused(make_icae):
    model = make_icae()
    ids = torch.full((1, 40), 7)
    for mask, lengths in ((torch.ones(1, 40), [[16]]), (torch.arange(40)[None] < 20, [[16, 16]])):
        with pytest.raises(ValueError, match=r"Expected `context_lengths` of all tokens of each row, \[(40|20)"):
            model(context_ids=ids, context_mask=mask.bool(), context_lengths=torch.tensor(lengths))


def test_bases_that_know_no_negative_positions_answer_prompts(make_icae):
    model, options = make_icae(base=make_base("ministral3")), {"output_logits": True, "return_dict_in_generate": True}
    output = model.generate("A short text.", "Who?", max_new_tokens=4, **options)
    assert all(logits.isfinite().all() for logits in output.logits)


def test_bases_whose_states_at_negative_positions_are_not_finite_are_refused(monkeypatch):
    base = make_base()
    body = base.model.forward

    def forward(*given, position_ids=None, **options):
        output = body(*given, position_ids=position_ids, **options)
        if position_ids is not None:
            output.last_hidden_state = output.last_hidden_state * (position_ids[..., None] + 1).log()
        return output

    monkeypatch.setattr(base.model, "forward", forward)
    monkeypatch.setattr("icae.modeling_icae.pretrained_icae._check_base", lambda base: None)  # reads the signature
    with pytest.raises(
        ValueError, match=r"Expected a base that reads text at negative positions, .* got LlamaForCausal"
    ):
        ICAEForConditionalGeneration.from_base(base)


def test_last_states_beyond_the_positions_of_the_base_are_named(make_icae):
    model = make_icae(base=make_base("gpt2"), memory_type="hidden_states")
    memory = model.compress([7] * 600)
    with pytest.raises(ValueError, match=r"Expected at most 511 tokens of context, prompt and answer, .* got 6"):
        model.generate(memory=memory, prompt="Who?")
