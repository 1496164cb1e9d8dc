"""Preference tuning: pairs of responses, their loss, and the command that writes them."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from transformers import AutoModelForCausalLM

from icae.cli import main
from icae.trainers import DataCollatorForICAESFT, ICAESFTConfig, ICAESFTTrainer, prepare_sft_dataset
from icae.trainers.sft_trainer import _margins
from icae.trainers.write_preferences import better_and_worse
from tiny import SHORT_RUN, make_base


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
    texts = [model.tokenizer.decode(ids[mask]) for ids, mask in zip(batch["response_ids"], batch["response_mask"])]  # noqa: B905
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


@pytest.mark.parametrize("wrong", ["", []])
def test_an_empty_rejected_response_is_refused_with_its_row(make_icae, wrong):
    data = PAIRS.remove_columns("rejected").add_column("rejected", [None, None, wrong, None])
    with pytest.raises(ValueError, match=r"Row 2: Expected a rejected response of at least one letter, or none, got "):
        prepare_sft_dataset(data, make_icae())


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
    assert abs(logs[0]["rewards/margins"]) < 1e-3 and logs[-1]["rewards/margins"] > 1
    assert logs[-1]["rewards/accuracies"] == 1
    after = {name.replace(".base_layer", ""): tensor for name, tensor in base.state_dict().items()}
    assert all(torch.equal(after[name], tensor) for name, tensor in frozen.items())


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


@pytest.mark.parametrize("prepared", [False, True])
def test_held_out_rejected_responses_are_not_read(make_icae, make_trainer, prepared):
    model = make_icae()
    trainer = make_trainer(model=model, eval_data=TRIPLES)
    expected = trainer.evaluate()["eval_response_accuracy"]
    data = prepare_sft_dataset(PAIRS, model) if prepared else PAIRS
    assert trainer.evaluate(data)["eval_response_accuracy"] == expected


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


def test_streamed_preferences_are_refused(make_trainer):
    with pytest.raises(ValueError, match="Expected a data set in memory with a `preference_weight`"):
        make_trainer(data=PAIRS.to_iterable_dataset())


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


def test_own_answers_become_pairs_behind_the_rows(make_icae, tmp_path, capsys):
    make_base().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = make_icae(base=base).eval()
    model.tokenizer.save_pretrained(tmp_path / "base")
    greedy = model.generate(CONTEXTS, PROMPTS, max_new_tokens=6, do_sample=False).tolist()
    data = TRIPLES.add_column("source", list("abcd"))
    data.to_parquet(tmp_path / "triples.parquet")
    model.save_pretrained(tmp_path / "icae")
    files = ["--data", str(tmp_path / "triples.parquet"), "--output", str(tmp_path / "pairs.parquet")]
    options = ["--model", str(tmp_path / "icae"), "--base", str(tmp_path / "base"), "--dtype", "float32"]
    options += ["--max-new-tokens", "6", "--batch-size", "3", "--least-gap", "0.0", "--samples", "3"]
    assert main(["write-preferences", *files, *options]) == 0
    rows = Dataset.from_parquet(str(tmp_path / "pairs.parquet")).to_list()
    assert [row["source"] for row in rows] == list("aabbccdd")
    for index, (given, pair) in enumerate(zip(rows[::2], rows[1::2], strict=True)):
        assert given["rejected"] is None and model.tokenizer.decode(given["response"]) == f"{RESPONSES[index]}</s>"
        assert pair["context"] == CONTEXTS[index] and pair["prompt"] == PROMPTS[index]
        assert 1 <= len(pair["response"]) <= 6 and 1 <= len(pair["rejected"]) <= 6
        assert pair["response"] == greedy[index] or pair["rejected"] == greedy[index]
    assert "8 rows in " in (printed := capsys.readouterr().out) and "4 of them pairs" in printed
    samples = prepare_sft_dataset(Dataset.from_list(rows), model, max_prompts=2)
    assert [len(sample["prompt_ids"]) for sample in samples] == [2] * 4
