"""`icae average`: a checkpoint whose weights are a mean of those of others."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from icae import ICAEForConditionalGeneration
from icae.cli import main
from icae.hub_upload.layout import ADAPTER_WEIGHTS
from icae.model_cards import write_card
from icae.model_cards.facts import CARD_FACTS, CardFacts, Evaluation, TrainingStage
from icae.modeling_icae.pretrained_icae import SLOTS_FILE
from tiny import make_base


OF_THE_RUN = (
    *("trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", "rng_state_1.pth"),
    *("latest", "zero_to_fp32.py"),
)


@pytest.fixture
def start_and_end(tmp_path, make_icae):
    """Two points of one training: at the end every weight is larger by 1."""
    model = make_icae()
    model.save_pretrained(tmp_path / "start")
    with torch.no_grad():
        for parameter in model.trainable_parameters().values():
            parameter.add_(1)
    model.save_pretrained(tmp_path / "end")
    stage = TrainingStage(
        "ICAE SFT", 3, rows_per_step=1, learning_rate=1.0, schedule="constant", warmup_steps=0, optimizer="sgd", seed=0
    )
    CardFacts(name="tiny", stages=[stage]).save(tmp_path / "end")
    for name in OF_THE_RUN:
        (tmp_path / "end" / name).write_text("{}")
    for name in ("runs", "global_step3"):
        (tmp_path / "end" / name).mkdir()
    return [str(tmp_path / name) for name in ("start", "end")]


@pytest.mark.parametrize(
    ("options", "share", "said"), [([], 0.5, "0.5 : 0.5"), (["0.25", "0.75"], 0.75, "0.25 : 0.75")]
)
def test_every_trained_weight_is_the_mean_and_the_rest_is_the_last_ones(start_and_end, tmp_path, options, share, said):
    output = tmp_path / "mean"
    weights = ["--weights", *options] if options else []
    assert main(["average", *start_and_end, "--output", str(output), *weights]) == 0
    for file in (ADAPTER_WEIGHTS, SLOTS_FILE):
        start, mean = load_file(tmp_path / "start" / file), load_file(output / file)
        assert start.keys() == mean.keys()
        for name, tensor in mean.items():
            torch.testing.assert_close(tensor, start[name] + share)
    facts = CardFacts.load(output)
    assert facts.name == "tiny" and facts.stages[-1].settings == {"average of checkpoints": said}
    of_the_weights = {file.name for file in (tmp_path / "start").iterdir()} | {CARD_FACTS}
    assert {file.name for file in output.iterdir()} == of_the_weights
    assert sorted(file.name for file in tmp_path.iterdir()) == ["end", "mean", "start"]
    model = ICAEForConditionalGeneration.from_pretrained(output, base_model=make_base())
    assert len(model.generate(context="a b", prompt="c", max_new_tokens=2)) == 1


def test_the_card_of_a_mean_names_the_stages_of_all_checkpoints_once(start_and_end, tmp_path):
    (shared,) = CardFacts.load(tmp_path / "end").stages
    for name, seed in (("one", 1), ("other", 2)):
        ICAEForConditionalGeneration.from_pretrained(tmp_path / "end", base_model=make_base()).save_pretrained(
            tmp_path / name
        )
        CardFacts(stages=[shared, replace(shared, seed=seed)]).save(tmp_path / name)
    write_card(tmp_path / "other")
    folders = [str(tmp_path / name) for name in ("start", "end", "one", "other")]
    assert main(["average", *folders, "--output", str(tmp_path / "mean")]) == 0
    assert "\n# mean\n" in (tmp_path / "mean" / "README.md").read_text()
    stages = CardFacts.load(tmp_path / "mean").stages
    assert [stage.seed for stage in stages] == [0, 1, 2]
    assert [stage.settings for stage in stages] == [{}, {}, {"average of checkpoints": "0.25 : 0.25 : 0.25 : 0.25"}]
    # the mean's last stage is the run of "other", with a note: the same run, not a fourth one
    folders = [str(tmp_path / name) for name in ("mean", "other")]
    assert main(["average", *folders, "--output", str(tmp_path / "again")]) == 0
    stages = CardFacts.load(tmp_path / "again").stages
    assert [stage.seed for stage in stages] == [0, 1, 2]
    assert stages[-1].settings == {"average of checkpoints": "0.25 : 0.25 : 0.25 : 0.25, then 0.5 : 0.5"}


def test_what_was_measured_of_the_last_checkpoint_is_not_said_of_the_mean(start_and_end, tmp_path):
    facts = CardFacts.load(tmp_path / "end")
    measured = Evaluation(rows={"icae": {"f1": 0.987}}, context_tokens=5, command="icae evaluate", date="2026-01-01")
    stages = [replace(facts.stages[0], evaluation={"loss": 0.987})]
    replace(facts, stages=stages, answers=measured, reconstruction=measured).save(tmp_path / "end")
    write_card(tmp_path / "end")
    assert main(["average", *start_and_end, "--output", str(tmp_path / "mean")]) == 0
    for file in (CARD_FACTS, "README.md"):
        assert "0.987" in (tmp_path / "end" / file).read_text()
        assert "0.987" not in (tmp_path / "mean" / file).read_text()
    assert "average of checkpoints" in (tmp_path / "mean" / "README.md").read_text()
    # and the run, of which another mean says what was measured, is still one stage
    assert main(["average", *start_and_end, str(tmp_path / "mean"), "--output", str(tmp_path / "again")]) == 0
    assert len(CardFacts.load(tmp_path / "again").stages) == 1


@pytest.mark.parametrize("weights", [["1"], ["0.5", "0.6"], ["-0.5", "1.5"], ["nan", "nan"]])
def test_weights_that_do_not_fit_are_an_error_that_says_how_many_are_needed(start_and_end, tmp_path, weights, capsys):
    assert main(["average", *start_and_end, "--output", str(tmp_path / "mean"), "--weights", *weights]) == 2
    assert "Expected a weight of at least 0 for each of 2 checkpoints, 1 in all, got [" in capsys.readouterr().err


def test_a_mean_that_is_cut_short_is_not_taken_for_one(start_and_end, tmp_path, monkeypatch):
    monkeypatch.setattr("icae.trainers.average.save_file", lambda *_, **__: 1 / 0)
    command = ["average", *start_and_end, "--output", str(tmp_path / "mean")]
    with pytest.raises(ZeroDivisionError):
        main(command)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["end", "start"]
    monkeypatch.undo()
    assert main(command) == 0 and (tmp_path / "mean" / SLOTS_FILE).is_file()


def test_an_output_that_exists_is_an_error_and_stays_as_it_was(start_and_end, capsys):
    before = load_file(f"{start_and_end[0]}/{SLOTS_FILE}")
    assert main(["average", *start_and_end, "--output", start_and_end[0]]) == 2
    assert "Expected an output folder that does not exist yet, got " in capsys.readouterr().err
    assert all(
        torch.equal(before[name], tensor) for name, tensor in load_file(f"{start_and_end[0]}/{SLOTS_FILE}").items()
    )


def test_a_damaged_checkpoint_is_named(start_and_end, tmp_path, capsys):
    file = tmp_path / "start" / ADAPTER_WEIGHTS
    file.write_bytes(file.read_bytes()[:100])
    assert main(["average", *start_and_end, "--output", str(tmp_path / "mean")]) == 2
    assert f"Expected the tensors of a saved ICAE in {file}, got a damaged file" in capsys.readouterr().err


@pytest.mark.parametrize(("config", "named"), [({"span_length": 32}, "span_length"), ({"lora_r": 2}, "lora_r")])
def test_checkpoints_of_other_architectures_are_an_error_that_says_what_differs(
    start_and_end, tmp_path, make_icae, config, named, capsys
):
    make_icae(**config).save_pretrained(tmp_path / "other")
    folders = [start_and_end[0], str(tmp_path / "other")]
    assert main(["average", *folders, "--output", str(tmp_path / "mean")]) == 2
    printed = capsys.readouterr().err
    assert "Expected checkpoints of one architecture" in printed and named in printed
    assert not (tmp_path / "mean").exists()
