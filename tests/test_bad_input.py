"""Bad input gets an error that says what was expected, what came, and what to do: one test per message."""

import pytest
import torch

from icae import ICAEConfig, ICAEForConditionalGeneration
from tiny import make_base


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
    with pytest.raises(ValueError, match="Expected at least one prompt, got an empty list"):
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
    with pytest.raises(ValueError, match=r"Expected at most 511 tokens of context and prompt, .* got"):
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
