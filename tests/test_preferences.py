"""Preference tuning: pairs of responses, their loss, and the command that writes them."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset, IterableDataset
from transformers import AutoModelForCausalLM

from icae.cli import main
from icae.model_cards.callback import _settings
from icae.trainers import DataCollatorForICAESFT, ICAESFTConfig, ICAESFTTrainer, prepare_sft_dataset
from icae.trainers.icae_trainer import ICAETrainer
from icae.trainers.sft_trainer import _margins
from icae.trainers.write_preferences import answers, better_and_worse
from tiny import SHORT_RUN, VOCABULARY, made_under, make_base


CONTEXTS = [
    "Ines lives in Bergen.",
    "The train leaves at ten.",
    "A star becomes a red giant.",
    "The garden was empty.",
]
PROMPTS = ["Who lives in Bergen?", "When does it leave?", "What does it become?", "What was empty?"]
RESPONSES = ["Ines", "at ten", "a red giant", "the garden"]
TRIPLES = Dataset.from_dict({"context": CONTEXTS, "prompt": PROMPTS, "response": RESPONSES})
REJECTED = ["Ines Ines Ines", None, "a cold place", "in in in"]
PAIRS = TRIPLES.add_column("rejected", REJECTED)


@pytest.fixture
def make_trainer(make_icae, tmp_path):
    def make(folder="run", model=None, data=PAIRS, eval_data=None, **options):
        defaults = {
            "output_dir": str(tmp_path / folder),
            "per_device_train_batch_size": 2,
            "pretraining_share": 0.0,
            "preference_weight": 1.0,
            "eval_generations": 0,
        }
        args = ICAESFTConfig(**(SHORT_RUN | defaults | options))
        return ICAESFTTrainer(model or make_icae(lora_dropout=0.1), args, data, eval_data)

    return make


def collated(model, data=PAIRS):
    return DataCollatorForICAESFT()([dict(row) for row in prepare_sft_dataset(data, model)])


# ------------------------------------------------------------------------------------------------------------ data


def test_a_rejected_response_stands_behind_the_one_preferred_to_it(make_icae):
    model = make_icae()
    batch = collated(model)
    assert batch["rejected_rows"].tolist() == [False, True, False, False, True, False, True]
    assert batch["context_index"].tolist() == [0, 0, 1, 2, 2, 3, 3]
    texts = [
        model.tokenizer.decode(ids[mask])
        for ids, mask in zip(batch["response_ids"], batch["response_mask"], strict=True)
    ]
    expected = [text for pair in zip(RESPONSES, REJECTED, strict=True) for text in pair if text]
    assert texts == [f"{text}</s>" for text in expected]
    assert batch["prompt_ids"][0].tolist() == batch["prompt_ids"][1].tolist()


def test_a_batch_without_rejected_responses_says_nothing_of_them(make_icae):
    assert not {"rejected_rows", "reference_margins"} & set(collated(make_icae(), PAIRS.select([1])))


def test_responses_of_token_ids_are_taken_as_they_are(make_icae):
    """A model's own answer that was not at its end must not teach to end there."""
    model = make_icae()
    ids = [[7, 8, 9], [5, 2]]
    data = Dataset.from_dict(
        {"context": CONTEXTS[:2], "prompt": PROMPTS[:2], "response": ids, "rejected": [[6, 6], None]}
    )
    samples = prepare_sft_dataset(data, model)
    assert [row["response_ids"] for row in samples] == [[ids[0]], [ids[1]]]
    assert [row["rejected_ids"] for row in samples] == [[[6, 6]], [[]]]


@pytest.mark.parametrize("wrong", ["", [], ["one", "two"], [1.5]])
def test_what_is_no_rejected_response_is_refused_with_its_row(make_icae, wrong):
    data = PAIRS.remove_columns("rejected").add_column("rejected", [None, None, wrong, None])
    with pytest.raises(ValueError, match="Row 2: Expected a rejected response of at least one letter, as a text or "):
        prepare_sft_dataset(data, make_icae())


@pytest.mark.parametrize("column", ["response", "rejected"])
@pytest.mark.parametrize("token", [-1, len(VOCABULARY)])
def test_token_ids_that_the_base_does_not_have_are_refused_with_their_row(make_icae, column, token):
    rows = [dict(row) | {"response": [7, 8], "rejected": [7]} for row in TRIPLES]
    rows[3][column] = [5, token]
    with pytest.raises(
        ValueError, match=rf"Row 3: Expected token ids from 0 to {len(VOCABULARY) - 1} in a response, got \[5, "
    ):
        prepare_sft_dataset(Dataset.from_list(rows), make_icae())


def test_token_ids_are_no_message(make_icae):
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": [7, 8]}]
    with pytest.raises(ValueError, match="Row 0: Expected a prompt and one response as texts"):
        list(
            prepare_sft_dataset(
                IterableDataset.from_generator(lambda: [{"context": "c", "messages": turns}]), make_icae()
            )
        )


def test_a_rejected_response_too_long_for_the_base_leaves_its_row_out(make_icae):
    data = PAIRS.remove_columns("rejected").add_column("rejected", [None, None, "word " * 100, None])
    assert len(prepare_sft_dataset(data, make_icae())) == 3


# ------------------------------------------------------------------------------------------------------------ loss


def test_rejected_responses_are_no_part_of_the_loss_and_have_one_of_their_own(make_icae):
    model = make_icae()
    with torch.no_grad():
        both = model(**collated(model), autoencoding_weight=0)
        alone = model(**collated(model, TRIPLES), autoencoding_weight=0)
        swapped = TRIPLES.remove_columns("response").add_column("response", [text or "-" for text in REJECTED])
        others = model(**collated(model, swapped), autoencoding_weight=0)
    close = partial(torch.testing.assert_close, atol=1e-4, rtol=1e-4)
    close(both.loss, alone.loss)
    nats, preferred, rejected = (out.token_losses["instruction"].sum(dim=1) for out in (both, alone, others))
    close(nats[[0, 2, 3, 5]], preferred)
    close(nats[[1, 4, 6]], rejected[[0, 2, 3]])
    close(_margins(both, collated(model)["rejected_rows"]), (rejected - preferred)[[0, 2, 3]])


def test_the_preference_loss_is_that_of_dpo_against_the_weights_of_the_start(make_icae, make_trainer):
    model = make_icae(lora_dropout=0.0)
    trainer = make_trainer(model=model, preference_weight=0.7, beta=0.3)
    trainer._add_reference_margins()
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(4)])
    rejected = batch["rejected_rows"]
    with torch.no_grad():
        plain = {name: value for name, value in batch.items() if name != "reference_margins"}
        start = model(**plain, autoencoding_weight=0)
        torch.testing.assert_close(batch["reference_margins"], _margins(start, rejected), atol=1e-4, rtol=1e-4)
        loss = trainer.compute_loss(model.train(), dict(batch))
        # At the start nothing is preferred yet.
        torch.testing.assert_close(loss, start.loss + 0.7 * torch.log(torch.tensor(2.0)), atol=1e-4, rtol=1e-4)
        model.memory_embeddings.mul_(-1)
        now = model(**plain, autoencoding_weight=0)
        rewards = 0.3 * (_margins(now, rejected) - batch["reference_margins"])
        expected = now.loss - 0.7 * torch.log(1 / (1 + torch.exp(-rewards))).mean()
        torch.testing.assert_close(trainer.compute_loss(model.train(), dict(batch)), expected, atol=1e-4, rtol=1e-4)


def test_a_tiny_icae_learns_to_prefer_the_responses_and_leaves_the_base_alone(make_icae, make_trainer):
    base = make_base()
    frozen = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = make_icae(base=base)
    trainer = make_trainer(model=model, max_steps=20, preference_weight=5.0, per_device_train_batch_size=4)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "rewards/margins" in entry]
    assert abs(logs[0]["rewards/margins"]) < 1e-3 and logs[-1]["rewards/margins"] > 2
    assert logs[-1]["rewards/accuracies"] == 1
    after = {name.replace(".base_layer", ""): tensor for name, tensor in base.state_dict().items()}
    assert all(torch.equal(after[name], tensor) for name, tensor in frozen.items())


def test_a_step_with_pairs_is_the_same_however_it_is_cut_into_batches(make_icae, make_trainer):
    found = []
    for size in (8, 4, 2, 1):
        torch.manual_seed(0)
        model = make_icae()
        samples = prepare_sft_dataset(PAIRS, model, pretraining_share=0.5, max_spans=1)
        assert len(samples) == 8 and sum(map(any, samples["rejected_ids"])) == 3
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size, "max_steps": 1}
        trainer = make_trainer(f"by {size}", model=model, data=samples, beta=4.0, **options)
        trainer._add_reference_margins()
        margins = [[margin - 0.5 for margin in row] for row in trainer.train_dataset["reference_margins"]]
        trainer.train_dataset = trainer.train_dataset.remove_columns("reference_margins")
        trainer.train_dataset = trainer.train_dataset.add_column("reference_margins", margins)
        trainer.train()
        logged = trainer.state.log_history[0]
        names = ("loss", "response_loss", "ae_loss", "grad_norm", "rewards/accuracies", "rewards/margins")
        found.append([logged[name] for name in names])
    assert found[0][-1] == pytest.approx(2, rel=1e-3)
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-3)


def test_a_stream_with_rejected_responses_is_refused_without_a_weight_as_well(make_trainer):
    with pytest.raises(ValueError, match="Expected a stream without a column `rejected`, got one"):
        make_trainer(data=PAIRS.to_iterable_dataset(), preference_weight=0.0)


def test_a_resumed_run_compares_with_the_start_as_an_unbroken_one_does(make_trainer):
    def rewards(trainer):
        return [entry["rewards/margins"] for entry in trainer.state.log_history if "rewards/margins" in entry]

    unbroken = make_trainer("unbroken", pretraining_share=0.4)
    unbroken.train()
    resumed = make_trainer("resumed", pretraining_share=0.4)
    resumed.train(resume_from_checkpoint=str(Path(unbroken.args.output_dir) / "checkpoint-3"))
    assert rewards(resumed) == rewards(unbroken) and len(rewards(unbroken)) > 2
    assert resumed.model.fingerprint == unbroken.model.fingerprint


@pytest.mark.slow
def test_two_processes_share_the_work_and_compare_each_response_with_its_own_start(tokenizer, tmp_path):
    make_base().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    PAIRS.select([0, 1, 2, 3, 0]).to_parquet(tmp_path / "pairs.parquet")
    options = SHORT_RUN | {"max_steps": 1, "preference_weight": 1.0, "pretraining_share": 0.0, "dtype": "float32"}
    options |= {"base_model": str(tmp_path / "base"), "train_files": [str(tmp_path / "pairs.parquet")]}
    options |= {"span_length": 16, "per_device_train_batch_size": 3, "output_dir": str(tmp_path / "run")}
    (tmp_path / "config.yaml").write_text(yaml.dump(options))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "icae.cli"]
    command = [sys.executable, *torchrun, "sft", "--config", str(tmp_path / "config.yaml")]
    subprocess.run(command, check=True, timeout=300)
    first = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"][0]
    assert abs(first["rewards/margins"]) < 1e-3, "nothing is preferred at the start"


@pytest.mark.parametrize("form", ["rows", "samples", "stream"])
def test_held_out_rejected_responses_are_not_read(make_icae, make_trainer, form):
    model = make_icae()
    data = {
        "rows": lambda: PAIRS,
        "samples": lambda: prepare_sft_dataset(PAIRS, model),
        "stream": lambda: IterableDataset.from_generator(lambda: iter(PAIRS.to_list())),
    }[form]()
    trainer = make_trainer(model=model, eval_data=data)
    batch = trainer.data_collator(list(trainer.eval_dataset))
    assert len(batch["response_ids"]) == 4 and "rejected_rows" not in batch
    trainer.evaluate()


def test_a_further_trainer_compares_with_the_model_it_is_given(make_icae, make_trainer):
    first = make_trainer(model=make_icae())
    first.train()
    second = make_trainer("second", model=first.model, data=first.train_dataset, max_steps=1)
    second.train()
    assert abs(second.state.log_history[0]["rewards/margins"]) < 1e-3


def test_the_card_names_beta_with_preferences_only(tmp_path):
    settings = [_settings(ICAESFTConfig(str(tmp_path), preference_weight=weight)) for weight in (0.5, 0.0)]
    assert (settings[0]["preference_weight"], settings[0]["beta"]) == (0.5, 0.1)
    assert not {"preference_weight", "beta"} & {*settings[1]}


# ---------------------------------------------------------------------------------------------------------- errors


def test_rejected_responses_without_a_weight_are_refused(make_trainer):
    with pytest.raises(ValueError, match=r"`preference_weight` above 0 with `rejected` responses, got 0"):
        make_trainer(preference_weight=0.0)


@pytest.mark.parametrize("prepared", [False, True])
def test_a_weight_without_rejected_responses_is_refused(make_trainer, make_icae, prepared):
    model = make_icae()
    data = prepare_sft_dataset(TRIPLES, model) if prepared else TRIPLES
    with pytest.raises(
        ValueError, match=r"rows with a `rejected` response for a `preference_weight` of 1.0, got none"
    ):
        make_trainer(model=model, data=data)


def test_rejected_responses_that_are_all_too_long_are_none(make_trainer):
    data = PAIRS.remove_columns("rejected").add_column("rejected", [None, None, "word " * 100, None])
    with pytest.raises(ValueError, match="got none that is short enough"):
        make_trainer(data=data)


def test_streamed_preferences_are_refused(make_trainer):
    with pytest.raises(ValueError, match="Expected a data set in memory with a `preference_weight`"):
        make_trainer(data=IterableDataset.from_generator(lambda: iter(PAIRS.to_list())))


def test_preferences_where_the_model_cannot_be_run_before_training_are_refused(make_trainer, monkeypatch):
    made_under(monkeypatch, ICAETrainer, "is_deepspeed_enabled")
    with pytest.raises(ValueError, match="Expected a `preference_weight` of 0 under DeepSpeed"):
        make_trainer()


def test_a_batch_of_rejected_responses_alone_is_refused(make_icae):
    model = make_icae()
    batch = collated(model) | {"rejected_rows": torch.ones(7, dtype=torch.bool)}
    with pytest.raises(ValueError, match="Expected responses beside the rejected ones, got none"):
        model(**batch, autoencoding_weight=0)


def test_preferences_and_distillation_together_are_refused(make_trainer):
    with pytest.raises(ValueError, match="Expected `distillation_weight` or `preference_weight`, got both"):
        make_trainer(distillation_weight=0.5)


@pytest.mark.parametrize("options", [{"preference_weight": -1.0}, {"beta": 0.0}])
def test_a_weight_below_0_or_a_beta_of_0_is_refused(make_trainer, options):
    with pytest.raises(ValueError, match="Expected a `preference_weight` of at least 0 and a `beta` above 0, got "):
        make_trainer(**options)


# ------------------------------------------------------------------------------------------------- the command


def test_the_greedy_answer_is_rejected_if_another_is_better_else_the_worst():
    assert better_and_worse([0.2, 0.5, 0.1], 0.1) == (1, 0)
    assert better_and_worse([0.5, 0.55, 0.1], 0.1) == (1, 2)
    assert better_and_worse([0.5, 0.3], 0.1) == (0, 1)
    assert better_and_worse([0.5, 0.45], 0.1) is None


@pytest.fixture
def saved(make_icae, tmp_path):
    """A folder with a base, an ICAE on it and triples; the ICAE; and the command that answers them."""
    make_base().save_pretrained(tmp_path / "base")
    model = make_icae(base=AutoModelForCausalLM.from_pretrained(tmp_path / "base")).eval()
    model.tokenizer.save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "icae")
    TRIPLES.add_column("source", list("abcd")).to_parquet(tmp_path / "triples.parquet")
    command = ["write-preferences", "--data", str(tmp_path / "triples.parquet")]
    command += ["--output", str(tmp_path / "pairs.parquet"), "--model", str(tmp_path / "icae")]
    command += ["--base", str(tmp_path / "base"), "--dtype", "float32"]
    return tmp_path, model, [*command, "--max-new-tokens", "6", "--batch-size", "3", "--samples", "3"]


def test_own_answers_become_pairs_behind_the_rows(saved, capsys, monkeypatch):
    folder, model, command = saved
    greedy = model.generate(CONTEXTS, PROMPTS, max_new_tokens=6, do_sample=False).tolist()
    # Answers of a random base have nothing in common with the responses: here longer ones score higher.
    monkeypatch.setattr("icae.trainers.write_preferences.overlap", lambda answer, _: (sum(map(ord, answer)) % 97) / 97)
    assert main([*command, "--least-gap", "0.001"]) == 0
    rows = Dataset.from_parquet(str(folder / "pairs.parquet")).to_list()
    assert [row["source"] for row in rows] == list("aabbccdd")
    for index, (given, pair) in enumerate(zip(rows[::2], rows[1::2], strict=True)):
        assert given["rejected"] is None and model.tokenizer.decode(given["response"]) == f"{RESPONSES[index]}</s>"
        assert pair["context"] == CONTEXTS[index] and pair["prompt"] == PROMPTS[index]
        assert pair["response"] != pair["rejected"]
        assert max(len(pair["response"]), len(pair["rejected"])) <= 6
        assert greedy[index] in (pair["response"], pair["rejected"])
    assert "8 rows in " in (printed := capsys.readouterr().out) and "4 of them pairs; left out are 0 rows" in printed
    samples = prepare_sft_dataset(Dataset.from_list(rows), model, max_prompts=2)
    assert [len(sample["prompt_ids"]) for sample in samples] == [2] * 4
    assert main([*command, "--data", str(folder / "pairs.parquet"), "--output", str(folder / "more.parquet")]) == 2
    assert "Expected rows without a column `rejected`, which is to be written, got one" in capsys.readouterr().err


def test_answers_end_with_their_end_token_or_with_none(saved, monkeypatch):
    _, model, _ = saved
    found = answers(model, TRIPLES.to_list(), max_new_tokens=4, num_return_sequences=2, temperature=0.8, top_p=0.9)
    first = found[0][0][1]
    monkeypatch.setattr(type(model), "end_token_ids", [first])
    cut = answers(model, TRIPLES.to_list(), max_new_tokens=4, num_return_sequences=2, temperature=0.8, top_p=0.9)
    assert [len(row) for row in cut] == [3] * 4 and cut[0][0] == found[0][0][:2] != found[0][0]


def test_rows_too_long_to_be_answered_are_left_out_and_counted(saved, capsys):
    folder, _, command = saved
    rows = TRIPLES.to_list()
    rows[1]["context"] = "x" * 480
    Dataset.from_list(rows).to_parquet(folder / "triples.parquet")
    assert main([*command, "--least-gap", "0.5"]) == 0
    assert "left out are 1 rows that are too long for the base" in capsys.readouterr().out
    assert CONTEXTS[1] not in Dataset.from_parquet(str(folder / "pairs.parquet"))["context"]
    Dataset.from_list(rows[1:2]).to_parquet(folder / "triples.parquet")
    assert main(command) == 2
    assert "Expected rows that the base has positions for, got 1 that are too long" in capsys.readouterr().err
    for option, said in [
        (["--samples", "0"], "--samples: expected a whole number of at least 1, got '0'"),
        (["--batch-size", "0"], "--batch-size: expected a whole number of at least 1, got '0'"),
        (["--seed", "-3"], "--seed: expected a whole number of at least 0, got '-3'"),
    ]:
        with pytest.raises(SystemExit):
            main([*command, *option])
        message = capsys.readouterr().err
        assert said in message and message.startswith("usage: icae write-preferences")
    for option, said in [("--temperature", "0.0 and 0.95"), ("--top-p", "0.8 and 0.0")]:
        assert main([*command, option, "0"]) == 2
        assert f"a `--top-p` above 0 and at most 1, got {said}." in capsys.readouterr().err


@pytest.mark.parametrize("gap", ["0", "1.5"])
def test_a_gap_that_makes_no_pairs_is_refused(saved, capsys, gap):
    assert main([*saved[2], "--least-gap", gap]) == 2
    assert "Expected a `--least-gap` above 0 and at most 1, got " in capsys.readouterr().err


@pytest.mark.parametrize("wrong", [{"response": ""}, {"prompt": ""}])
def test_a_row_without_a_text_to_compare_with_is_refused(saved, capsys, wrong):
    folder, _, command = saved
    rows = TRIPLES.to_list()
    rows[2] |= wrong
    Dataset.from_list(rows).to_parquet(folder / "triples.parquet")
    assert main(command) == 2
    assert "Expected a prompt and a response of at least one letter, got {" in (said := capsys.readouterr().err)
    assert "in row 2; filter the rows." in said
