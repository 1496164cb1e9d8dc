import json
import sys

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM

from icae.cli import main
from icae.evaluation import answers, third_party
from icae.evaluation.answer_files import read_lines
from icae.evaluation.readers import number_of_slots
from icae.evaluation.third_party import KVPressReader, LLMLinguaReader, Tool, tool_version
from tiny import make_base


LOOP = """
import json, sys
for line in sys.stdin:
    row = json.loads(line)
    print(json.dumps({}), flush=True)
"""
SHOUTS = LOOP.format("{'text': row['context'].upper() + ' ' + str(row['budget'])}")
COUNTS = LOOP.format(
    "{'answer': f\"{row['keep']} of {len(row['context'])}\"} if 'max_new_tokens' in row else "
    "{'nats': [float(row['keep'])] * len(row['response'])}"
)


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """Scripts with the same lines in and out as the real ones, that need no package."""
    (tmp_path / "run_llmlingua.py").write_text(SHOUTS)
    (tmp_path / "run_kvpress.py").write_text(COUNTS)
    monkeypatch.setattr(third_party, "TOOLS", tmp_path)
    return tmp_path


def rows_of(model, *contexts):
    (prompt,), (response,) = model.encode_prompts(["Who?"]), model.encode_responses(["Ann"])
    ids = model.tokenizer(list(contexts), add_special_tokens=False)["input_ids"]
    return [{"context_ids": context, "prompt_ids": prompt, "response_ids": response} for context in ids]


def test_what_llmlingua_leaves_is_read_up_to_the_budget(tools, make_icae):
    model = make_icae()
    reader = LLMLinguaReader(model.language_model, model, sys.executable)
    rows = rows_of(model, "ann has a cat and a dog", "bob")
    texts = model.tokenizer.batch_decode(reader.contexts(rows))
    budgets = [number_of_slots(model, row["context_ids"]) for row in rows]
    assert texts == ["ANN HAS A CAT AND A DOG"[: budgets[0]], "BOB"[: budgets[1]]]
    reader.tool.process.terminate()
    assert model.tokenizer.batch_decode(reader.contexts(rows)) == texts  # asked once for each context


def test_kvpress_keeps_the_prefix_and_as_many_positions_as_there_are_slots(tools, make_icae):
    model = make_icae()
    reader = KVPressReader(model.language_model, model, sys.executable)
    rows = rows_of(model, "ann has a cat and a dog", "bob")
    prefix = len(model._prefix("instruction"))
    keep = [prefix + number_of_slots(model, row["context_ids"]) for row in rows]
    assert reader.losses(rows) == keep
    assert reader.nats(rows)[0].tolist() == [keep[0]] * len("Ann.")  # a token for each letter, and the end
    assert reader.answers(rows, 5) == [f"{keep[0]} of {prefix + 23}", f"{keep[1]} of {prefix + 3}"]


def test_a_tool_ends_with_its_reader(tools, make_icae):
    model = make_icae()
    reader = KVPressReader(model.language_model, model, sys.executable)
    process = reader.tool.process
    assert process.poll() is None
    del reader
    assert process.poll() == 0


def test_a_tool_that_breaks_is_named(tmp_path):
    (tmp_path / "run_it.py").write_text("raise SystemExit('no such model')")
    tool = Tool(sys.executable, tmp_path / "run_it.py")
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"Expected a reply of run_it\.py, got none; its own message stands above"
        ):
            tool(context="a")


@pytest.mark.parametrize("python", [sys.executable, "no/such/python"])
def test_an_environment_without_the_package_is_refused_with_the_command_that_installs_it(python):
    with pytest.raises(ValueError, match=r"environment with no-such-tool, got .* -m pip install no-such-tool"):
        tool_version(python, "no-such-tool")
    assert tool_version(sys.executable, "pytest") == pytest.__version__


def test_other_tools_stand_in_the_same_table(tools, make_icae, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(answers, "tool_version", lambda python, package: "1.0")
    make_base().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    make_icae(base=AutoModelForCausalLM.from_pretrained(tmp_path / "base")).save_pretrained(tmp_path / "icae")
    texts = {"context": ["Ann has a cat.", "Bob has two dogs."], "prompt": ["Who?"] * 2, "response": ["Ann", "Bob"]}
    Dataset.from_dict(texts).to_parquet(tmp_path / "data.parquet")
    command = ["--model", str(tmp_path / "icae"), "--data", str(tmp_path / "data.parquet"), "--max-new-tokens", "2"]
    command += ["--llmlingua", sys.executable, "--kvpress", sys.executable, "--output", str(tmp_path / "answers.json")]
    assert main(["evaluate", "answers", *command]) == 0
    names = list(json.loads((tmp_path / "answers.json").read_text())["summary"])
    assert names[4:8] == ["retrieved sentences", "LLMLingua", "kvpress", "no context"]
    assert read_lines(tmp_path / "answers" / "llmlingua.jsonl")[0]["llmlingua"] == "1.0"
