import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from icae import ICAEForConditionalGeneration
from icae.cli import main
from icae.evaluation import answers, tables
from icae.evaluation.answer_files import AnswerFile, append_lines, read_lines
from icae.evaluation.answers import choose_rows, draw_means, fill, long_sources, measure, minus, summarize
from icae.evaluation.arguments import identity
from icae.evaluation.readers import (
    RetrievalReader,
    SlotReader,
    SummaryReader,
    TokenReader,
    number_of_slots,
    split_sentences,
)
from tiny import make_base


CONTEXT = "Ann lives in Rome. Bob has two dogs.\nHe likes {food}. Cleo paints the old sea! Who knows why?"
TRIPLES = Dataset.from_dict(
    {
        "context": [CONTEXT.format(food=food) for food in ("rice", "figs", "soup", "corn")],
        "prompt": ["What does Cleo paint?", "Where does Ann live?"] * 2,
        "response": ["the sea", "in Rome, which is a town of which one says that it was not built in a day"] * 2,
        "source": ["short", "long"] * 2,
    }
)


@pytest.fixture
def saved(make_icae, tokenizer, tmp_path):
    make_base().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    make_icae(base=AutoModelForCausalLM.from_pretrained(tmp_path / "base")).save_pretrained(tmp_path / "icae")
    TRIPLES.to_parquet(tmp_path / "data.parquet")
    return tmp_path


@pytest.fixture
def model(saved):
    return ICAEForConditionalGeneration.from_pretrained(saved / "icae")


@pytest.fixture
def rows(saved, model):
    return choose_rows(str(saved / "data.parquet"), 2, 200, 0, model)[0]


def test_rows_may_have_the_columns_of_pwc(saved, model, rows, capsys):
    file = str(saved / "pwc.parquet")
    TRIPLES.rename_columns({"context": "input", "response": "answer"}).to_parquet(file)
    assert choose_rows(file, 2, 200, 0, model)[0] == rows
    TRIPLES.rename_columns({"context": "text"}).to_parquet(file)
    options = ["--model", str(saved / "icae"), "--dtype", "float32", "--output", str(saved / "out.json")]
    assert main(["evaluate", "answers", "--data", file, *options]) == 2
    assert "Expected the columns `context`, `prompt` and `response`, or" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------------- comparators


def test_sentences_and_lines_together_are_the_text():
    sentences = split_sentences(CONTEXT)
    assert "".join(sentences) == CONTEXT
    assert [sentence.split()[0] for sentence in sentences] == ["Ann", "Bob", "He", "Cleo", "Who"]


def test_the_sentences_that_fit_the_prompt_are_found_and_stand_in_their_order_within_the_budget(model, rows):
    reader = RetrievalReader(model.language_model, model)
    row = next(row for row in rows if row["source"] == "short")
    budget = number_of_slots(model, row["context_ids"])
    (ids,) = reader.contexts([row])
    assert model.tokenizer.decode(ids) == " Cleo paints the old sea!"[:budget] and len(ids) == budget
    both = reader.retrieve(row | {"prompt": "Cleo, Ann", "context_ids": row["context_ids"] * 2})
    assert model.tokenizer.decode(both) == "Ann lives in Rome. Bo Cleo paints the old sea!"
    everything = reader.retrieve(row | {"context_ids": row["context_ids"] * 9})
    assert everything == row["context_ids"]


def test_a_context_without_words_can_be_searched(model, rows):
    ids = RetrievalReader(model.language_model, model).retrieve(rows[0] | {"context": "... !!!", "prompt": "?"})
    assert model.tokenizer.decode(ids) == "... !!!"


def test_a_summary_is_written_once_for_each_context_before_the_prompt_is_known_and_cut_to_the_budget(model, rows):
    reader = SummaryReader(model.language_model, model)
    asked = []
    write = reader.writer.answer_ids
    reader.writer.answer_ids = lambda tasks, length: asked.extend(tasks) or write(tasks, length)
    other_prompt = rows[0] | {"prompt_ids": rows[1]["prompt_ids"][:-1]}
    summaries = reader.contexts([*rows, other_prompt])
    assert reader.contexts(rows) == summaries[:-1] and summaries[-1] == summaries[0]
    assert len(asked) == len({tuple(row["context_ids"]) for row in rows})
    assert "Summarize the text above" in model.tokenizer.decode(reader.writer.inputs(asked[:1])[0])
    budgets = [number_of_slots(model, row["context_ids"]) for row in rows]
    assert all(0 < len(summary) <= budget for summary, budget in zip(summaries, budgets, strict=False))
    alone = SummaryReader(model.language_model, model).contexts(rows[:1])
    assert alone == summaries[:1]


def test_answers_are_the_written_tokens_up_to_the_end_token(model, rows):
    reader = TokenReader(model.language_model, model, lambda ids: ids)
    ids = reader.answer_ids(rows, 6)
    assert reader.answers(rows, 6) == model.tokenizer.batch_decode(ids, skip_special_tokens=True)
    model.config.text_config.eos_token_id = ids[0][2]
    first = ids[0].index(ids[0][2])
    assert reader.answer_ids(rows, 6)[0] == ids[0][:first]


def readers_of_slots_and_tokens(model, **how):
    return SlotReader(model, **how), TokenReader(model.language_model, model, lambda ids: ids, **how)


def test_losses_and_answers_of_the_same_rows_are_read_from_one_memory(model, rows, monkeypatch):
    compressed = []
    compress = type(model).compress

    def counted(self, contexts):
        compressed.append(len(contexts))
        return compress(self, contexts)

    monkeypatch.setattr(type(model), "compress", counted)
    reader, one, other = SlotReader(model), rows[:2], rows[2:4]
    found = [(reader.losses(batch), reader.answers(batch, 3)) for batch in (one, other)]
    assert len(compressed) == 2
    assert found == [(SlotReader(model).losses(batch), SlotReader(model).answers(batch, 3)) for batch in (one, other)]


@pytest.mark.parametrize("sliding_window", [None, 24])
def test_a_repetition_penalty_is_of_what_the_answer_has_said_and_not_of_prompt_or_context(
    make_icae, rows, sliding_window
):
    model = make_icae("mistral", make_base("mistral", sliding_window=sliding_window))
    (letter,) = model.tokenizer("e", add_special_tokens=False)["input_ids"]
    assert all(letter in row["prompt_ids"] and letter in row["context_ids"] for row in rows)
    bias = torch.zeros(model.config.text_config.vocab_size)
    bias[letter] = 99.0
    model.language_model.lm_head.register_forward_hook(lambda module, given, logits: logits + bias)
    for reader in readers_of_slots_and_tokens(model):
        assert reader.answers(rows, 4) == ["eeee"] * len(rows)
    for reader in readers_of_slots_and_tokens(model, repetition_penalty=1e6):
        answers = reader.answers(rows, 4)
        assert all(answer[0] == "e" and len(set(answer)) == len(answer) > 2 for answer in answers)
        assert answers == [reader.answers([row], 4)[0] for row in rows]  # whose prompts differ in length


# ----------------------------------------------------------------------------------------------------------- resuming


def test_the_last_of_lines_is_kept_if_it_is_whole_and_removed_if_it_is_not(tmp_path):
    path, lines = tmp_path / "answers.jsonl", [{"reader": "mine"}, {"row": 1, "answer": "so"}]
    written = "\n".join(json.dumps(line) for line in lines)
    for text in (written, written + '\n{"row": 2, "ans', written + "\n"):
        path.write_text(text)
        assert read_lines(path) == lines
        append_lines(path, [{"row": 3}])
        assert read_lines(path) == [*lines, {"row": 3}]
    path.write_text('{"reader": "m')
    assert read_lines(path) == [] and path.read_text() == ""


def command(saved, *more):
    data, output = str(saved / "data.parquet"), str(saved / "out" / "answers.json")
    options = ["--model", str(saved / "icae"), "--data", data, "--max-new-tokens", "3", "--batch-size", "2"]
    return ["evaluate", "answers", *options, "--dtype", "float32", "--output", output, *more]


def test_what_is_answered_is_not_computed_again_after_an_interruption(saved, monkeypatch):
    seen, losses, measured = [], TokenReader.losses, {}

    def count(reader, rows):
        seen.extend(row["row"] for row in rows)
        if len(seen) == 6:
            raise ValueError("interrupted")
        return losses(reader, rows)

    monkeypatch.setattr(TokenReader, "losses", count)
    assert main(command(saved)) == 2  # in the second batch of the truncated context
    assert not (saved / "out" / "answers.json").exists()
    first = list(seen)
    for _ in range(2):
        assert main(command(saved)) == 0
        record = json.loads((saved / "out" / "answers.json").read_text())
        measured.setdefault("summary", record["summary"])
        assert record["summary"] == measured["summary"]
    # Of five readers of tokens with four rows each, the interrupted batch is the only one that is read twice.
    assert len(first) == 6 and len(seen) == 5 * 4 + 2
    in_one_go = saved / "in one go" / "answers.json"
    assert main([*command(saved), "--output", str(in_one_go)]) == 0
    assert json.loads(in_one_go.read_text())["summary"] == measured["summary"]


def test_more_rows_keep_those_that_are_answered(saved, monkeypatch):
    assert main(command(saved, "--per-source", "1")) == 0
    path = saved / "out" / "answers" / "icae.jsonl"
    before = path.read_text()
    assert main(command(saved, "--per-source", "2")) == 0
    assert path.read_text().startswith(before) and len(read_lines(path)) == 1 + 4


def test_another_checkpoint_is_answered_anew_and_the_baselines_are_not(saved, model, capsys):
    assert main(command(saved)) == 0
    with torch.no_grad():
        model.memory_embeddings.add_(0.1)
    model.save_pretrained(saved / "icae")
    files = saved / "out" / "answers"
    before = {path.name: path.read_text() for path in files.iterdir()}
    assert main(command(saved)) == 0
    printed = capsys.readouterr().out
    changed = {path.name for path in files.iterdir() if path.read_text() != before[path.name]}
    assert changed == {"icae.jsonl", "another-texts-slots.jsonl"}
    assert all(f"{name}: 4 answers of other weights" in printed for name in changed)
    assert main([*command(saved), "--max-new-tokens", "2"]) == 2
    assert "icae.jsonl' answers made from" in capsys.readouterr().err


def test_another_form_of_the_same_weights_is_answered_anew_with_the_baselines_at_its_budget(saved, model, capsys):
    assert main(command(saved)) == 0
    before = {path.name: path.read_text() for path in (saved / "out" / "answers").iterdir()}
    file = saved / "icae" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(
        json.dumps(config | {"compression_ratio": None, "num_memory_slots": model.config.max_slots_per_span})
    )
    other = ICAEForConditionalGeneration.from_pretrained(saved / "icae")
    assert other.fingerprint == model.fingerprint and identity(other) != identity(model)
    ids = [5] * (model.config.span_length + 1)  # the second span is a part of one
    assert number_of_slots(other, ids) == number_of_slots(model, ids)
    for name in ("icae", "another-texts-slots"):
        made_from = json.loads(before[f"{name}.jsonl"].splitlines()[0])
        assert made_from["model"] == identity(model)
    assert main(command(saved)) == 2, "the baselines are of another budget"
    assert "truncated-context.jsonl' answers made from" in capsys.readouterr().err


def test_rows_that_cannot_be_asked_about_are_named(saved, model):
    def choose(**columns):
        Dataset.from_dict(TRIPLES.to_dict() | columns).to_parquet(saved / "odd.parquet")
        return choose_rows(str(saved / "odd.parquet"), 2, 200, 0, model)

    with pytest.raises(ValueError, match=r"each row of the column 'source' .* got none in 1, first in row 2; leave"):
        choose(source=["a", "a", None, "b"])
    with pytest.raises(ValueError, match="Expected prompts as texts, which can be searched for, got conversations"):
        choose(prompt=[[{"role": "user", "content": "Who?"}]] * 4)


def test_rows_about_one_context_are_answered_without_the_control_that_needs_two(saved, capsys):
    one = Dataset.from_dict({name: values[:1] * 2 for name, values in TRIPLES.to_dict().items()})
    one.to_parquet(saved / "data.parquet")
    assert main(command(saved)) == 0
    assert "another text's slots: left out, for all rows are about one context" in capsys.readouterr().out
    assert "another text's slots" not in json.loads((saved / "out" / "answers.json").read_text())["summary"]


def test_contexts_are_tokenized_again_in_each_run(saved, model, rows, monkeypatch):
    monkeypatch.setattr(answers, "encode_contexts", lambda tokenizer, context: [[7, 8, 9]])
    again = choose_rows(str(saved / "data.parquet"), 2, 200, 0, model)[0]
    assert len(again) == len(rows) and all(row["context_ids"] == [7, 8, 9] for row in again)


def test_kept_answers_take_part_without_what_made_them(saved, capsys):
    assert main(command(saved)) == 0
    output = saved / "out" / "answers.json"
    made_from, *lines = read_lines(saved / "out" / "answers" / "full-context.jsonl")
    known = {name: value for name, value in made_from.items() if name != "reader"}
    append_lines(output.with_suffix("") / "full-context-tuned.jsonl", [{"reader": "full context, tuned", **known}])
    append_lines(output.with_suffix("") / "full-context-tuned.jsonl", lines)
    append_lines(output.with_suffix("") / "kvpress.jsonl", [{"reader": "kvpress", **known}, *lines])  # of no budget
    output.write_text(json.dumps(json.loads(output.read_text()) | {"tuned_on": {"triples": 7}}))
    assert main(command(saved)) == 0
    record, printed = json.loads(output.read_text()), capsys.readouterr().out
    assert list(record["summary"])[:3] == ["icae", "full context", "full context, tuned"]
    assert record["summary"]["full context, tuned"] == record["summary"]["full context"]
    assert record["tuned_on"] == {"triples": 7}
    assert "kvpress" not in record["summary"] and "kvpress.jsonl: left out" in printed


def test_kept_answers_to_other_rows_are_left_out(saved, capsys):
    assert main(command(saved, "--per-source", "1")) == 0
    files = saved / "out" / "answers"
    made_from, *lines = read_lines(files / "full-context.jsonl")
    append_lines(files / "full-context-tuned.jsonl", [made_from | {"reader": "full context, tuned"}, *lines])
    assert main(command(saved, "--per-source", "2")) == 0
    assert "full context, tuned" not in json.loads((saved / "out" / "answers.json").read_text())["summary"]
    assert "full-context-tuned.jsonl: left out, for the answers kept are to other rows" in capsys.readouterr().out


def test_all_readers_can_be_chosen_by_name(model):
    assert [reader.name for reader in answers.compared(model, None, None, None, 0)] == list(answers.READERS)


def test_some_readers_answer_alone(saved):
    assert main(command(saved, "--readers", "icae", "no context", "full context")) == 0
    record = json.loads((saved / "out" / "answers.json").read_text())
    assert list(record["summary"]) == ["icae", "full context", "no context"]
    assert len([*(saved / "out" / "answers").iterdir()]) == 3
    assert "--readers icae 'no context' 'full context'" in record["made_by"]["command"]
    assert set(record["icae_minus"]) == {"full context", "no context"}
    assert set(record["full_context_minus"]) == {"no context"}
    means = {name: found["long"]["loss"] for name, found in record["by_source"].items()}
    assert "rougeL" in record["icae_minus"]["no context"]["long"]
    assert "rougeL" not in record["icae_minus"]["no context"]["short"]
    difference = record["icae_minus"]["no context"]["long"]["loss"]
    assert difference == pytest.approx(means["icae"] - means["no context"]) and difference != 0


@pytest.mark.parametrize(
    "readers, message",
    [
        (
            ["full context", "no context"],
            "'icae' and 'full context' among `--readers`, got ['full context', 'no context']",
        ),
        (["icae", "full context", "kvpress"], "Expected answers of 'kvpress' to all rows"),
    ],
)
def test_readers_that_cannot_be_compared_are_named(saved, capsys, readers, message):
    assert main(command(saved, "--readers", *readers)) == 2
    assert message in capsys.readouterr().err


def test_some_readers_do_not_take_the_place_of_the_results_of_all(saved, capsys):
    given = [*command(saved, "--readers", "icae", "full context")]
    at = given.index("--output")
    assert main(given[:at] + given[at + 2 :]) == 2
    assert "Expected an `--output` of its own with `--readers`" in capsys.readouterr().err


def test_all_readers_answer_with_a_repetition_penalty_and_the_losses_stay_as_they_are(saved):
    greedy, penalised = saved / "greedy.json", saved / "penalised.json"
    longer = [*command(saved), "--max-new-tokens", "12"]
    assert main([*longer, "--output", str(greedy)]) == 0
    assert main([*longer, "--output", str(penalised), "--repetition-penalty", "1e6"]) == 0
    for file in (saved / "greedy").iterdir():
        (made_from, *before), (again, *after) = read_lines(file), read_lines(saved / "penalised" / file.name)
        assert again == made_from | {"repetition_penalty": 1e6}
        assert [line["loss"] for line in before] == [line["loss"] for line in after]
        assert [line["answer"] for line in before] != [line["answer"] for line in after], file.name
    assert json.loads(penalised.read_text())["arguments"]["repetition_penalty"] == 1e6


@pytest.mark.parametrize(
    "given, message",
    [
        (["0"], "Expected a `--repetition-penalty` above 0, got 0.0"),
        (["1.2", "--kvpress", "python"], "Expected no `--kvpress` beside `--repetition-penalty`, got both"),
        (["1.2"], "Expected an `--output` of its own with `--repetition-penalty`, got 'results/answers.json'"),
    ],
)
def test_a_repetition_penalty_that_cannot_be_heeded_is_refused(saved, capsys, given, message):
    line = command(saved, "--repetition-penalty", *given)
    if "--output" in message:
        at = line.index("--output")
        line = line[:at] + line[at + 2 :]
    assert main(line) == 2
    assert message in capsys.readouterr().err


def test_half_a_line_of_a_killed_run_is_removed(tmp_path):
    file = AnswerFile(tmp_path / "a.jsonl", {"reader": "a", "data": "d"})
    file.add([{"row": 3, "answer": "two\nlines"}, {"row": 5, "answer": "\u2028"}])
    whole = (tmp_path / "a.jsonl").read_text()
    for cut in (whole + '{"row": 7, "ans', whole):
        (tmp_path / "a.jsonl").write_text(cut)
        again = AnswerFile(tmp_path / "a.jsonl")
        assert again.name == "a" and again.rows == file.rows
        assert (tmp_path / "a.jsonl").read_text() == whole


def test_a_missing_file_of_answers_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"Expected a file of answers, got .*a\.jsonl.*missing or empty"):
        AnswerFile(tmp_path / "a.jsonl")


def test_a_batch_with_one_row_missing_is_answered_as_before(model, rows, tmp_path):
    file = AnswerFile(tmp_path / "a.jsonl", {"reader": "a"})
    reader = TokenReader(model.language_model, model, lambda ids: ids)
    fill(file, lambda: reader, rows, 3, 4)
    whole = dict(file.rows)
    del file.rows[rows[1]["row"]]
    fill(file, lambda: reader, rows, 3, 4)
    assert file.rows == whole


# ---------------------------------------------------------------------------------------------------------- intervals


def values(**readers):
    return {name: {"s": found, "t": [0.5] * 4} for name, found in readers.items()}


def test_intervals_are_of_the_mean_over_sources_and_paired_over_rows():
    full = [0.2, 0.4, 0.6, 0.8]
    draws = draw_means(values(full=full, half=[value / 2 for value in full], same=full))
    assert draws["full"].mean() == pytest.approx(0.5, abs=0.01)
    # The standard error is that of four rows in one of two sources, and none in the other.
    assert draws["full"].std() == pytest.approx(np.std(full, ddof=1) / 4**0.5 / 2, rel=0.05)
    np.testing.assert_array_equal(draws["same"], draws["full"])
    np.testing.assert_allclose(draws["half"], draws["full"] / 2 + 0.125)


def test_the_share_of_the_full_context_has_an_interval_of_its_own(rows):
    def answered(short):
        lines = {}
        for number, row in enumerate(rows):
            answer = short[number % 2] if row["source"] == "short" else row["response"]
            lines[row["row"]] = {"row": row["row"], "loss": 1.0, "answer": answer}
        return measure(lines, rows)

    measured = {"full context": answered(["the sea", "a sea"]), "icae": answered(["sea", "red"])}
    summary = summarize(measured, long_sources(rows))
    assert summary["full context"]["f1_share_interval"] == [1, 1]
    assert summary["full context"]["f1"] == 1 and summary["full context"]["short_exact_match"] == 1
    low, high = summary["icae"]["f1_share_interval"]
    assert low < summary["icae"]["f1_share_of_full_context"] < high
    assert summary["icae"]["f1_interval"] == pytest.approx([low, high])


def test_differences_are_the_icae_minus_the_other_with_intervals_of_few_rows():
    losses = [0.2, 0.4, 0.6, 0.8]
    mine = {"f1": {"s": [0.5] * 4, "t": [0.5]}, "loss": {"s": losses, "t": [1.0]}}
    its = {"f1": {"s": [0.4] * 4, "t": [0.7]}, "loss": {"s": [1.0] * 4, "t": [1.0]}}
    mine["rougeL"], its["rougeL"] = {"s": [0.5] * 4, "t": [0.5]}, {"s": [0.25] * 4, "t": [0.5]}
    found = minus(mine, its, {"s"})
    assert found["s"]["rougeL"] == 0.25 and found["s"]["rougeL_interval"] == [0.25, 0.25]
    assert found["s"]["f1"] == pytest.approx(0.1) and found["s"]["f1_interval"] == pytest.approx([0.1, 0.1])
    assert found["t"] == {"f1": pytest.approx(-0.2), "loss": 0}
    assert found["s"]["loss"] == pytest.approx(-0.5)
    low, high = found["s"]["loss_interval"]
    error = np.std(losses, ddof=1) / 4**0.5
    assert (high - low) / 2 == pytest.approx(3.182 * error, rel=1e-3) and low < -0.5 < high  # Student's, of 4


def test_intervals_of_differences_miss_a_true_difference_of_0_as_rarely_as_they_say():
    rows = np.random.default_rng(0).normal(size=(1000, 5))
    nothing = {str(number): [0.0] * 5 for number in range(1000)}
    found = minus(
        {name: {str(n): list(row) for n, row in enumerate(rows)} for name in ("f1", "loss")},
        {"f1": nothing, "loss": nothing},
        set(),
    )
    missed = sum(not one["f1_interval"][0] <= 0 <= one["f1_interval"][1] for one in found.values())
    assert 0.035 < missed / 1000 < 0.065


def test_a_full_context_that_answers_nothing_right_has_no_shares(rows):
    lines = {row["row"]: {"row": row["row"], "loss": 1.0, "answer": "wrong"} for row in rows}
    summary = summarize({"full context": measure(lines, rows)}, long_sources(rows))
    assert "f1_share_of_full_context" not in summary["full context"]


@pytest.mark.parametrize("limit", [3, 4])
def test_answers_that_reach_the_limit_and_longer_references_are_counted(saved, limit):
    assert main([*command(saved), "--max-new-tokens", str(limit)]) == 0
    record = json.loads((saved / "out" / "answers.json").read_text())
    lines = read_lines(saved / "out" / "answers" / "icae.jsonl")[1:]
    # The tiny tokenizer has a token for each letter.
    assert record["answers_at_the_limit"]["icae"] == sum(len(line["answer"]) >= limit for line in lines)
    assert record["references_above_the_limit"] == sum(len(response) > limit for response in TRIPLES["response"])
    shown = tables.answers(record)
    assert f"Answers end after {limit} tokens at the latest" in shown and "4 references are longer" in shown
    assert record["rows_left_out_as_too_long"] == 0 and "none of whose contexts is too long" in shown
    shown = tables.answers(record | {"rows_left_out_as_too_long": 7})
    assert "those about contexts of at most 768\ntokens; 7 are about longer ones" in shown
    del record["answers_at_the_limit"]  # as records of earlier versions lack it
    assert "Answers end after" not in tables.answers(record)


def test_the_quick_subset_has_one_short_row_of_each_source(saved):
    assert main([*command(saved), "--quick"]) == 0
    record = json.loads((saved / "out" / "answers.json").read_text())
    assert record["rows"] == 2 and "f1_interval" not in record["summary"]["icae"]
    assert record["arguments"]["max_new_tokens"] == 3
    assert record["arguments"]["max_context_length"] == answers.QUICK["max_context_length"]
    assert set(record["examples"]) == {"short", "long"} and len(record["examples"]["short"]["answers"]) == 8
