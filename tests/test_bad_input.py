"""Bad input gets an error that says what was expected, what came, and what to do: one test per message."""

from functools import partial

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3Config

from icae import ICAEConfig, ICAEForConditionalGeneration
from tiny import GEMMA_LIKE, SHARED, make_base


@pytest.fixture
def model(make_icae):
    return make_icae()


@pytest.mark.parametrize("context", ["", ["text", ""], [[]], torch.zeros(1, 0, dtype=torch.long)])
def test_an_empty_context(model, context):
    with pytest.raises(ValueError, match=r"Expected contexts of at least one token, got an empty one in row [01]"):
        model.compress(context)


def test_an_empty_list_of_contexts(model):
    with pytest.raises(ValueError, match="Expected a context as str, list of str, or token ids, got an empty list"):
        model.compress([])


@pytest.mark.parametrize("context", [3, {"a": 1}, None])
def test_a_context_of_another_type(model, context):
    with pytest.raises(ValueError, match=f"got {type(context).__name__}"):
        model.compress(context)


@pytest.mark.parametrize("ids", [torch.zeros(3, dtype=torch.long), torch.zeros(1, 3)])
def test_ids_of_another_shape_or_dtype(model, ids):
    with pytest.raises(ValueError, match=r"Expected context ids of shape \(batch, length\) and dtype int64, got"):
        model.compress(ids)


@pytest.mark.parametrize("ids", [[5, 101], [-1, 5]])
def test_ids_outside_the_vocabulary(model, ids):
    with pytest.raises(ValueError, match="Expected token ids from 0 to 100, got"):
        model.compress(ids)


def test_a_span_length_beyond_the_model_s(model):
    with pytest.raises(ValueError, match=r"Expected `span_length` between 1 and the model's 16 tokens, got 17"):
        model.compress("text", span_length=17)


def test_a_prompt_without_context_or_memory(model):
    with pytest.raises(ValueError, match="Expected either `context` or `memory`, got neither"):
        model.generate(prompt="Who?")


def test_context_and_memory_at_once(model):
    with pytest.raises(ValueError, match="Expected either `context` or `memory`, got both"):
        model.generate("text", "Who?", memory=model.compress("text"))


def test_a_context_without_a_prompt(model):
    with pytest.raises(ValueError, match="Expected a `prompt` for the task 'instruction', got None"):
        model.generate("text")


def test_a_prompt_for_a_task_that_has_none(model):
    with pytest.raises(ValueError, match=r"Expected no `prompt` for the task 'autoencoding', got 'Who\?'"):
        model.generate("text", "Who?", task="autoencoding")


def test_an_empty_list_of_prompts(model):
    with pytest.raises(
        ValueError, match=r"Expected a prompt as str, a list of at least one str, or conversations .*, got \[\]"
    ):
        model.generate("text", [])


def test_an_unknown_task(model):
    with pytest.raises(ValueError, match=r"Expected `task` to be one of \(.*\), got 'summary'"):
        model.generate("text", "Who?", task="summary")


def test_prompts_that_do_not_fit_the_contexts(model):
    with pytest.raises(ValueError, match="got 3 prompts for 2 contexts"):
        model.generate(["one", "two"], ["a", "b", "c"])


def test_a_memory_of_another_model(model, make_icae):
    other = make_icae(lora_alpha=4)
    with pytest.raises(ValueError, match=f"fingerprint {model.fingerprint}.*fingerprint {other.fingerprint}"):
        model.generate(memory=other.compress("text"), prompt="Who?")


def test_a_memory_of_an_earlier_state_of_training(model):
    memory = model.compress("text")
    with torch.no_grad():
        model.memory_embeddings.add_(1)
    with pytest.raises(ValueError, match="another state of its training"):
        model.reconstruct(memory)


@pytest.mark.parametrize("fused", [False, True])
def test_a_memory_of_before_a_step_of_training(make_icae, fused):
    model = make_icae()
    memory = model.eval().compress("text")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=fused)
    model.train()(context_ids=torch.tensor([[7, 8, 9]])).loss.backward()
    optimizer.step()
    with pytest.raises(ValueError, match="another state of its training"):
        model.eval().reconstruct(memory)


def test_something_else_as_a_memory(model):
    with pytest.raises(TypeError, match="Expected `memory` to be an ICAEMemory, got str"):
        model.generate(memory="text", prompt="Who?")


def test_slots_with_nan(model):
    memory = model.compress("text")
    memory.slots[0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="Expected finite memory slots, got NaN or infinity in 1 slots"):
        model.reconstruct(memory)


@pytest.mark.parametrize("memory_type", ["key_values", "hidden_states"])
def test_more_tokens_than_the_base_has_positions(make_icae, memory_type):
    model = make_icae(memory_type=memory_type)
    with pytest.raises(ValueError, match=r"Expected at most 511 tokens of context, prompt and answer, .* got"):
        model.generate("x" * 600, "Who?")


def test_an_unknown_base():
    with pytest.raises(ValueError, match="Expected a base model at 'nobody/nothing', found none"):
        ICAEForConditionalGeneration.from_base("nobody/nothing")


def test_a_base_in_float16():
    with pytest.raises(ValueError, match=r"got float16.*load it with `dtype=torch.bfloat16`"):
        ICAEForConditionalGeneration.from_base(make_base().half(), ICAEConfig(span_length=16))


def test_no_checkpoint_at_a_path(tmp_path):
    with pytest.raises((ValueError, OSError), match=r"config\.json"):
        ICAEForConditionalGeneration.from_pretrained(tmp_path)


def test_a_plain_language_model_call(model):
    with pytest.raises(ValueError, match=r"An ICAE is no plain language model: .* call `model.language_model`"):
        model()


def test_a_memory_without_the_target_of_autoencoding(model):
    with pytest.raises(ValueError, match="Expected `context_ids`, the target of autoencoding, beside `memory`"):
        model(memory=model.compress("text"))


def test_a_response_without_its_prompt(model, ragged):
    with pytest.raises(ValueError, match="Expected `prompt_ids` and `response_ids` together"):
        model(*ragged, response_ids=ragged[0])


def test_no_tokenizer_to_be_found(model):
    model.tokenizer = None
    with pytest.raises(ValueError, match=r"set `model.tokenizer` or give token ids"):
        model.compress("text")


def test_an_empty_row_in_the_context_of_forward(model, ragged):
    ids, mask = ragged
    mask[1] = 0
    with pytest.raises(ValueError, match="got an empty one in row 1"):
        model(ids, mask)


def test_a_memory_of_another_memory_type(make_icae):
    memory = make_icae(memory_type="hidden_states").compress("text")
    with pytest.raises(ValueError, match="got one of another model"):
        make_icae(memory_type="key_values").generate(memory=memory, prompt="Who?")


def test_a_memory_of_another_base(make_icae):
    memory = make_icae("qwen3").compress("text")
    with pytest.raises(ValueError, match="got one of another model"):
        make_icae("llama").reconstruct(memory)


def test_infinite_slots(model):
    memory = model.compress("a longer text")
    memory.slots[0, 1, 3] = float("inf")
    with pytest.raises(ValueError, match=r"got NaN or infinity in 1 slots \(first: row 0, slot 1\)"):
        model.generate(memory=memory, prompt="Who?")


def test_a_misspelt_option(model):
    with pytest.raises(ValueError, match="max_new_token"):
        model.generate("text", "Who?", max_new_token=3)


def test_a_second_icae_on_one_base(model):
    with pytest.raises(
        ValueError, match=r"Expected a base without adapters.*The base of another ICAE is loaded once more"
    ):
        ICAEForConditionalGeneration.from_base(model.language_model, ICAEConfig(span_length=16))


@pytest.mark.parametrize("load", ["as transformers does", "as PEFT does"])
def test_a_base_with_an_adapter_of_its_own(tmp_path, load):
    make_base().save_pretrained(tmp_path / "base")
    tuned = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), LoraConfig(task_type="CAUSAL_LM"))
    tuned.save_pretrained(tmp_path / "tuned")
    base = str(tmp_path / "tuned") if load == "as transformers does" else tuned
    with pytest.raises(ValueError, match=r"Expected a base without adapters, got .* merge it into the weights"):
        ICAEForConditionalGeneration.from_base(base, ICAEConfig(span_length=16))
    AutoPeftModelForCausalLM.from_pretrained(tmp_path / "tuned").merge_and_unload().save_pretrained(
        tmp_path / "merged"
    )
    assert ICAEForConditionalGeneration.from_base(str(tmp_path / "merged"), ICAEConfig(span_length=16))


# What follows is known to be missing; each mark goes with its message.


@pytest.mark.parametrize("shape", [(1, 40), (4, 5)])
def test_a_mask_of_another_shape(model, ragged, shape):
    with pytest.raises(ValueError, match=r"Expected a mask of the same shape as its ids, .* got a mask of shape"):
        model.compress(ragged[0], torch.ones(shape, dtype=torch.long))


def test_a_prompt_mask_of_another_shape(model, ragged):
    ids = ragged[0]
    with pytest.raises(ValueError, match=r"Expected a mask of the same shape as its ids, .* got a mask of shape"):
        model(ids, prompt_ids=ids[:, :3], prompt_mask=torch.ones(4, 2), response_ids=ids[:, 3:6])


@pytest.mark.parametrize("kind", ["another model", "another type", "nan"])
def test_a_wrong_memory_in_forward(model, make_icae, ragged, kind):
    if kind == "nan":
        memory = model.compress(*ragged)
        memory.slots[0, 0, 0] = float("nan")
    else:
        other = {"lora_alpha": 4} if kind == "another model" else {"memory_type": "hidden_states"}
        memory = make_icae(**other).compress(*ragged)
    with pytest.raises(ValueError, match="Expected"):
        model(*ragged, memory=memory)


def test_a_memory_with_other_rows_than_the_targets(model, ragged):
    with pytest.raises(ValueError, match="Expected"):
        model(ragged[0], memory=model.compress(ragged[0])[0])


def test_no_task_at_all(model, ragged):
    with pytest.raises(ValueError, match="Expected"):
        model(*ragged, autoencoding_weight=0)


def test_a_task_without_any_target(model, ragged):
    ids, mask = ragged
    with pytest.raises(ValueError, match="Expected at least one target token for the task 'continuation'"):
        model(ids, mask, continuation_ids=ids[:, :6], continuation_mask=torch.zeros_like(ids[:, :6]))


def test_an_empty_prompt_before_a_response(model, ragged):
    ids = ragged[0]
    mask = torch.tensor([[1, 1], [0, 0], [1, 1], [1, 1]])
    with pytest.raises(ValueError, match="Expected"):
        model(ids, prompt_ids=ids[:, :2], prompt_mask=mask, response_ids=ids[:, 2:5])


@pytest.mark.parametrize("context", [["text", [5, None]], [["text", 5]], ["a", None], [None], [[1.5]]], ids=str)
def test_contexts_of_mixed_or_wrong_types(model, context):
    with pytest.raises((ValueError, TypeError), match="Expected a context"):
        model.compress(context)


@pytest.mark.parametrize("prompt", [3, [3.5], [None], [[5, "a"]], [[]]], ids=str)
def test_a_prompt_of_another_type(model, prompt):
    with pytest.raises((ValueError, TypeError), match=r"Expected .*prompt"):
        model.generate("text", prompt)


@pytest.mark.parametrize("number", [0, -1])
def test_no_span_at_a_time(model, number):
    with pytest.raises(ValueError, match="Expected `max_spans_per_batch`"):
        model.compress("text", max_spans_per_batch=number)


@pytest.mark.parametrize("call", ["continuation", "sequential autoencoding", "new tokens"])
def test_more_positions_than_an_absolute_base_has(make_icae, call):
    layout = "sequential" if call == "sequential autoencoding" else "uniform"
    base = make_base("gpt2", n_positions=100)
    model = make_icae(base=base, encoder_layout=layout, decoder_layout=layout)
    ids = torch.full((1, 60), 7)
    with pytest.raises(ValueError, match="Expected at most 99 tokens"):
        if call == "new tokens":
            model.generate("x" * 60, "Who?", max_new_tokens=60, suppress_tokens=[2])
        else:
            model(ids, continuation_ids=ids if call == "continuation" else None)


def test_a_base_without_an_end_token(make_icae, ragged):
    with pytest.raises(ValueError, match=r"Expected .*end token|eos_token_id"):
        make_icae(base=make_base(eos_token_id=None))(*ragged)


def test_a_base_without_start_and_end_token(make_icae, ragged):
    base = make_base(bos_token_id=None, eos_token_id=None)
    with pytest.raises(ValueError, match=r"Expected a base with an end token"):
        make_icae(base=base).compress(*ragged)


def test_a_model_turned_into_float16(model):
    with pytest.raises(ValueError, match="float16"):
        model.half().compress("text")


PER_LAYER = {
    "layer_types": ["sliding_attention", "full_attention"],
    "num_kv_shared_layers": 0,
    "hidden_size_per_layer_input": 8,
}


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("mamba", {"state_size": 4}, "Expected a base with a cache of keys and values in all layers"),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, r"got Lfm2ForCausalLM, with layers \['conv'\]"),
        (
            "gemma3n_text",
            PER_LAYER,
            "Expected a base that reads embeddings, .* whose layers read token ids",
        ),
        ("bloom", {}, "Expected a base with a body that takes `position_ids` .* got BloomForCausalLM"),
        ("openai-gpt", {}, "that takes `position_ids` and `past_key_values`, .* got OpenAIGPTLMHeadModel"),
        ("modernbert-decoder", {}, "logits are the product .* got ModernBertDecoderForCausalLM"),
    ],
)
def test_a_base_that_cannot_read_slots(make_icae, family, fields, message):
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    small = SHARED | shape | {"vocab_size_per_layer_input": 8, "num_key_value_heads": 2, "head_dim": 8}
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(small | fields)))
    with pytest.raises(ValueError, match=message):
        make_icae(base=base)


def test_a_base_that_reads_more_than_text(make_icae):
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    sizes = {"image_size": 28, "patch_size": 14}
    config = Gemma3Config(text_config=SHARED | GEMMA_LIKE, vision_config=vision | sizes)
    with pytest.raises(
        ValueError, match=r"Expected a base that reads text alone, got Gemma3.* \('gemma3_text'\) is a"
    ):
        make_icae(base=AutoModelForCausalLM.from_config(config))


def test_a_base_that_is_an_icae(model, tmp_path):
    model.save_pretrained(tmp_path)
    for load in (
        ICAEForConditionalGeneration.from_base,
        partial(ICAEForConditionalGeneration.from_pretrained, tmp_path),
    ):
        options = {"base_model": model} if isinstance(load, partial) else {"base": model}
        with pytest.raises(ValueError, match=r"Expected the base of an ICAE, got .*, an ICAE itself; load it with"):
            load(**options)


@pytest.mark.parametrize("load", ["from_base", "from_pretrained"])
def test_a_base_that_is_no_model(model, tmp_path, load):
    model.save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="Expected the base as a folder, a Hub id or a model, got int"):
        if load == "from_base":
            ICAEForConditionalGeneration.from_base(3)
        else:
            ICAEForConditionalGeneration.from_pretrained(tmp_path, base_model=3)


def test_neither_a_base_nor_its_configuration():
    with pytest.raises(ValueError, match=r"Expected a base, or a configuration that describes one"):
        ICAEForConditionalGeneration(ICAEConfig())


def test_a_new_size_of_the_embeddings_changes_nothing(model):
    with pytest.raises(ValueError, match="Expected the base as it is, got a new size of its embeddings"):
        model.resize_token_embeddings(120)
    assert model.get_input_embeddings().weight.shape[0] == model.config.text_config.vocab_size


def test_an_adapter_that_was_merged(model):
    for layer in model._lora_layers:
        layer.merge()
    with pytest.raises(ValueError, match="Expected the adapter beside the frozen base, got it merged"):
        model.compress([5, 6])


def test_slots_of_whole_numbers(model):
    with pytest.raises(ValueError, match=r"Expected a floating dtype for memory slots, got torch\.int8"):
        model.compress([5, 6]).to(torch.int8)


def test_a_memory_of_another_copy_of_the_code(model):
    other = type("ICAEMemory", (), {"__module__": "transformers_modules.icae"})()
    message = r"got one of transformers_modules\.icae, other code than this model's .*`type\(model\.compress"
    with pytest.raises(TypeError, match=message):
        model.generate(memory=other, prompt="?")


@pytest.mark.parametrize(
    "fields",
    [
        {"span_length": 128.0},
        {"span_length": True},
        {"compression_ratio": True},
        {"lora_r": True},
        {"lora_alpha": "64"},
        {"lora_alpha": float("inf")},
        {"lora_dropout": "0.1"},
        {"text_config": {}},
        {"text_config": "gpt2"},
    ],
)
def test_a_field_of_another_type(fields):
    (name,) = fields
    with pytest.raises(ValueError, match=f"Expected `{name}`"):
        ICAEConfig(**fields)
