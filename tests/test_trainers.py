import json
import os
import subprocess
import sys
from itertools import groupby, pairwise
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from accelerate.data_loader import prepare_data_loader
from datasets import Dataset
from peft import LoraConfig
from transformers.trainer_pt_utils import get_length_grouped_indices
from trl import SFTConfig, SFTTrainer

from icae import ICAEForConditionalGeneration
from icae.trainers import ICAEPretrainingConfig, ICAEPretrainingTrainer, pretrain
from icae.trainers.icae_trainer import _AsPrepared, _rows_of_other_texts
from icae.trainers.scripts import ICAEArguments, ScriptArguments, load_data
from tiny import SHORT_RUN, STYLE, made_under, make_base, written_in_evaluation


SENTENCES = [
    "The lighthouse keeper had not spoken to anyone since October.",
    "A train to the north leaves at ten minutes to nine, always late.",
    "When a star runs out of hydrogen, its core contracts and heats up.",
    "Der Garten hinter der Mauer war seit vielen Jahren leer geblieben.",
]
DOCUMENTS = Dataset.from_dict({"text": [sentence * 3 for sentence in SENTENCES]})


@pytest.fixture
def make_trainer(make_icae, tmp_path):
    def make(folder="run", model=None, **options):
        defaults = {
            "output_dir": str(tmp_path / folder),
            "per_device_train_batch_size": 4,
            "eval_reconstructions": 2,
        }
        args = ICAEPretrainingConfig(**(SHORT_RUN | defaults | options))
        return ICAEPretrainingTrainer(model or make_icae(lora_dropout=0.1), args, DOCUMENTS, DOCUMENTS)

    return make


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.trainable_parameters().items()}


def test_training_moves_all_that_is_trained_and_nothing_else(make_trainer, make_icae):
    base = make_base()
    frozen = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = make_icae(base=base)
    before = weights(model)
    make_trainer(model=model).train()
    assert all(not torch.equal(tensor, before[name]) for name, tensor in weights(model).items())
    after = {name.replace(".base_layer", ""): tensor for name, tensor in base.state_dict().items()}
    assert all(torch.equal(after[name], tensor) for name, tensor in frozen.items())


@pytest.mark.parametrize(
    "options", [{}, {"train_sampling_strategy": "group_by_length", "per_device_train_batch_size": 19}]
)
def test_a_resumed_run_equals_an_unbroken_one(make_trainer, options):
    unbroken = make_trainer("unbroken", **options)
    unbroken.train()
    if options:  # the checkpoint is one inside of the second epoch
        assert unbroken.state.epoch == 3 and len(unbroken.train_dataset) == 2 * 19
    resumed = make_trainer("resumed", **options)
    resumed.train(resume_from_checkpoint=str(Path(unbroken.args.output_dir) / "checkpoint-3"))
    assert losses(resumed) == losses(unbroken)
    for name, tensor in weights(resumed.model).items():
        assert torch.equal(tensor, weights(unbroken.model)[name]), name
    assert resumed.state.num_input_tokens_seen == unbroken.state.num_input_tokens_seen


def test_a_streamed_data_set_trains_and_resumes_exactly(make_icae, tmp_path):
    def run(folder, checkpoint=None):
        args = ICAEPretrainingConfig(
            output_dir=str(tmp_path / folder),
            per_device_train_batch_size=2,
            max_steps=6,
            save_steps=3,
            logging_steps=1,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = ICAEPretrainingTrainer(make_icae(), args, DOCUMENTS.to_iterable_dataset(num_shards=2))
        trainer.train(resume_from_checkpoint=checkpoint)
        return losses(trainer)

    assert run("resumed", run("unbroken") and str(tmp_path / "unbroken" / "checkpoint-3")) == run("again")


def test_a_stream_that_is_gone_on_with_in_its_second_pass_says_that_it_starts_there(make_icae, tmp_path, caplog):
    def run(checkpoint=None):
        options = {"output_dir": str(tmp_path / "run"), "per_device_train_batch_size": 16, "save_steps": 1}
        args = ICAEPretrainingConfig(**(SHORT_RUN | options))
        ICAEPretrainingTrainer(make_icae(), args, DOCUMENTS.to_iterable_dataset()).train(checkpoint)

    run()
    for step, warned in ((1, False), (5, True)):  # a pass is of 3 steps
        caplog.clear()
        run(str(tmp_path / "run" / f"checkpoint-{step}"))
        assert ("interrupted after the first pass through a stream" in caplog.text) == warned


def test_several_processes_go_on_in_the_order_of_the_epoch_that_was_interrupted(make_trainer):
    """accelerate sets the epoch of a sampler one level down; behind skipped batches and shards it stands deeper."""
    trainer = make_trainer(train_sampling_strategy="group_by_length")
    loader = trainer.get_train_dataloader()
    own = loader.batch_sampler.sampler
    sharded = prepare_data_loader(loader, num_processes=2, process_index=0, put_on_device=False)
    assert hasattr(sharded.batch_sampler, "batch_sampler") and own.epoch == 0
    trainer.state.epoch = 1.5
    (callback,) = (one for one in trainer.callback_handler.callbacks if isinstance(one, _AsPrepared))
    callback.trainer._ends = []
    callback.on_train_begin(trainer.args, trainer.state, trainer.control, train_dataloader=sharded)
    assert own.epoch == 1


def test_training_leaves_the_end_of_texts_as_it_is_whatever_the_tokenizer_says(make_icae, make_trainer):
    model = make_icae(lora_dropout=0.1)
    model.tokenizer.eos_token = "<|im_end|>"
    trainer = make_trainer(model=model, max_steps=1)
    model.generation_config.eos_token_id = 3  # by the user, who knows why
    before = model.end_token_ids, model.config.text_config.to_dict(), model.generation_config.to_dict()
    trainer.train()
    assert (model.end_token_ids, model.config.text_config.to_dict(), model.generation_config.to_dict()) == before


def test_a_run_goes_on_with_the_architecture_that_it_was_begun_with(make_trainer, make_icae):
    trainer = make_trainer(max_steps=3)
    trainer.train()
    checkpoint = str(Path(trainer.args.output_dir) / "checkpoint-3")
    message = "Expected a model as the run was begun with, lora_alpha 8, lora_dropout 0.1, got lora_alpha 16, "
    with pytest.raises(ValueError, match=message + "lora_dropout 0.0: it would not go on exactly"):
        make_trainer(model=make_icae(lora_alpha=16)).train(checkpoint)


@pytest.mark.parametrize("known", [None, "part"])
def test_a_run_goes_on_on_a_base_of_which_less_is_known(make_trainer, known):
    """An offloaded base has no fingerprint, a quantised one a part of it."""
    trainer = make_trainer(max_steps=3)
    trainer.train()
    file = Path(trainer.args.output_dir) / "checkpoint-3" / "config.json"
    config = json.loads(file.read_text())
    begun = config["base_model_fingerprint"].split("-")[0] if known else None
    file.write_text(json.dumps(config | {"base_model_fingerprint": begun}))
    make_trainer(max_steps=4).train(str(file.parent))
    file.write_text(json.dumps(config | {"base_model_fingerprint": "0123456789abcdef"}))
    with pytest.raises(ValueError, match=r"Expected the base that the run was begun with \(0123456789abcdef\), got"):
        make_trainer(max_steps=4).train(str(file.parent))


def test_evaluations_of_several_sets_have_their_own_names(make_trainer):
    trainer = make_trainer()
    trainer.evaluate()
    found = trainer.evaluate(DOCUMENTS, metric_key_prefix="letters")
    assert not [name for name in found if name.startswith("eval_")]
    assert {"letters_loss", "letters_ae_loss", "letters_ae_loss_other_text", "letters_bleu"} < set(found)
    assert found.items() <= trainer.state.log_history[-1].items()


def test_the_weighed_loss_does_not_depend_on_the_batches(make_icae, tmp_path):
    """Of a batch without continuations, autoencoding has the whole weight."""
    samples = Dataset.from_list([{"context_ids": [7 + n] * 8, "continuation_ids": [], "length": 8} for n in range(4)])
    trainer = ICAEPretrainingTrainer(
        make_icae(),
        ICAEPretrainingConfig(output_dir=str(tmp_path), eval_reconstructions=0, **SHORT_RUN),
        samples,
        samples,
    )
    found = trainer.evaluate()
    assert found["eval_loss"] == pytest.approx(found["eval_ae_loss"])


def test_accuracy_by_position_is_of_the_texts_that_have_it(make_icae, tmp_path):
    """A text of two tokens and its end has no target in one quarter."""
    samples = Dataset.from_list([{"context_ids": [7, 8], "continuation_ids": [], "length": 2}] * 2)
    options = {"eval_reconstructions": 0, "per_device_eval_batch_size": 1}
    args = ICAEPretrainingConfig(output_dir=str(tmp_path), **(SHORT_RUN | options))
    found = ICAEPretrainingTrainer(make_icae(), args, samples, samples).evaluate()
    quarters = {name: value for name, value in found.items() if "quarter" in name}
    assert len(quarters) == 3 and all(0 <= value <= 1 for value in quarters.values())


def test_streams_are_not_dealt_out(make_trainer):
    """Batches of texts of different lengths cannot be joined and dealt out to processes."""
    assert make_trainer().accelerator.dispatch_batches is False


UNEQUAL = Dataset.from_list(
    [
        {"context_ids": [7] * 8, "continuation_ids": [], "length": 8},
        {"context_ids": [8, 9, 7], "continuation_ids": [], "length": 3},
        {"context_ids": [7, 8] * 7, "continuation_ids": [5, 6, 7, 8], "length": 14},
        {"context_ids": [9] * 5, "continuation_ids": [], "length": 5},
    ]
)


def test_a_step_is_the_same_however_it_is_cut_into_batches(make_icae, tmp_path):
    """Its losses are means over all of its targets, and λ is that of the step."""
    found = []
    for size in (4, 2, 1):
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size, "max_steps": 1}
        args = ICAEPretrainingConfig(str(tmp_path / str(size)), **(SHORT_RUN | options), autoencoding_weight=0.4)
        torch.manual_seed(0)
        trainer = ICAEPretrainingTrainer(make_icae(), args, UNEQUAL)
        trainer.train()
        logged = trainer.state.log_history[0]
        assert logged["loss"] == pytest.approx(0.4 * logged["ae_loss"] + 0.6 * logged["lm_loss"], rel=1e-4)
        found.append([logged[name] for name in ("loss", "ae_loss", "lm_loss", "grad_norm", "grad_norm_slots")])
    assert found[1] == pytest.approx(found[0], rel=1e-4) and found[2] == pytest.approx(found[0], rel=1e-4)


def test_the_held_out_loss_is_the_same_however_it_is_cut_into_batches(make_icae, tmp_path):
    found = []
    for size in (4, 2, 1):
        options = SHORT_RUN | {"per_device_eval_batch_size": size, "eval_reconstructions": 0}
        args = ICAEPretrainingConfig(str(tmp_path), **options, autoencoding_weight=0.4)
        torch.manual_seed(0)
        logged = ICAEPretrainingTrainer(make_icae(), args, UNEQUAL, UNEQUAL).evaluate()
        assert logged["eval_loss"] == pytest.approx(0.4 * logged["eval_ae_loss"] + 0.6 * logged["eval_lm_loss"])
        found.append(logged["eval_loss"])
    assert found[1] == pytest.approx(found[0], rel=1e-4) and found[2] == pytest.approx(found[0], rel=1e-4)


def test_samples_without_a_target_are_refused(make_icae, tmp_path):
    args = ICAEPretrainingConfig(output_dir=str(tmp_path), **SHORT_RUN)
    empty = Dataset.from_dict({"text": ["", ""]})
    with pytest.raises(ValueError, match="Expected samples to train on, got none: no row has a target"):
        ICAEPretrainingTrainer(make_icae(), args, empty)
    with pytest.raises(ValueError, match="Expected held-out samples, got none: no row has a target"):
        ICAEPretrainingTrainer(make_icae(), args, DOCUMENTS, empty)
    args.autoencoding_weight = 0
    with pytest.raises(ValueError, match="Expected samples to train on, got none: no row has a target"):
        ICAEPretrainingTrainer(make_icae(), args, Dataset.from_dict({"text": ["abc"]}))


def test_fsdp_which_sees_no_gradient_that_comes_through_the_cache_is_refused(make_trainer, monkeypatch):
    made_under(monkeypatch, SFTTrainer, "is_fsdp_enabled")
    with pytest.raises(ValueError, match="Expected DDP or DeepSpeed ZeRO-2 with several processes, got FSDP"):
        make_trainer()


@pytest.mark.parametrize("count", [1, 4, 5, 401])
def test_groups_of_similar_length_come_in_random_order_the_longest_first(make_icae, tmp_path, count):
    samples = [
        {"context_ids": [5] * length, "continuation_ids": [], "length": length} for length in range(1, 1 + count)
    ]
    options = SHORT_RUN | {"per_device_train_batch_size": 4, "train_sampling_strategy": "group_by_length"}
    args = ICAEPretrainingConfig(output_dir=str(tmp_path), **options)
    sampler = ICAEPretrainingTrainer(make_icae(), args, Dataset.from_list(samples))._get_train_sampler()
    order = list(sampler)
    assert order == list(sampler) and sorted(order) == list(range(count)) and len(sampler) == count
    grouped = get_length_grouped_indices(sampler.lengths, 4, generator=torch.Generator().manual_seed(args.seed))
    cut = [[part[first : first + 4] for first in range(0, count, 4)] for part in (order, grouped)]
    assert sorted(cut[0]) == sorted(cut[1])
    assert cut[0][0] == cut[1][0] and (count % 4 == 0 or cut[0][-1] == cut[1][-1])
    sampler.set_epoch(1)
    assert count < 8 or list(sampler) != order
    if count > 400:
        rises = sum(later[0] > earlier[0] for earlier, later in pairwise(cut[0][1:-1]))
        assert 40 < rises < 58  # of 98; three where groups come from long to short, four times


def test_checkpoints_hold_the_adapter_and_slots_but_not_the_base(make_trainer):
    trainer = make_trainer()
    trainer.train()
    checkpoint = Path(trainer.args.output_dir) / "checkpoint-6"
    assert (checkpoint / "adapter" / "adapter_model.safetensors").exists()
    assert (checkpoint / "icae_slots.safetensors").exists()
    assert not list(checkpoint.glob("model*.safetensors"))
    loaded = ICAEForConditionalGeneration.from_pretrained(checkpoint, base_model=make_base())
    assert loaded.fingerprint == trainer.model.fingerprint


def test_the_best_checkpoint_is_loaded_at_the_end(make_trainer):
    trainer = make_trainer(
        eval_strategy="steps",
        eval_steps=3,
        load_best_model_at_end=True,
        metric_for_best_model="ae_loss",
        greater_is_better=True,  # so that the first one, the worse one, is the best
    )
    trainer.train()
    best = ICAEForConditionalGeneration.from_pretrained(
        Path(trainer.args.output_dir) / "checkpoint-3", base_model=make_base()
    )
    assert trainer.model.fingerprint == best.fingerprint


def test_training_logs_what_decides_whether_it_works(make_trainer):
    trainer = make_trainer(max_steps=2)
    trainer.train()
    entry = trainer.state.log_history[0]
    names = {"ae_loss", "lm_loss", "slot_norm", "num_tokens"}
    assert names | {"grad_norm_adapter", "grad_norm_slots", "grad_norm_tasks"} <= set(entry)
    assert all(entry[name] > 0 for name in names)
    assert trainer.state.log_history[1]["num_tokens"] > entry["num_tokens"]


def test_logs_go_where_report_to_says(make_trainer, tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    make_trainer(max_steps=1, report_to="tensorboard").train()
    assert list((tmp_path / "logs").rglob("events.out.tfevents.*"))


def test_evaluation_reports_the_control_and_real_reconstructions(make_trainer):
    trainer = make_trainer()
    metrics = trainer.evaluate()
    logged = trainer.state.log_history[-1]
    for name in ("ae_loss", "ae_accuracy", "ae_accuracy_quarter_4", "lm_loss", "ae_loss_other_text", "bleu"):
        assert f"eval_{name}" in logged
    assert "eval_exact_prefix" in logged and "eval_loss" in metrics
    batch = next(iter(trainer.get_eval_dataloader()))
    model = trainer.model.eval()
    with torch.no_grad():
        output = model(**batch)
        other = model(**batch, memory=output.memory[[*range(1, len(output.memory)), 0]])
    assert other.task_losses["autoencoding"] != output.task_losses["autoencoding"]


def test_means_of_an_evaluation_are_over_tokens_however_its_rows_are_batched(make_trainer):
    def measured(batch_size):
        trainer = make_trainer(per_device_eval_batch_size=batch_size)
        trainer.evaluate()
        names = ("ae_loss", "ae_accuracy", "ae_accuracy_quarter_4", "lm_loss", "lm_accuracy")
        return [trainer.state.log_history[-1][f"eval_{name}"] for name in names]

    rows = len(make_trainer().eval_dataset)
    assert rows % 4 and measured(4) == pytest.approx(measured(rows), rel=1e-5)


def test_evaluation_is_greedy_whatever_style_of_answers_the_base_asks_for(make_trainer):
    assert written_in_evaluation(make_trainer(), **STYLE) == written_in_evaluation(make_trainer())


def test_the_control_of_an_evaluation_reads_another_context_even_where_neighbours_have_the_same():
    ids = torch.tensor([[4, 5, 0], [4, 5, 0], [4, 5, 6], [4, 5, 0]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 0], [1, 1, 1], [1, 1, 0]])
    assert _rows_of_other_texts(ids, mask) == [2, 2, 3, 2]
    mask[0, 2] = 1  # longer than the others, whatever stands in their padding
    assert _rows_of_other_texts(ids, mask) == [1, 2, 3, 0]
    assert _rows_of_other_texts(ids[[1, 1, 3]], mask[[1, 1, 3]]) is None
    assert _rows_of_other_texts(ids[:1], mask[:1]) is None


def test_a_second_adapter_is_refused(make_icae, tmp_path):
    args = ICAEPretrainingConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    with pytest.raises(ValueError, match=r"Expected no `peft_config`: an ICAE brings its own adapter"):
        ICAEPretrainingTrainer(make_icae(), args, DOCUMENTS, peft_config=LoraConfig())


def test_the_name_of_a_model_is_refused(tmp_path):
    args = ICAEPretrainingConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    with pytest.raises(
        TypeError, match=r"Expected a model, got the name 'org/icae'; load it with .*is_trainable=True"
    ):
        ICAEPretrainingTrainer("org/icae", args, DOCUMENTS)


@pytest.mark.parametrize("args", [None, SFTConfig], ids=["none", "TRL's"])
def test_arguments_that_are_not_this_trainer_s_are_refused(make_icae, args, tmp_path):
    given = args and args(output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=False)
    found = "SFTConfig" if args else "NoneType"
    with pytest.raises(TypeError, match=f"Expected `args` to be an ICAEPretrainingConfig, got {found}"):
        ICAEPretrainingTrainer(make_icae(), given, DOCUMENTS)


def test_a_frozen_model_is_refused(make_icae, tmp_path):
    model = make_icae()
    model._make_trainable(False)
    args = ICAEPretrainingConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    with pytest.raises(ValueError, match=r"Expected a trainable model.*is_trainable=True"):
        ICAEPretrainingTrainer(model, args, DOCUMENTS)


def test_packing_is_refused_with_the_reason(tmp_path):
    with pytest.raises(ValueError, match="packed rows would share one memory"):
        ICAEPretrainingConfig(output_dir=str(tmp_path), packing=True)


def test_a_weight_outside_its_range_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"Expected `autoencoding_weight` in \[0, 1\], got 1.5"):
        ICAEPretrainingConfig(output_dir=str(tmp_path), autoencoding_weight=1.5)


@pytest.mark.parametrize(("share", "weight"), [(1.5, 0.5), (-0.1, 0.5), (0.5, 0.0)])
def test_shuffled_documents_where_they_train_nothing_are_refused(tmp_path, share, weight):
    with pytest.raises(
        ValueError,
        match=rf"Expected `shuffled_share` in \[0, 1\], and 0 without .*, got {share} with an .* of {weight}",
    ):
        ICAEPretrainingConfig(output_dir=str(tmp_path), shuffled_share=share, autoencoding_weight=weight)


def test_held_out_documents_are_not_shuffled(make_icae, tmp_path):
    options = {"report_to": "none", "use_cpu": True, "shuffled_share": 1.0, "max_spans": 1, "short_share": 0.0}
    args = ICAEPretrainingConfig(output_dir=str(tmp_path), **options)
    trainer = ICAEPretrainingTrainer(make_icae(), args, DOCUMENTS, DOCUMENTS)
    decode = trainer.model.tokenizer.decode
    training = "".join(map(decode, trainer.train_dataset["context_ids"]))
    held_out = "".join(map(decode, trainer.eval_dataset["context_ids"]))
    assert held_out == "".join(DOCUMENTS["text"]) != training
    assert not any(trainer.train_dataset["continuation_ids"]) and any(trainer.eval_dataset["continuation_ids"])


def test_gradient_checkpointing_trains_to_the_same_weights(make_trainer, make_icae):
    plain = make_trainer("plain", model=make_icae(), max_steps=2)
    plain.train()
    checkpointed = make_trainer("checkpointed", model=make_icae(), max_steps=2, gradient_checkpointing=True)
    checkpointed.train()
    for name, tensor in weights(checkpointed.model).items():
        torch.testing.assert_close(tensor, weights(plain.model)[name], atol=1e-5, rtol=1e-4)


@pytest.fixture
def command_line(tmp_path, tokenizer):
    """A base, a data file and a configuration file on disk."""
    make_base().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    DOCUMENTS.to_parquet(tmp_path / "train.parquet")
    options = {
        "base_model": str(tmp_path / "base"),
        "dtype": "float32",
        "train_files": [str(tmp_path / "train.parquet")],
        "eval_files": [str(tmp_path / "train.parquet")],
        "span_length": 16,
        "lora_r": 4,
        "output_dir": str(tmp_path / "run"),
        "per_device_train_batch_size": 2,
        "max_steps": 4,
        "save_steps": 2,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 4,
        "eval_samples": 4,
        "eval_reconstructions": 1,
        "report_to": "none",
        "use_cpu": True,
        "learning_rate": 1e-3,
    }
    (tmp_path / "config.yaml").write_text(yaml.dump(options))
    return tmp_path


def test_icae_pretrain_runs_from_a_file_with_overrides_and_goes_on(command_line):
    from icae.cli import main

    config = ["pretrain", "--config", str(command_line / "config.yaml")]
    assert main([*config, "--max_steps", "2"]) == 0
    assert main([*config, "--resume", "true"]) == 0
    history = json.loads((command_line / "run" / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "loss" in entry] == [1, 2, 3, 4]
    assert any("eval_ae_loss" in entry for entry in history)
    model = ICAEForConditionalGeneration.from_pretrained(command_line / "run")
    assert model.config.span_length == 16


def test_another_architecture_than_that_of_the_checkpoint_to_go_on_from_is_an_error(command_line, capsys):
    from icae.cli import main

    config = ["pretrain", "--config", str(command_line / "config.yaml"), "--max_steps", "1", "--eval_strategy", "no"]
    assert main([*config, "--decoder_layout", "sequential"]) == 0
    further = [*config, "--init_from", str(command_line / "run"), "--output_dir", str(command_line / "further")]
    assert main([*further, "--decoder_layout", "sequential"]) == 0  # as it is
    assert main([*further, "--lora_r", "2", "--span_length", "32"]) == 2
    message = f"Expected the architecture of '{command_line / 'run'}', {{'span_length': 16, 'lora_r': 4}}, got "
    assert message + "{'span_length': 32, 'lora_r': 2}; leave that out" in capsys.readouterr().err
    assert main([*further, "--span_length", "128"]) == 2  # also what a new model has by default
    assert "got {'span_length': 128, 'lora_r': 4}; leave that out" in capsys.readouterr().err


def test_all_linear_is_a_name_on_the_command_line_as_well(command_line):
    from icae.cli import main

    config = ["pretrain", "--config", str(command_line / "config.yaml"), "--max_steps", "1", "--eval_strategy", "no"]
    assert main([*config, "--lora_target_modules", "all-linear"]) == 0
    assert json.loads((command_line / "run" / "config.json").read_text())["lora_target_modules"] == "all-linear"


def test_a_finished_run_without_checkpoints_is_not_trained_over(command_line, capsys):
    from icae.cli import main

    config = ["pretrain", "--config", str(command_line / "config.yaml"), "--max_steps", "1", "--save_strategy", "no"]
    config += ["--eval_strategy", "no"]
    assert main(config) == 0
    run = command_line / "run"
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    for options in ([], ["--resume", "true", "--max_steps", "2"], ["--resume", "true", "--max_steps", "-1"]):
        assert main([*config, *options]) == 2
        assert "which holds a finished one and no checkpoints to go on from" in capsys.readouterr().err
    assert main([*config, "--resume", "true"]) == 0
    assert "is complete: 1 steps" in capsys.readouterr().out
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before


def test_a_number_of_slots_beside_the_ratio_of_a_file_takes_its_place(command_line):
    from icae.cli import main

    options = yaml.safe_load((command_line / "config.yaml").read_text()) | {"compression_ratio": 4}
    (command_line / "config.yaml").write_text(yaml.dump(options))
    config = ["pretrain", "--config", str(command_line / "config.yaml"), "--max_steps", "1", "--eval_strategy", "no"]
    assert main([*config, "--num_memory_slots", "2"]) == 0
    saved = json.loads((command_line / "run" / "config.json").read_text())
    assert (saved["compression_ratio"], saved["num_memory_slots"]) == (None, 2)
    further = ["--init_from", str(command_line / "run"), "--output_dir", str(command_line / "further")]
    assert main([*config, "--num_memory_slots", "2", *further]) == 0


def test_a_run_beside_another_kind_of_model_is_refused_before_it_begins(make_trainer, tmp_path):
    make_base().save_pretrained(tmp_path / "run")
    with pytest.raises(ValueError, match="which holds a model of the type 'llama'; give another one"):
        make_trainer("run")


def test_a_run_of_samples_drawn_from_a_stream(command_line, monkeypatch):
    from icae.cli import main

    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.01)  # at each end of a tiny file
    config = ["pretrain", "--config", str(command_line / "config.yaml"), "--max_steps", "2", "--eval_strategy", "no"]
    assert main([*config, "--streaming", "true", "--train_samples", "2"]) == 0


def test_a_run_goes_on_with_its_seed(command_line, capsys):
    from icae.cli import main

    config = ["pretrain", "--config", str(command_line / "config.yaml"), "--eval_strategy", "no"]
    assert main([*config, "--max_steps", "2"]) == 0
    assert main([*config, "--resume", "true", "--seed", "7"]) == 2
    assert "Expected the seed 42, with which the run in" in capsys.readouterr().err


def test_a_split_of_local_files_is_refused(command_line, capsys):
    from icae.cli import main

    assert main(["pretrain", "--config", str(command_line / "config.yaml"), "--eval_split", "test"]) == 2
    assert "Expected `eval_files` beside `train_files`, got `eval_split` ('test')" in capsys.readouterr().err


def test_every_pass_through_a_stream_has_the_samples_that_were_drawn(command_line):
    script = ScriptArguments(train_files=[str(command_line / "train.parquet")], train_samples=2, streaming=True)
    train, _ = load_data(script, 1, "text")
    passes = []
    for epoch in range(3):
        train.set_epoch(epoch)
        passes.append([row["text"] for row in train])
    assert passes[0] == passes[1] == passes[2] and len(passes[0]) == 2


@pytest.mark.parametrize(("texts", "row"), [(["a", None], 1), ([7, 8], 0)])
def test_a_document_that_is_no_text_is_named_by_its_row(make_icae, tmp_path, texts, row):
    documents = Dataset.from_dict({"text": texts})
    args = ICAEPretrainingConfig(output_dir=str(tmp_path), **SHORT_RUN)
    with pytest.raises(ValueError, match=f"Expected documents that are text, got {texts[row]} in row {row}"):
        ICAEPretrainingTrainer(make_icae(), args, documents)


def test_no_documents_are_refused(make_icae, tmp_path):
    args = ICAEPretrainingConfig(output_dir=str(tmp_path), **SHORT_RUN)
    for documents in (DOCUMENTS.take(0), datasets.IterableDataset.from_generator(lambda: iter(()))):
        with pytest.raises(ValueError, match="Expected documents, got none"):
            ICAEPretrainingTrainer(make_icae(), args, documents)


@pytest.mark.parametrize("option", [{"max_spans": 0}, {"continuation_length": -1}, {"short_share": 2}])
def test_numbers_outside_their_range_are_refused(tmp_path, option):
    with pytest.raises(ValueError, match=f"Expected .*`{next(iter(option))}`"):
        ICAEPretrainingConfig(output_dir=str(tmp_path), **option)


@pytest.mark.parametrize("name", ["embed_tokens", "lm_head"])
def test_an_adapter_where_nothing_would_be_trained_is_refused(make_icae, name):
    with pytest.raises(ValueError, match="Expected `lora_target_modules` within the layers of the base, got "):
        make_icae(lora_target_modules=[name, "q_proj"])


def test_a_run_that_was_killed_while_it_wrote_a_checkpoint_goes_on_from_the_one_before(command_line):
    from icae.cli import main

    config = ["pretrain", "--config", str(command_line / "config.yaml"), "--eval_strategy", "no"]
    assert main([*config, "--max_steps", "2"]) == 0
    unfinished = command_line / "run" / "checkpoint-3"
    (unfinished / "adapter").mkdir(parents=True)
    (command_line / "run" / "checkpoint-best").mkdir()
    assert main([*config, "--resume", "true"]) == 0
    history = json.loads((command_line / "run" / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "loss" in entry] == [1, 2, 3, 4]


def test_a_complete_run_stays_as_it_is(command_line, capsys):
    from icae.cli import main

    config = ["pretrain", "--config", str(command_line / "config.yaml"), "--max_steps", "3"]
    assert main(config) == 0
    run = command_line / "run"
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    assert main([*config, "--resume", "true"]) == 0
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before
    assert "is complete: 3 steps" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_dtype_that_a_machine_is_fast_in_is_used_and_recorded(command_line, monkeypatch, dtype):
    from icae.cli import main

    monkeypatch.setattr("icae.dtypes.fast_dtype", lambda cpu: getattr(torch, dtype))
    config = ["pretrain", "--config", str(command_line / "config.yaml"), "--dtype", "auto", "--max_steps", "1"]
    assert main([*config, "--eval_strategy", "no"]) == 0
    record = json.loads((command_line / "run" / "run.json").read_text())
    assert record["arguments"]["dtype"] == dtype


@pytest.mark.parametrize("content", ['{"runs": 3}', "[]"])
def test_a_run_json_of_one_s_own_is_not_written_over(command_line, capsys, content):
    from icae.cli import main

    (command_line / "run").mkdir()
    (command_line / "run" / "run.json").write_text(content)
    assert main(["pretrain", "--config", str(command_line / "config.yaml")]) == 2
    assert "Expected no run.json in " in capsys.readouterr().err
    assert (command_line / "run" / "run.json").read_text() == content


def test_a_configuration_file_that_is_missing_or_no_yaml_is_told_in_words(command_line, capsys):
    from icae.cli import main

    assert main(["pretrain", "--config"]) == 2
    assert "Expected a YAML file behind `--config`, got none" in capsys.readouterr().err
    (command_line / "config.yaml").write_text("max_steps: [3\nseed: 1")
    assert main(["sft", "--config", str(command_line / "config.yaml")]) == 2
    assert "config.yaml" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["pretrain", "--help"])
    assert capsys.readouterr().out.startswith("usage: icae pretrain")


def test_data_must_be_named(command_line, capsys):
    from icae.cli import main

    options = yaml.safe_load((command_line / "config.yaml").read_text()) | {"train_files": None, "eval_files": None}
    (command_line / "config.yaml").write_text(yaml.dump(options))
    assert main(["pretrain", "--config", str(command_line / "config.yaml")]) == 2
    assert "Expected `dataset_name` or `train_files`, got neither" in capsys.readouterr().err


def drawn(file: Path, rows: list[dict], seed: int, max_prompts: int = 2, **options) -> list[dict]:
    """Twenty rows of a file."""
    Dataset.from_list(rows).to_parquet(file)
    script = ScriptArguments(train_files=[str(file)], train_samples=20, **options)
    return list(load_data(script, seed, max_prompts=max_prompts)[0])


def sizes_of_groups(rows: list[dict], column: str) -> list[int]:
    """How many neighbours have the same text in a column, each time."""
    return [len(list(group)) for _, group in groupby(rows, lambda row: row[column])]


@pytest.mark.parametrize("names", [("context", "prompt", "response"), ("input", "prompt", "answer")], ids=["", "PwC"])
def test_train_samples_of_triples_keep_those_about_one_context_together(tmp_path, names):
    rows = [dict(zip(names, (f"text {n // 3}", f"{n}?", "x"), strict=True)) for n in range(60)]
    first, again, other = (drawn(tmp_path / "rows.parquet", rows, seed) for seed in (1, 1, 2))
    assert first == again != other and len(first) == 20 and first != rows[:20]
    assert all(row in rows for row in first)
    assert sizes_of_groups(first, names[0]) == [3] * 6 + [2]


def test_train_samples_of_other_rows_are_drawn_one_by_one(tmp_path):
    """One prompt of a context, streamed rows, prepared samples, a column `input` beside a context."""
    rows = [{"context": f"text {n // 3}", "prompt": f"{n}?", "response": "x", "input": str(n % 2)} for n in range(60)]
    file = tmp_path / "rows.parquet"
    for options in ({"max_prompts": 1}, {"streaming": True}):
        assert len(sizes_of_groups(drawn(file, rows, 1, **options), "context")) > 10
    assert len(sizes_of_groups(drawn(file, rows, 1), "context")) == 7
    samples = [{"context_ids": [n], "prompt_ids": [[n]]} for n in range(60)]
    assert len(drawn(file, samples, 1)) == 20


def test_streamed_samples_of_one_document_do_not_train_together(command_line, monkeypatch):
    from icae.cli import main

    for letter in "ab":
        Dataset.from_dict({"text": [letter * 200] * 5}).to_parquet(command_line / f"{letter}.parquet")
    batches = []
    monkeypatch.setattr(
        "icae.trainers.pretrain.run", lambda trainer, *_: batches.extend(trainer.get_train_dataloader())
    )
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.01)  # at each end of a tiny file
    files = ["--train_files", *(str(command_line / f"{letter}.parquet") for letter in "ab")]
    options = ["--streaming", "true", "--per_device_train_batch_size", "4"]
    assert main(["pretrain", "--config", str(command_line / "config.yaml"), *files, *options]) == 0
    mixed = [len(set(batch["context_ids"][:, 0].tolist())) == 2 for batch in batches]
    assert len(mixed) > 4 and sum(mixed) > len(mixed) / 2


@pytest.mark.parametrize("streaming", [False, True])
def test_train_samples_are_drawn_with_the_seed_and_evaluation_keeps_its_own(command_line, streaming):
    files = [str(command_line / "train.parquet")]
    script = ScriptArguments(train_files=files, eval_files=files, train_samples=3, streaming=streaming)
    loaded = [load_data(script, seed, "text") for seed in (1, 1, 2)]
    first, again, other = ([row["text"] for row in train] for train, _ in loaded)
    assert len(first) == 3 and first == again != other and set(first) < set(DOCUMENTS["text"])
    assert len(loaded[0][1]) == len(DOCUMENTS)


def test_of_each_file_of_documents_so_many_characters_are_drawn_with_the_seed(tmp_path):
    files = [str(tmp_path / name) for name in ("long.parquet", "short.parquet")]
    long, short = [f"{number}" * 50 for number in range(8)], ["a", "b"]
    for file, texts in zip(files, (long, short), strict=True):
        Dataset.from_dict({"text": texts, "source": ["x"] * len(texts)}).to_parquet(file)
    script = ScriptArguments(train_files=files, document_characters=120)
    first, again, other = (load_data(script, seed, "text")[0]["text"] for seed in (1, 1, 2))
    # Three of 50 characters reach 120, and all of the other file do not.
    assert len(set(first) & set(long)) == 3 and set(short) < set(first) and len(first) == 5
    assert list(first) == list(again) and set(first) != set(other)
    script = ScriptArguments(train_files=[str(tmp_path / "*.parquet")], document_characters=120)  # as in a YAML file
    assert list(load_data(script, 1, "text")[0]["text"]) == list(first)
    Dataset.from_dict({"text": ["a", None]}).to_parquet(files[0])
    with pytest.raises(ValueError, match=r"Expected documents that are text, got none in row 1 of .*long\.parquet"):
        load_data(script, 1, "text")


@pytest.mark.parametrize(
    ("options", "got"),
    [({"train_files": ["x.parquet"], "streaming": True}, "streamed ones"), ({"dataset_name": "x"}, "none")],
)
def test_characters_of_what_is_not_a_local_file_of_documents_are_refused(options, got):
    script = ScriptArguments(document_characters=120, **options)
    with pytest.raises(ValueError, match=f"that are not streamed, got {got}; leave it out, or give such files"):
        load_data(script, 0, "text")


@pytest.mark.parametrize("preset", ["paper", "cpu", "round_cpu", "gpu_135m", "gpu_1b", "gpu_7b"])
def test_the_presets_are_understood(preset, tmp_path):
    from trl import TrlParser

    file = Path(__file__).parents[1] / "trainers" / "presets" / f"{preset}.yaml"
    parser = TrlParser((ScriptArguments, ICAEArguments, ICAEPretrainingConfig))
    options = ["--output_dir", str(tmp_path), "--tf32", "false"]  # transformers refuses it where there is no GPU
    _, icae, config = parser.parse_args_and_config(["--config", str(file), *options])
    assert icae.compression_ratio in (4, None) and config.max_steps > 0


@pytest.mark.slow
def test_two_processes_see_the_samples_of_one_and_learn_the_same(command_line):
    """`accelerate launch` on the CPU with gloo: 2 processes x 1 row = 1 process x 2 rows."""
    config = ["--config", str(command_line / "config.yaml"), "--eval_strategy", "no", "--dtype", "float32"]
    accelerate = Path(__file__).parents[1] / "examples" / "accelerate" / "cpu_2_processes.yaml"
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(accelerate)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    options = {
        name: [*config, "--output_dir", str(command_line / name), "--per_device_train_batch_size", str(rows)]
        for name, rows in (("one", 2), ("two", 1))
    }
    pretrain.main(options["one"])
    command = [sys.executable, *launch, "-m", "icae.trainers.pretrain", *options["two"]]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    histories = {}
    for name in options:
        state = json.loads((command_line / name / "trainer_state.json").read_text())
        histories[name] = [entry for entry in state["log_history"] if "loss" in entry]
    assert len(histories["two"]) == 4
    for one, two in zip(histories["one"], histories["two"], strict=True):
        assert one["num_tokens"] == two["num_tokens"]
        for name in ("loss", "ae_loss", "lm_loss", "grad_norm"):
            assert one[name] == pytest.approx(two[name], rel=1e-4)


@pytest.mark.slow
def test_two_processes_learn_together_after_an_evaluation(tmp_path):
    """accelerate prepares a model for evaluation without DDP, and would leave it so."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys, torch\nfrom accelerate.utils import gather_object\n"
        "from datasets import Dataset\nfrom icae import ICAEConfig, ICAEForConditionalGeneration\n"
        "from icae.trainers import ICAEPretrainingConfig, ICAEPretrainingTrainer\n"
        "from tiny import SHORT_RUN, make_base, make_tokenizer\n"
        "texts = Dataset.from_dict({'text': ['abc' * n for n in range(5, 13)]})\n"
        "torch.manual_seed(0)\n"
        "model = ICAEForConditionalGeneration.from_base(make_base(), ICAEConfig(), tokenizer=make_tokenizer())\n"
        "options = SHORT_RUN | {'max_steps': 2, 'per_device_train_batch_size': 1, 'eval_reconstructions': 0}\n"
        "trainer = ICAEPretrainingTrainer(model, ICAEPretrainingConfig(sys.argv[1], **options), texts, texts)\n"
        "trainer.evaluate()\ntrainer.train()\n"
        "found = gather_object([model.memory_embeddings.detach().clone()])\n"
        "assert len(found) == 2 and torch.equal(*found)\n"
        # Not as Python ends, which gloo's threads may turn into an abort (pytorch#179291).
        "torch.distributed.barrier()\nos._exit(0)\n"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [sys.executable, *torchrun, str(script), str(tmp_path / "run")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_a_tiny_icae_memorises_four_sentences_and_reads_them_back(make_trainer, make_icae):
    """Training works end to end: sentences come back from their slots, and not from another text's."""
    torch.manual_seed(0)
    model = make_icae(base=make_base(hidden_size=64), lora_r=32, lora_alpha=64, span_length=66)
    options = {"max_steps": 500, "learning_rate": 3e-3, "max_grad_norm": 1.0, "logging_steps": 100}
    trainer = make_trainer(model=model, continuation_length=0, max_spans=1, short_share=0, **options)
    trainer.train_dataset = trainer.eval_dataset = trainer._prepare(
        Dataset.from_dict({"text": SENTENCES}), model, trainer.args, training=True
    )
    trainer.train()
    trainer.evaluate()
    metrics = trainer.state.log_history[-1]
    assert metrics["eval_ae_loss"] < 0.6 < 3 < metrics["eval_ae_loss_other_text"]
