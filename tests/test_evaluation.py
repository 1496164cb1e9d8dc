import json

import pytest
import torch
import yaml
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from icae import ICAEForConditionalGeneration
from icae.cli import main
from icae.evaluation import tables
from icae.evaluation.answer_files import AnswerFile
from icae.evaluation.answers import choose_rows, number_of_slots
from icae.evaluation.measures import exact_match, scores, token_f1
from icae.evaluation.readers import SlotReader, TokenReader
from icae.evaluation.reconstruction import write_out
from icae.evaluation.tune_full_context import main as tune
from tiny import STYLE, make_base


TRIPLES = Dataset.from_dict(
    {
        "context": [
            f"It was late. The {color} cat sat on mat number {number}."
            for number in range(3)
            for color in ("red", "tan")
        ],
        "prompt": ["Which cat?"] * 6,
        "response": ["red", "the tan cat that sat on the mat and did not move at all"] * 3,
        "source": ["short", "long"] * 3,
    }
)


@pytest.mark.parametrize(
    ("answer", "reference", "f1", "exact"),
    [
        ("The Cat!", "cat", 1, 1),
        ("a red cat", "the cat", 2 / 3, 0),
        ("cat cat", "cat", 2 / 3, 0),
        ("dog", "cat", 0, 0),
        ("", "the", 1, 1),
        ("", "cat", 0, 0),
    ],
)
def test_answers_are_scored_as_by_squad(answer, reference, f1, exact):
    assert token_f1(answer, reference) == pytest.approx(f1)
    assert exact_match(answer, reference) == exact


def test_long_answers_are_scored_by_rouge():
    found = scores("the cat sat on the mat", "the cat lay on the mat")
    assert found["rouge1"] == pytest.approx(5 / 6) and found["rouge2"] == pytest.approx(3 / 5)


@pytest.fixture
def saved(make_icae, tokenizer, tmp_path):
    make_base().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    make_icae(base=base).save_pretrained(tmp_path / "icae")
    TRIPLES.to_parquet(tmp_path / "data.parquet")
    return tmp_path


def test_full_context_truncation_and_no_context_read_what_they_say(saved):
    model = ICAEForConditionalGeneration.from_pretrained(saved / "icae")
    rows, left_out = choose_rows(str(saved / "data.parquet"), 2, 100, 0, model)
    assert left_out == 0
    assert [row["source"] for row in rows].count("long") == 2 == len(rows) / 2
    row = rows[0]
    assert number_of_slots(model, row["context_ids"]) == int(model.compress(row["context"]).num_slots)
    reader = TokenReader(model.language_model, model, lambda ids: ids[:3])
    text = model.tokenizer.decode(reader.inputs([row])[0])
    assert text == f"<s><|im_start|>user\n{row['context'][:3]}\n\nWhich cat?<|im_end|>\n<|im_start|>assistant\n"


def test_rows_with_long_contexts_are_left_out_and_counted(saved, tmp_path):
    model = ICAEForConditionalGeneration.from_pretrained(saved / "icae")
    longer = Dataset.from_dict(TRIPLES[:2] | {"context": ["A cat.", "x" * 90]})
    longer.to_parquet(tmp_path / "longer.parquet")
    rows, left_out = choose_rows(str(tmp_path / "longer.parquet"), 2, 80, 0, model)
    assert [row["context"] for row in rows] == ["A cat."] and left_out == 1
    with pytest.raises(ValueError, match="Expected rows with a context of at most 5 tokens, got none among 2; raise"):
        choose_rows(str(tmp_path / "longer.parquet"), 2, 5, 0, model)


def test_a_batch_of_answers_equals_one_by_one(saved):
    model = ICAEForConditionalGeneration.from_pretrained(saved / "icae")
    rows, _ = choose_rows(str(saved / "data.parquet"), 2, 100, 0, model)
    rows[0]["context_ids"] = rows[0]["context_ids"][:7]
    for reader in (SlotReader(model), TokenReader(model.language_model, model, lambda ids: ids)):
        with torch.no_grad():
            alone = [reader.losses([row])[0] for row in rows]
            assert reader.losses(rows) == pytest.approx(alone, abs=1e-4)
            assert reader.answers(rows, 5) == [reader.answers([row], 5)[0] for row in rows]


def test_all_readers_are_greedy_whatever_style_of_answers_the_base_asks_for(saved):
    def answers(**style):
        model = ICAEForConditionalGeneration.from_pretrained(saved / "icae")
        for config in (model.generation_config, model.language_model.generation_config):
            config.update(**style)
        rows, _ = choose_rows(str(saved / "data.parquet"), 2, 100, 0, model)
        readers = (SlotReader(model), TokenReader(model.language_model, model, lambda ids: ids))
        windows = [{"source": "a", "ids": row["context_ids"][:24]} for row in rows]
        return [reader.answers(rows, 12) for reader in readers], write_out(model, windows, 20, 4)

    assert answers(**STYLE) == answers()


@pytest.fixture
def tuning(saved):
    """The arguments of a short run of the tuned baseline."""
    options = {
        "base_model": str(saved / "base"),
        "dtype": "float32",
        "train_files": [str(saved / "data.parquet")],
        "span_length": 16,
        "lora_r": 2,
        "output_dir": str(saved / "run"),
        "per_device_train_batch_size": 2,
        "max_steps": 2,
        "warmup_steps": 0,
        "learning_rate": 0.05,
        "report_to": "none",
        "use_cpu": True,
        "tuned": str(saved / "tuned"),
    }
    (saved / "config.yaml").write_text(yaml.dump(options))
    return ["--config", str(saved / "config.yaml")]


def test_the_tuned_baseline_learns_the_response_alone_behind_the_whole_context(saved, tuning, monkeypatch):
    batches = []

    def read(trainer):
        assert trainer.args.gradient_accumulation_steps == 3
        batches.extend(trainer.get_train_dataloader())

    monkeypatch.setattr("trl.SFTTrainer.train", read)
    tune([*tuning, "--gradient_accumulation_steps", "3"])
    decode = AutoTokenizer.from_pretrained(saved / "base").decode
    texts = {
        (decode(ids[labels == -100], skip_special_tokens=True), decode(ids[labels != -100]))
        for batch in batches
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True)
    }
    asked = zip(TRIPLES["context"], TRIPLES["prompt"], TRIPLES["response"], strict=True)
    assert texts == {
        (f"user\n{context}\n\n{prompt}\nassistant\n", f"{response}</s>") for context, prompt, response in asked
    }


@pytest.mark.parametrize(
    ("folder", "words", "message"),
    [("run", ["--resume", "true"], "Expected no `--resume`"), ("tuned", [], "that does not exist yet, got '.*tuned'")],
)
def test_a_tuned_baseline_is_made_anew_and_never_over_another(saved, tuning, folder, words, message):
    (saved / folder).mkdir()
    with pytest.raises(ValueError, match=message):
        tune([*tuning, *words])


def test_icae_evaluate_answers_writes_every_condition_with_its_controls(saved, tuning):
    tune(tuning)
    arguments = [
        "--model",
        str(saved / "icae"),
        "--tuned",
        str(saved / "tuned"),
        "--data",
        str(saved / "data.parquet"),
    ]
    arguments += ["--per-source", "2", "--max-new-tokens", "4", "--output", str(saved / "answers.json")]
    assert main(["evaluate", "answers", *arguments]) == 0
    record = json.loads((saved / "answers.json").read_text())
    names = [
        "another text's slots",
        "full context",
        "full context, tuned",
        "icae",
        "no context",
        "retrieved sentences",
        "summary",
    ]
    assert sorted(record["summary"]) == [*names, "truncated context", "untrained slots"] and record["rows"] == 4
    assert record["by_source"]["icae"]["long"]["rows"] == 2
    assert record["tuned_on"]["triples"] == 4  # two steps of two rows
    assert "tuned on 4 triples" in tables.answers(record)
    losses = {name: row["loss"] for name, row in record["summary"].items()}
    control = losses.pop("another text's slots")
    assert len(set(losses.values())) == 8  # each condition is another one
    # All rows of a source have the same response here: the control reads the same memories, in turn.
    by_row = [AnswerFile(saved / "answers" / f"{name}.jsonl").rows for name in ("icae", "another-texts-slots")]
    own, other = ([rows[row]["loss"] for row in sorted(rows)] for rows in by_row)
    assert all(one != two for one, two in zip(own, other, strict=True)) and control == pytest.approx(losses["icae"])


def test_icae_evaluate_reconstruction_measures_checkpoints_on_the_same_text(saved):
    texts = Dataset.from_dict({"text": [row["context"] * 3 for row in TRIPLES]})
    texts.to_parquet(saved / "texts.parquet")
    arguments = ["--data", str(saved / "texts.parquet")]
    arguments += ["--lengths", "16", "--target-length", "4", "--altered-length", "0", "--per-source", "4"]
    arguments += ["--batch-size", "2", "--output", str(saved / "reconstruction.json")]

    def measured(*models):
        assert main(["evaluate", "reconstruction", *arguments, "--models", *models]) == 0
        return json.loads((saved / "reconstruction.json").read_text())["models"]

    both = measured(f"first={saved / 'icae'}", str(saved / "icae"))
    assert list(both) == ["first", "icae"] and both["first"] == both["icae"]
    (first,) = measured(str(saved / "icae")).values()  # nothing of the run before is left
    assert first == both["icae"] and {"ae_loss", "ae_loss_other_text", "bleu", "exact_prefix", "lm_loss"} <= set(first)


def test_learning_curves_that_cannot_be_told_apart_or_drawn_are_named(saved):
    pytest.importorskip("matplotlib")
    from icae.evaluation.curves import main as curves

    state, output = saved / "icae" / "trainer_state.json", ["--output", str(saved / "curves.json")]
    state.write_text(json.dumps({"log_history": [{"loss": 2.0}]}))
    with pytest.raises(ValueError, match=r"Expected held-out evaluations with `eval_ae_loss` .* got none; train with"):
        curves([str(saved / "icae"), *output])
    measured = {"eval_ae_loss": 2.0, "eval_ae_loss_other_text": 5.0, "eval_ae_accuracy": 0.5, "eval_num_tokens": 1.0}
    state.write_text(json.dumps({"log_history": [measured]}))
    with pytest.raises(ValueError, match=r"Expected folders with names of their own, .* got only \['icae'\]; rename"):
        curves([str(saved / "icae"), str(saved / "icae"), *output])
    del measured["eval_ae_loss_other_text"]  # as where a batch is of one context
    state.write_text(json.dumps({"log_history": [measured]}))
    with pytest.raises(ValueError, match="Expected the control `eval_ae_loss_other_text` in every evaluation of"):
        curves([str(saved / "icae"), *output])
    assert not (saved / "curves.json").exists()


def test_learning_curves_of_both_stages_are_drawn(saved):
    pytest.importorskip("matplotlib")
    from icae.evaluation.curves import main as curves

    for loss in ("ae_loss", "response_loss"):
        accuracy = f"eval_{loss.replace('loss', 'accuracy')}"
        history = [
            {f"eval_{loss}": value, f"eval_{loss}_other_text": 5.0, accuracy: 0.5, "eval_num_tokens": 10.0 * step}
            for step, value in enumerate((4.0, 2.0))
        ]
        (saved / "icae" / "trainer_state.json").write_text(json.dumps({"log_history": history}))
        output = saved / f"{loss}.json"
        curves([str(saved / "icae"), "--loss", loss, "--output", str(output)])
        assert json.loads(output.read_text())["runs"]["icae"][loss] == [4.0, 2.0]
        assert output.with_suffix(".png").stat().st_size > 1000
