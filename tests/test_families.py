"""Every family of bases against a second implementation: no cache, no batch, no padding, the adapter merged in.

The second implementation shares with the model only its weights. Its attention is written here; while the encoder runs
it keeps keys and values at the slots, and while the decoder runs it reads them behind the prefix.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from icae import ICAEConfig, ICAEForConditionalGeneration
from tiny import FAMILIES, make_base


MEMORY_TYPES = ["key_values", "hidden_states"]
WINDOWED = ["mistral", "gemma2", "gemma3_text"]
NO_WINDOW = {family: {"sliding_window": 512} for family in WINDOWED}
CONTEXTS = ["The lighthouse keeper had not spoken to anyone since October.", "Short.", "A train leaves at nine."]
PROMPTS = ["Who?", "What is it about, in one word?", "When does it leave?"]
NO_CONTROL = {"do_sample": False, "suppress_tokens": [0, 1, 2, 3, 4]}
close = torch.testing.assert_close

kept: dict[int, list] = {}  # keys and values of each layer at the slots
mode: dict[str, int | None] = {"keep": None, "read_behind": None}


def plain_attention(module, query, key, value, mask, scaling=None, sliding_window=None, softcap=None, **kwargs):
    places = torch.arange(key.shape[2])
    if mode["keep"] is not None:
        kept.setdefault(module.layer_idx, []).append((key[:, :, -mode["keep"] :], value[:, :, -mode["keep"] :]))
    if (prefix := mode["read_behind"]) is not None:
        keys, values = (torch.cat(parts, dim=2) for parts in zip(*kept[module.layer_idx], strict=True))
        key = torch.cat([key[:, :, :prefix], keys, key[:, :, prefix:]], dim=2)
        value = torch.cat([value[:, :, :prefix], values, value[:, :, prefix:]], dim=2)
        places = torch.where(places < prefix, places, places + keys.shape[2])
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    distance = places[:, None] - torch.arange(key.shape[2])
    seen = (distance >= 0) & (distance < (sliding_window or key.shape[2] + 1))
    weights = scores.masked_fill(~seen, -torch.inf).softmax(dim=-1)
    return (weights @ value).transpose(1, 2).contiguous(), weights


AttentionInterface.register("icae_reference", plain_attention)


class Reference:
    """One context at a time, by the letter of the specification."""

    def __init__(self, model: ICAEForConditionalGeneration, base):
        """`base` is a copy of the model's base from before the adapter was put in."""
        self.model, self.config = model, model.config
        self.base, self.encoder = copy.deepcopy(base), copy.deepcopy(base)
        for name, layer in model.language_model.named_modules():
            if hasattr(layer, "lora_A"):
                self.encoder.get_submodule(name).weight.data += layer.get_delta_weight("icae")
        for part in (self.base, self.encoder):
            part.set_attn_implementation("icae_reference")

    def compress(self, ids: list[int]):
        """The slots and their positions; slots of the type `key_values` are in `kept`, and None is returned."""
        kept.clear()
        config, slots, positions, before = self.config, [], [], 0
        keeps = config.memory_type == "key_values"
        for start in range(0, len(ids), config.span_length):
            span = ids[start : start + config.span_length]
            length = len(span)
            count = -(-length // int(config.compression_ratio))
            ends = [-(-slot * length // count) for slot in range(1, count + 1)]
            middles = [(start + 1 + end + 1) // 2 for start, end in zip([0, *ends], ends, strict=False)]
            uniform = config.encoder_layout == "uniform"
            own = middles if uniform else [length + slot for slot in range(1, count + 1)]
            tokens = self.embed([1, *span])
            embeds = torch.cat([tokens, self.model.memory_embeddings[None, :count]], dim=1)
            shift = before if keeps else 0
            encoder_positions = [shift + place for place in (0, *range(1, length + 1), *own)]
            mode["keep"] = count if keeps else None
            try:
                states = self.run(self.encoder, embeds, encoder_positions, "hidden_states")
            finally:
                mode["keep"] = None
            slots.append(states[:, -count:])
            positions += [before + place for place in (ends if uniform or not keeps else own)]
            before += length + (count if keeps and config.encoder_layout == "sequential" else 0)
        return None if keeps else torch.cat(slots, dim=1), positions

    def logits(self, memory, task: str, prefix: list[int], text: torch.Tensor) -> torch.Tensor:
        """Logits at each place of `text` (embeddings) behind the memory."""
        slots, positions = memory
        layout = self.config.decoder_layout[task]
        if slots is not None and layout == "sequential":
            positions = list(range(1, slots.shape[1] + 1))
        first = 0 if task == "autoencoding" and layout == "uniform" else max(positions) + 1
        behind = list(range(first, first + text.shape[1]))
        ahead = list(range(1 - len(prefix), 1))
        if self.base.config.model_type == "gpt2":  # knows no negative positions
            ahead = [0] * len(prefix)
        if slots is None:
            mode["read_behind"] = len(prefix)
            try:
                embeds = torch.cat([self.embed(prefix), text], dim=1)
                logits = self.run(self.base, embeds, ahead + behind, "logits")
            finally:
                mode["read_behind"] = None
        else:
            embeds = torch.cat([self.embed(prefix), slots, text], dim=1)
            logits = self.run(self.base, embeds, ahead + positions + behind, "logits")
        return logits[0, -text.shape[1] :]

    def run(self, part, embeds, positions, what):
        mask = torch.ones(embeds.shape[:2], dtype=torch.long)
        whole = part if what == "logits" else part.base_model
        output = whole(
            inputs_embeds=embeds, attention_mask=mask, position_ids=torch.tensor([positions]), use_cache=False
        )
        return output.logits if what == "logits" else output.last_hidden_state

    def embed(self, ids):
        return self.base.get_input_embeddings()(torch.tensor([ids], dtype=torch.long))

    def mark(self, task):
        return self.model.task_embeddings[["autoencoding", "continuation"].index(task)][None, None]

    @torch.no_grad()
    def losses(self, ids: list[int], follow: list[int]) -> dict[str, torch.Tensor]:
        memory = self.compress(ids)
        texts = {"autoencoding": (ids, [*ids, 2]), "continuation": (follow[:-1], follow)}
        losses = {}
        for task, (given, targets) in texts.items():
            text = torch.cat([self.mark(task), self.embed(given)], dim=1)
            logits = self.logits(memory, task, [1], text)
            losses[task] = F.cross_entropy(logits, torch.tensor(targets), reduction="none")
        return losses

    @torch.no_grad()
    def answer(self, ids: list[int], prefix: list[int], prompt: list[int], steps: int) -> list[int]:
        """Greedy, everything computed again for every token."""
        memory, answer = self.compress(ids), []
        for _ in range(steps):
            logits = self.logits(memory, "instruction", prefix, self.embed(prompt + answer))[-1]
            answer.append(5 + int(logits[5:].argmax()))
        return answer


@pytest.fixture
def pair(make_icae):
    """Makes a model and its reference."""

    def make(family="llama", base_options=None, **config):
        base = make_base(family, **(base_options or {}))
        plain = copy.deepcopy(base)
        model = make_icae(base=base, **config)
        return model, Reference(model, plain)

    return make


def random_ids(count, seed=4):
    return torch.randint(5, 100, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def check_losses(model, reference, length):
    ids, follow = random_ids(length), random_ids(6, seed=5)
    expected = reference.losses(ids, follow)
    with torch.no_grad():
        output = model(torch.tensor([ids]), continuation_ids=torch.tensor([follow]))
    for task, losses in expected.items():
        close(output.token_losses[task][0], losses, atol=2e-4, rtol=1e-4)
    total = 0.5 * expected["autoencoding"].mean() + 0.5 * expected["continuation"].mean()
    close(output.loss, total, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("memory_type", MEMORY_TYPES)
def test_losses_of_several_spans_equal_those_of_the_reference(pair, family, memory_type):
    check_losses(*pair(family, memory_type=memory_type), length=39)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("memory_type", MEMORY_TYPES)
@pytest.mark.parametrize("layouts", ["sequential sequential", "uniform sequential"])
def test_losses_in_the_other_layouts_equal_those_of_the_reference(pair, family, memory_type, layouts):
    encoder_layout, decoder_layout = layouts.split()
    layout = {"encoder_layout": encoder_layout, "decoder_layout": decoder_layout}
    check_losses(*pair(family, memory_type=memory_type, **layout), length=39)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("memory_type", MEMORY_TYPES)
def test_greedy_answers_equal_those_of_the_reference(pair, tokenizer, family, memory_type):
    model, reference = pair(family, memory_type=memory_type)
    context = tokenizer(CONTEXTS[0], add_special_tokens=False)["input_ids"]
    prefix, prompt = model._prefix("instruction").tolist(), model.encode_prompts([PROMPTS[1]])[0]
    expected = reference.answer(context, prefix, prompt, steps=8)
    found = model.generate(CONTEXTS[0], PROMPTS[1], max_new_tokens=8, **NO_CONTROL)
    assert found[0].tolist() == expected
    assert len(set(expected)) > 1


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("memory_type", MEMORY_TYPES)
def test_a_batch_of_answers_equals_one_by_one(make_icae, family, memory_type):
    model = make_icae(base=make_base(family, **NO_WINDOW.get(family, {})), memory_type=memory_type)
    batch = model.generate(CONTEXTS, PROMPTS, max_new_tokens=8, **NO_CONTROL)
    for row, (context, prompt) in enumerate(zip(CONTEXTS, PROMPTS, strict=True)):
        assert torch.equal(batch[row], model.generate(context, prompt, max_new_tokens=8, **NO_CONTROL)[0])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("memory_type", MEMORY_TYPES)
def test_slots_losses_and_answers_are_bit_equal_after_loading(make_icae, ragged, tmp_path, family, memory_type):
    model = make_icae(family, memory_type=memory_type)
    model.save_pretrained(tmp_path)
    loaded = ICAEForConditionalGeneration.from_pretrained(tmp_path, base_model=make_base(family))
    assert torch.equal(loaded.compress(*ragged).slots, model.compress(*ragged).slots)
    assert torch.equal(loaded(*ragged).loss, model(*ragged).loss)
    answers = [one.generate(CONTEXTS, PROMPTS, max_new_tokens=4, do_sample=False) for one in (model, loaded)]
    assert torch.equal(*answers)


@pytest.mark.parametrize("family", FAMILIES)
def test_another_family_s_checkpoint_is_refused(make_icae, tmp_path, family):
    other = "gpt2" if family != "gpt2" else "llama"
    make_icae(family).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Expected the base model"):
        ICAEForConditionalGeneration.from_pretrained(tmp_path, base_model=make_base(other))


# ----------------------------------------------------------------------------------------------------- sliding windows


@pytest.mark.parametrize("family", WINDOWED)
@pytest.mark.parametrize("memory_type", MEMORY_TYPES)
def test_a_window_shorter_than_the_text_does_what_it_does_in_the_base(pair, family, memory_type):
    """Two full spans: no padding anywhere; text and slots beyond the window are out of sight, as in the base."""
    model, reference = pair(family, {"sliding_window": 12}, memory_type=memory_type)
    check_losses(model, reference, length=32)


@pytest.mark.parametrize("family", WINDOWED)
@pytest.mark.parametrize("memory_type", MEMORY_TYPES)
def test_a_batch_equals_its_rows_under_a_short_window(make_icae, ragged, family, memory_type):
    model = make_icae(base=make_base(family, sliding_window=12), memory_type=memory_type)
    ids, mask = ragged
    memory = model.compress(ids, mask)
    losses = model(ids, mask, continuation_ids=ids[:, :6]).token_losses
    for row in range(4):
        alone = ids[row][mask[row].bool()][None]
        slots = model.compress(alone).slots[0]
        close(memory.slots[row, : len(slots)], slots, atol=2e-5, rtol=1e-4)
        output = model(alone, continuation_ids=ids[row : row + 1, :6])
        for task, expected in output.token_losses.items():
            close(losses[task][row, : expected.shape[1]], expected[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", WINDOWED)
@pytest.mark.parametrize("memory_type", MEMORY_TYPES)
def test_a_batch_of_answers_equals_one_by_one_under_a_short_window(make_icae, family, memory_type):
    model = make_icae(base=make_base(family, sliding_window=40), memory_type=memory_type, span_length=32)
    batch = model.generate(CONTEXTS, PROMPTS, max_new_tokens=8, **NO_CONTROL)
    for row, (context, prompt) in enumerate(zip(CONTEXTS, PROMPTS, strict=True)):
        assert torch.equal(batch[row], model.generate(context, prompt, max_new_tokens=8, **NO_CONTROL)[0])


def test_a_batch_of_answers_equals_one_by_one_under_gpt_neo_s_local_attention(make_icae):
    layers = {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "hidden_size": 32, "num_heads": 4}
    base = make_base("gpt_neo", **layers, window_size=40, max_position_embeddings=512)
    model = make_icae(base=base, span_length=32)
    batch = model.generate(CONTEXTS, PROMPTS, max_new_tokens=8, **NO_CONTROL)
    for row, (context, prompt) in enumerate(zip(CONTEXTS, PROMPTS, strict=True)):
        assert torch.equal(batch[row], model.generate(context, prompt, max_new_tokens=8, **NO_CONTROL)[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_slots_start_with_the_mean_and_spread_of_the_words_that_the_family_reads(family):
    """Gemma's embedding layer gives its weights times the root of the hidden size."""
    base = make_base(family)
    words = base.get_input_embeddings()(torch.arange(base.config.vocab_size)).detach()
    config = ICAEConfig(span_length=500, compression_ratio=1, lora_r=4)
    slots = ICAEForConditionalGeneration.from_base(base, config).memory_embeddings.detach()
    spread = words.std(dim=0)
    assert ((slots.mean(dim=0) - words.mean(dim=0)).abs() < spread / 4).all()
    close(slots.std(dim=0), spread, rtol=0.2, atol=0)


EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


@pytest.mark.parametrize("family", ["llama", "mixtral", "qwen3_moe", "phimoe", "gpt_oss"])
def test_every_trained_tensor_gets_a_gradient(make_icae, family):
    """The experts of the last layer cannot change a slot, and DDP refuses parameters without gradients."""
    model = make_icae(base=make_base(family, **EXPERTS)).train()
    context = torch.randint(5, 60, (3, 20), generator=torch.Generator().manual_seed(0))
    model(context_ids=context, continuation_ids=context[:, :8]).loss.backward()
    assert not [name for name, parameter in model.trainable_parameters().items() if parameter.grad is None]


def test_the_adapter_of_stacked_experts_survives_saving(make_icae, tmp_path):
    model = make_icae(base=make_base("mixtral", **EXPERTS)).eval()
    model.save_pretrained(tmp_path)
    again = ICAEForConditionalGeneration.from_pretrained(tmp_path, base_model=make_base("mixtral", **EXPERTS))
    ids = torch.arange(5, 40)[None]
    assert torch.equal(again.compress(ids).slots, model.compress(ids).slots)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "phimoe", "gpt_oss"])
def test_bases_with_experts_get_an_adapter_that_leaves_the_decoder_and_linear_routers_alone(make_icae, family):
    base = make_base(family, **EXPERTS)
    ids = torch.arange(5, 40)[None]
    with torch.no_grad():
        expected = base(ids).logits
        model = make_icae(base=base).eval()
        assert torch.equal(model.language_model(ids).logits, expected)
        with model.adapter(True):
            assert not torch.equal(model.language_model(ids).logits, expected)
    assert not any(".router." in name for name in model.trainable_parameters())
    answers = model.generate(CONTEXTS, PROMPTS, max_new_tokens=6, **NO_CONTROL)
    for row, context, prompt in zip(answers, CONTEXTS, PROMPTS, strict=True):
        assert torch.equal(model.generate(context, prompt, max_new_tokens=6, **NO_CONTROL)[0], row)
