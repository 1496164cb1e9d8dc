import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import GenerationConfig, TextIteratorStreamer, pipeline

from icae import ICAEContextGenerationPipeline
from tiny import make_base


ROOT = Path(__file__).parents[1]
TASK = "icae-context-generation"
QUESTIONS = [
    {"context": "The cat sat on the mat.", "prompt": "Where?"},
    {"context": "A train leaves at nine, and it is always late on Thursdays.", "prompt": "When does it leave?"},
    {"context": ["Two texts,", "each compressed apart."], "prompt": [{"role": "user", "content": "How many?"}]},
]
OPTIONS = {"max_new_tokens": 6, "do_sample": False}


@pytest.fixture
def pipe(make_icae):
    return pipeline(TASK, model=make_icae())


def answer(model, question, **options):
    """What `generate` says, one by one."""
    output = model.generate([question["context"]], question["prompt"], **(OPTIONS | options))
    return [{"generated_text": text} for text in model.tokenizer.batch_decode(output, skip_special_tokens=True)]


def test_an_input_is_answered_as_by_generate(pipe):
    assert isinstance(pipe, ICAEContextGenerationPipeline)
    for question in QUESTIONS:
        assert pipe(question, **OPTIONS) == answer(pipe.model, question)


@pytest.mark.parametrize("prompt", [{"role": "user", "content": "Who?"}, 5, [None], [["Who?"]], []], ids=str)
def test_what_is_no_prompt_is_refused(pipe, prompt):
    with pytest.raises(ValueError, match=r"Expected a prompt as str, a list of (them|at least one str), or "):
        pipe({"context": "The cat sat.", "prompt": prompt})


def test_without_a_length_answers_end_after_256_tokens_or_where_the_positions_do(make_icae):
    model = make_icae()
    model.generation_config.suppress_tokens = [model.end_token_ids[0], *range(5)]
    pipe = pipeline(TASK, model=model, do_sample=False)
    short, long = ({"context": "x" * length, "prompt": "?"} for length in (10, 400))
    lengths = []
    generate = model.generate

    def count(*args, **kwargs):
        output = generate(*args, **kwargs)
        lengths.append(output.shape[1])
        return output

    model.generate = count
    pipe(short), pipe(long)
    assert lengths[0] == 256 and 1 < lengths[1] < 112
    pipe(long, max_new_tokens=7), pipe(long, generation_config=GenerationConfig(max_new_tokens=6))
    pipeline(TASK, model=model, do_sample=False, max_new_tokens=4)(long)
    pipeline(TASK, model=model, generation_config=GenerationConfig(max_new_tokens=3))(long, generation_config=None)
    pipe(short, generation_config=GenerationConfig(do_sample=False))
    model.generation_config.max_new_tokens = 5
    pipe(long)
    assert lengths[2:] == [7, 6, 4, 3, 256, 5]
    with pytest.raises(ValueError, match="Expected at most 511 tokens of context, prompt and answer"):
        pipe(long, max_new_tokens=256)


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_lists_are_answered_in_batches_as_one_by_one(pipe, batch_size):
    expected = [answer(pipe.model, question) for question in QUESTIONS]
    assert pipe(QUESTIONS, batch_size=batch_size, **OPTIONS) == expected


def test_a_generator_is_read_as_it_is_needed(pipe):
    read = []

    def questions():
        for question in QUESTIONS:
            read.append(question)
            yield question

    answers = pipe(questions(), **OPTIONS)
    assert next(answers) == answer(pipe.model, QUESTIONS[0])
    assert len(read) < 3
    assert len(list(answers)) == 2


def test_a_data_set_is_read_row_by_row(pipe):
    rows = Dataset.from_list(QUESTIONS[:2])
    assert list(pipe(rows, batch_size=2, **OPTIONS)) == [answer(pipe.model, question) for question in QUESTIONS[:2]]


def test_a_tokenizer_may_be_named(pipe, tmp_path):
    pipe.tokenizer.save_pretrained(tmp_path)
    named = pipeline(TASK, model=pipe.model, tokenizer=str(tmp_path))
    assert named(QUESTIONS[0], **OPTIONS) == answer(pipe.model, QUESTIONS[0])


def test_a_memory_stands_for_its_context(pipe):
    memory = pipe.model.compress(QUESTIONS[0]["context"])
    inputs = [{"memory": memory, "prompt": "Where?"}, QUESTIONS[1]]
    expected = [answer(pipe.model, QUESTIONS[0]), answer(pipe.model, QUESTIONS[1])]
    assert pipe(inputs, batch_size=2, **OPTIONS) == expected
    assert pipe(memory, prompt="Where?", **OPTIONS) == expected[0]


def test_many_prompts_about_one_context_compress_it_once(pipe, monkeypatch):
    calls, compress = [], pipe.model.compress
    monkeypatch.setattr(pipe.model, "compress", lambda *args: calls.append(args) or compress(*args))
    context = QUESTIONS[0]["context"]
    answers = pipe({"context": context, "prompt": ["Where?", "Who?"]}, **OPTIONS)
    assert len(calls) == 1
    for prompt, found in zip(["Where?", "Who?"], answers, strict=True):
        assert found == answer(pipe.model, {"context": context, "prompt": prompt})


def test_a_bare_context_goes_with_a_prompt_given_once(pipe):
    assert pipe("The cat sat on the mat.", prompt="Where?", **OPTIONS) == answer(pipe.model, QUESTIONS[0])
    several = pipe(["The cat.", "The dog."], prompt="Which?", **OPTIONS)
    assert several[1] == answer(pipe.model, {"context": "The dog.", "prompt": "Which?"})


def test_several_sequences_and_arguments_given_at_the_start(make_icae):
    model = make_icae()
    pipe = pipeline(TASK, model=model, max_new_tokens=4)
    found = pipe(QUESTIONS[:2], batch_size=2, num_beams=3, num_return_sequences=2, do_sample=False)
    for question, sequences in zip(QUESTIONS[:2], found, strict=True):
        assert sequences == answer(model, question, max_new_tokens=4, num_beams=3, num_return_sequences=2)


def test_answers_are_streamed(pipe):
    streamer = TextIteratorStreamer(pipe.tokenizer, skip_prompt=True, skip_special_tokens=True)
    found = pipe(QUESTIONS[0], streamer=streamer, **OPTIONS)
    assert "".join(streamer) == found[0]["generated_text"]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"prompt": "?"}, r"got the keys \['prompt'\]"),
        ({"context": "x"}, r"got the keys \['context'\]"),
        ({"context": "x", "prompt": "?", "question": "?"}, r"got the keys \['context', 'prompt', 'question'\]"),
    ],
)
def test_inputs_that_lack_something_or_hold_too_much(pipe, inputs, message):
    with pytest.raises(
        ValueError, match=r"Expected a dict with `prompt` and either `context` or `memory`, " + message
    ):
        pipe(inputs)


def test_a_memory_of_several_rows(pipe):
    memory = pipe.model.compress(["one", "two"])
    with pytest.raises(ValueError, match="Expected a memory of one row in an input, got 2 rows"):
        pipe({"memory": memory, "prompt": "?"})


ALONE = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "icae":
            raise ModuleNotFoundError("No module named 'icae'", name="icae")

sys.meta_path.insert(0, Missing())
folder, base, again = sys.argv[1:]
from transformers import AutoModel, pipeline

pipe = pipeline(model=folder, trust_remote_code=True, model_kwargs={"base_model": base})
print(pipe({"context": "The cat sat on the mat.", "prompt": "Where?"}, max_new_tokens=6)[0])
pipe.model.save_pretrained(again)
model = AutoModel.from_pretrained(again, base_model=base, trust_remote_code=True)
print(model.fingerprint)
assert not any(name.split(".")[0] == "icae" for name in sys.modules)
"""


def test_a_saved_model_answers_where_the_package_is_not_installed(make_icae, tmp_path, tokenizer):
    """Through its own config and code, in a fresh process; and what that process saves loads again."""
    model = make_icae()
    model.save_pretrained(tmp_path / "icae")
    make_base().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    arguments = [str(tmp_path / name) for name in ("icae", "base", "again")]
    done = subprocess.run(
        [sys.executable, "-c", ALONE, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found, fingerprint = done.stdout.strip().splitlines()[-2:]
    assert found == str(answer(model, QUESTIONS[0])[0])
    assert fingerprint == model.fingerprint
    names = {"configuration_icae.py", "modeling_icae.py", "pipeline_icae.py", "memory_icae.py", "pretrained_icae.py"}
    for folder in ("icae", "again"):
        assert names <= {path.name for path in (tmp_path / folder).iterdir()}


def test_the_code_of_a_saved_model_is_that_of_this_repository(make_icae, tmp_path):
    make_icae().save_pretrained(tmp_path)
    files = list(tmp_path.glob("*.py"))
    assert len(files) == 7
    for file in files:
        source = ROOT / ("configuration_icae" if file.name == "configuration_icae.py" else "modeling_icae") / file.name
        assert file.read_bytes() == source.read_bytes()


def test_without_trust_the_code_is_not_run(make_icae, tmp_path):
    make_icae().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        pipeline(model=str(tmp_path))


def test_a_model_saved_without_code_names_none(make_icae, tmp_path):
    make_icae().save_pretrained(tmp_path, with_code=False)
    assert not list(tmp_path.glob("*.py"))
    assert "auto_map" not in (tmp_path / "config.json").read_text()


def test_generation_does_not_depend_on_the_order_of_a_batch(pipe):
    torch.manual_seed(0)
    forwards = pipe(QUESTIONS, batch_size=3, **OPTIONS)
    assert pipe(QUESTIONS[::-1], batch_size=3, **OPTIONS)[::-1] == forwards


def test_what_is_none_is_not_given(pipe):
    memory = pipe.model.compress("Ines lives in Bergen by the sea.")
    expected = pipe({"memory": memory, "prompt": "Who?"})
    assert pipe({"context": None, "memory": memory, "prompt": "Who?"}) == expected


def test_no_inputs_have_no_outputs(pipe):
    assert pipe([]) == []


def test_what_is_no_memory_is_refused(pipe):
    with pytest.raises(
        TypeError, match="Expected a memory as `compress` gives it, got str; a text goes under `context`"
    ):
        pipe({"memory": "a text", "prompt": "Who?"})


def test_a_batch_of_no_rows_is_refused(pipe):
    with pytest.raises(ValueError, match="Expected a `batch_size` of at least 1, got 0"):
        list(pipe([{"context": "Ines lives in Bergen by the sea.", "prompt": "Who?"}] * 2, batch_size=0))


def test_how_to_compress_can_be_given(pipe):
    memory = pipe.model.compress("Ines lives in Bergen by the sea.", span_length=8)
    found = pipe({"context": "Ines lives in Bergen by the sea.", "prompt": "Who?"}, span_length=8)
    assert found == pipe({"memory": memory, "prompt": "Who?"})
    long = "The keeper counts. " * 40
    with pytest.raises(ValueError, match="takes longer documents"):
        pipe({"context": long, "prompt": "Who?"}, max_new_tokens=2)
    assert pipe({"context": long, "prompt": "Who?"}, window=256, max_new_tokens=2)
