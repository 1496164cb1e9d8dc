import json
import shutil
import subprocess
from functools import partial
from pathlib import Path

import pytest
import yaml
from datasets import Dataset

from icae import ICAEConfig, ICAEForConditionalGeneration
from icae.cli import main
from icae.evaluation import small_base
from icae.evaluation.sweep import as_words, read_sweep
from icae.modeling_icae.pretrained_icae import SLOTS_FILE
from tiny import SHORT_RUN, make_base


ROOT = Path(__file__).parents[1]
TEXTS = [f"Ines {number} lives in Bergen, and at ten to nine the train leaves for the north." for number in range(6)]


@pytest.fixture
def sweep_file(tmp_path, tokenizer, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_base().save_pretrained("base")
    tokenizer.save_pretrained("base")
    Dataset.from_dict({"text": TEXTS}).to_parquet("texts.parquet")
    (tmp_path / "shared.yaml").write_text(yaml.dump(SHORT_RUN | {"save_strategy": "no"}))
    shared = {
        "config": "shared.yaml",
        "base_model": "base",
        "dtype": "float32",
        "span_length": 16,
        "lora_r": 2,
        "max_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "eval_reconstructions": 0,
    }
    sweep = {
        "title": "a sweep",
        "output": "out/sweep.json",
        "folder": "runs",
        "loss": "lm_loss",
        "shared": {"pretrain": shared},
        "runs": {
            "both tasks": {"stage": "pretrain", "lora_target_modules": ["q_proj", "v_proj"]},
            "continuation only": {"stage": "pretrain", "autoencoding_weight": 0},
            "autoencoding only": {"stage": "pretrain", "continuation_length": 0, "init_from": "runs/both tasks"},
        },
    }
    Path("sweep.yaml").write_text(yaml.dump(sweep, sort_keys=False))
    return Path("sweep.yaml")


def test_a_sweep_trains_each_run_once_and_draws_those_that_have_the_loss(sweep_file, monkeypatch):
    commands = []

    def run(command, check):
        commands.append(command)
        return subprocess.CompletedProcess(command, main(command[command.index("icae.cli") + 1 :]))

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr("icae.evaluation.record._git", lambda *_: None)
    arguments = ["sweep", str(sweep_file), "--train_files", "texts.parquet", "--eval_files", "texts.parquet"]
    assert main(arguments) == 0
    assert main(arguments) == 0
    assert len(commands) == 3
    assert all("-P" in command for command in commands), "a folder named icae is not the package"
    found = json.loads(Path("out/sweep.json").read_text())["runs"]
    assert list(found) == ["both tasks", "continuation only"]  # the third has no continuation to lose
    trained = found["both tasks"]["trained"]
    assert trained["steps"] == 2 and trained["seed"] == SHORT_RUN["seed"] and trained["made_by"]["versions"]
    assert len(found["both tasks"]["lm_loss"]) == 2 and "ae_loss" not in found["continuation only"]
    assert Path("out/sweep.png").is_file()
    adapters = [json.loads(Path("runs", name, "adapter/adapter_config.json").read_text()) for name in found]
    assert next(adapter["target_modules"] for adapter in adapters) == ["q_proj", "v_proj"]


def test_a_finished_run_is_not_taken_for_that_of_another_sweep(sweep_file, monkeypatch, capsys):
    monkeypatch.setattr(subprocess, "run", lambda command, check: subprocess.CompletedProcess(command, 0))
    folder = Path("runs", "both tasks")
    folder.mkdir(parents=True)
    (folder / "sweep.json").write_text('["pretrain", "--max_steps", "9"]')
    assert main(["sweep", str(sweep_file)]) == 2
    message = capsys.readouterr().err
    assert "got one made by ['pretrain', '--max_steps', '9']; remove the folder" in message


def write_log(history: list[dict], command: list[str], check: bool) -> subprocess.CompletedProcess:
    """In place of a run: only its log."""
    folder = Path(command[command.index("--output_dir") + 1])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    return subprocess.CompletedProcess(command, 0)


def test_a_finished_run_is_not_taken_for_that_of_a_changed_preset(sweep_file, monkeypatch, capsys):
    monkeypatch.setattr(subprocess, "run", partial(write_log, [{"eval_lm_loss": 1}]))
    monkeypatch.setattr("icae.evaluation.sweep.draw_curves", lambda shown: None)
    assert main(["sweep", str(sweep_file)]) == main(["sweep", str(sweep_file)]) == 0
    Path("shared.yaml").write_text(Path("shared.yaml").read_text() + "seed: 7\n")
    assert main(["sweep", str(sweep_file)]) == 2
    assert "to be made by what the sweep says now" in capsys.readouterr().err


def test_a_finished_run_is_not_taken_for_one_from_another_start(sweep_file, monkeypatch, capsys):
    trained = []

    def run(command, check):
        done = write_log([{"eval_lm_loss": 1}], command, check)
        folder = Path(command[command.index("--output_dir") + 1])
        (folder / SLOTS_FILE).write_text(f"weights {len(trained)}")
        trained.append(folder.name)
        return done

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr("icae.evaluation.sweep.draw_curves", lambda shown: None)
    assert main(["sweep", str(sweep_file)]) == main(["sweep", str(sweep_file)]) == 0
    assert len(trained) == 3
    shutil.rmtree(Path("runs", "both tasks"))  # from which the third started
    assert main(["sweep", str(sweep_file)]) == 2
    message = capsys.readouterr().err
    assert trained[3:] == ["both tasks"] and "Expected the run in 'runs/autoencoding only' to be made by" in message


def test_a_sweep_without_evaluations_says_so(sweep_file, monkeypatch, capsys):
    monkeypatch.setattr(subprocess, "run", partial(write_log, []))
    assert main(["sweep", str(sweep_file)]) == 2
    assert "Expected evaluations with `eval_lm_loss` in the log of a run, got none" in capsys.readouterr().err


def test_a_run_that_fails_ends_the_sweep_with_its_name(sweep_file, monkeypatch, capsys):
    monkeypatch.setattr(subprocess, "run", lambda command, check: subprocess.CompletedProcess(command, 3))
    assert main(["sweep", str(sweep_file)]) == 2
    assert "Expected the run 'both tasks' to end well, got exit status 3" in capsys.readouterr().err


def test_runs_that_a_sweep_does_not_have_are_named(sweep_file, capsys):
    assert main(["sweep", str(sweep_file), "--only", "neither"]) == 2
    assert "got ['neither']" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"runs": {"a": {}}}, "Expected `stage: pretrain` or `stage: sft` in the run 'a', got None"),
        ({"loss": "f2"}, "Expected `loss` to be one of .* got 'f2'"),
        ({"shared": None}, "Expected `name: value` pairs under 'shared', got None"),
        ({"shared": {"sft": 3}}, "Expected `name: value` pairs under 'sft', got 3"),
        ({"runs": {"a": None}}, "Expected `name: value` pairs under 'a', got None"),
        ({"extra": 1}, "Expected a YAML file with the keys .* got .*'extra'"),
    ],
)
def test_a_sweep_file_with_a_mistake_is_refused(sweep_file, change, message):
    sweep_file.write_text(yaml.dump(yaml.safe_load(sweep_file.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        read_sweep(sweep_file)


@pytest.mark.parametrize("file", sorted((ROOT / "evaluation" / "sweeps").glob("*.yaml")), ids=lambda file: file.stem)
def test_the_project_s_sweeps_are_understood(file):
    from trl import TrlParser

    from icae.evaluation.sweep import as_words
    from icae.trainers import ICAEPretrainingConfig, ICAESFTConfig
    from icae.trainers.scripts import ICAEArguments, ScriptArguments
    from icae.trainers.sft import SFTArguments

    sweep = read_sweep(file)
    kinds = {"pretrain": (ScriptArguments, ICAEPretrainingConfig), "sft": (SFTArguments, ICAESFTConfig)}
    for run in sweep["runs"].values():
        script, config = kinds[run["stage"]]
        values = {key: value for key, value in (sweep["shared"][run["stage"]] | run).items() if key != "stage"}
        values["config"] = str(ROOT / values["config"])
        words = [word for key, value in values.items() for word in as_words(key, value)]
        TrlParser((script, ICAEArguments, config)).parse_args_and_config(words)


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text", "gpt2"])
def test_a_small_base_of_any_family_is_trained_and_can_carry_an_icae(family, tmp_path):
    texts = [f"The {word} is on the table, and {word} is what it is." for word in ("cup", "book", "lamp", "key")] * 8
    Dataset.from_dict({"text": texts}).to_parquet(tmp_path / "texts.parquet")
    command = ["--family", family, "--data", str(tmp_path / "texts.parquet"), "--output", str(tmp_path / "base")]
    small_base.main([*command, "--vocab-size", "300", "--max-steps", "2", "--batch-size", "2"])
    model = ICAEForConditionalGeneration.from_base(str(tmp_path / "base"), ICAEConfig(span_length=8))
    memory = model.eval().compress("The cup is on the table.")
    assert model.config.text_config.model_type == family and memory.num_slots[0] > 0
    # What every pass of an ICAE starts with is a token that the base has seen: the end of the text before.
    assert model.config.start_token_id == model.tokenizer.eos_token_id


def test_a_field_of_several_numbers_is_one_word():
    assert as_words("lr_scheduler_kwargs", {"min_lr_rate": 0.1}) == ["--lr_scheduler_kwargs", '{"min_lr_rate": 0.1}']
