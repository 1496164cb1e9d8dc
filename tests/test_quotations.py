"""`icae write-quotations`: prompts that train an ICAE to find a place in its memory."""

import re

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Value

from icae.cli import main
from icae.trainers.write_quotations import SENTENCE, quotations


CONTEXT = (
    "The keeper of the lighthouse counted every passing vessel from his window. On stormy evenings he\nlit a second "
    "lantern for the fishermen who returned late! Nobody in the village remembered when this custom had begun. His "
    "daughter wrote the numbers into a heavy leather notebook, and sent it to the harbour office each spring."
)


def pairs(context: str, number: int = 60) -> list[tuple[str, str]]:
    return list(quotations(context, number, np.random.default_rng(0)))


def test_every_response_stands_where_its_prompt_says():
    kinds = set()
    for prompt, response in pairs(CONTEXT):
        if after := re.fullmatch(r'Which words come right after "(.+)"\?', prompt, re.DOTALL):
            pattern = re.escape(after[1]) + r"\s" + re.escape(response) + r"(?!\S)"
        elif gap := re.fullmatch(r'Which words are missing in "(.+) \.\.\. (.+)"\?', prompt, re.DOTALL):
            pattern = r"\s".join(map(re.escape, (gap[1], response, gap[2])))
        else:
            keys = re.fullmatch(r"Quote the sentence with the words (\w+), (\w+), (\w+)\.", prompt)
            assert keys and all(key in response for key in keys.groups()) and response[-1] in ".!?"
            pattern = re.escape(response)
        assert len(re.findall(pattern, CONTEXT)) == 1
        kinds.add(prompt.split()[2])
    assert kinds == {"come", "are", "sentence"}


def test_all_of_a_context_is_asked_for():
    asked = " ".join(response for _, response in pairs(CONTEXT, 300))
    assert {*CONTEXT.split()[8:]} <= {*asked.split()}
    assert any(response.endswith("each spring.") for _, response in pairs(CONTEXT))


def test_sentences_are_whole():
    numbers = "The bridge, of which nobody was proud, had cost the town about 3.5 million dollars in all by then. "
    long = "A sentence of very many words " + "and of still more neighbouring words " * 8 + "ends here. "
    broken = "The last line of a column that goes on in\nthe next one, where the sentence about the lake has its end. "
    assert set(SENTENCE.findall(CONTEXT + " " + numbers + long + broken + CONTEXT)) == {
        "The keeper of the lighthouse counted every passing vessel from his window.",
        "Nobody in the village remembered when this custom had begun.",
        "His daughter wrote the numbers into a heavy leather notebook, and sent it to the harbour office each spring.",
    }


def test_a_place_that_is_not_the_only_one_is_not_asked_for():
    asked = pairs(f"{CONTEXT} {CONTEXT}")
    assert asked and all("spring. The" in prompt for prompt, _ in asked)  # only where the first copy meets the second
    sentence = "Nobody in the village remembered when this custom had begun."
    too_long = f"It is said{' again' * 40} that Nobody in the village remembered when this custom had begun."
    asked = [response for prompt, response in pairs(f"{sentence} {too_long}") if prompt.startswith("Quote")]
    assert not {sentence} & {*asked}  # the other has all its words, too
    assert not [
        prompt for prompt, _ in pairs("la " * 14 + "so") if "la la la la" in prompt.partition("right after")[2]
    ]


@pytest.mark.parametrize("context", ["", "Four words, no more."])
def test_too_short_a_context_gives_no_prompt(context):
    assert pairs(context) == []


@pytest.mark.parametrize("names", [("context", "prompt", "response"), ("input", "prompt", "answer")], ids=["", "PwC"])
def test_the_new_rows_stand_behind_those_about_their_context(names, tmp_path, capsys):
    other = (
        "A second text about mountains, rivers and glaciers that nobody had ever bothered to measure. " + CONTEXT[:150]
    )
    given = [(CONTEXT, "Who counts?", "The keeper."), (CONTEXT, "When?", "At night."), (other, "What?", "Rivers.")]
    rows = [dict(zip(names, row, strict=True)) | {"source": "x"} for row in given]
    features = Features({name: Value("string") for name in rows[0]} | {"source": ClassLabel(names=["w", "x"])})
    Dataset.from_list(rows, features=features).to_parquet(tmp_path / "given.parquet")
    files = ["--data", str(tmp_path / "given.parquet"), "--output", str(tmp_path / "new.parquet")]
    assert main(["write-quotations", *files, "--per-context", "3", "--seed", "4"]) == 0
    dataset = Dataset.from_parquet(str(tmp_path / "new.parquet"))
    assert dataset.features["source"] == features["source"]
    written = dataset.to_list()
    expected = [
        dict(context=context, prompt=prompt, response=response, source=1)
        for index, context in enumerate((CONTEXT, other))
        for prompt, response in [
            *((prompt, response) for text, prompt, response in given if text == context),
            *quotations(context, 3, np.random.default_rng([4, index])),
        ]
    ]
    assert written == expected and len(written) > 5
    assert f"{len(written)} rows in " in (printed := capsys.readouterr().out)
    assert f"{len(written) - 3} of them new" in printed


def test_the_new_rows_have_no_rejected_response_which_is_of_another_prompt(tmp_path):
    rows = [{"context": CONTEXT, "prompt": "Who?", "response": "The keeper.", "rejected": "worse"}]
    Dataset.from_list(rows).to_parquet(tmp_path / "given.parquet")
    files = ["--data", str(tmp_path / "given.parquet"), "--output", str(tmp_path / "new.parquet")]
    assert main(["write-quotations", *files]) == 0
    first, *new = Dataset.from_parquet(str(tmp_path / "new.parquet")).to_list()
    assert first["rejected"] == "worse" and new and all(row["rejected"] is None for row in new)


@pytest.mark.parametrize("name", ["context", "prompt", "response"])
def test_triples_that_are_not_all_text_are_refused(tmp_path, capsys, name):
    rows = [{"context": CONTEXT, "prompt": "Who?", "response": "The keeper."} | {name: ["a", "b"]}]
    Dataset.from_list(rows).to_parquet(tmp_path / "given.parquet")
    files = ["--data", str(tmp_path / "given.parquet"), "--output", str(tmp_path / "new.parquet")]
    assert main(["write-quotations", *files]) == 2
    assert f"Expected contexts, prompts and responses that are text, got {name}s as" in capsys.readouterr().err


def test_other_columns_are_an_error_that_says_which(tmp_path, capsys):
    Dataset.from_list([{"text": "x"}]).to_parquet(tmp_path / "given.parquet")
    files = ["--data", str(tmp_path / "given.parquet"), "--output", str(tmp_path / "new.parquet")]
    assert main(["write-quotations", *files]) == 2
    message = (
        "Expected the columns `context`, `prompt` and `response`, or `input`, `prompt` and `answer`, got ['text']"
    )
    assert message in capsys.readouterr().err
