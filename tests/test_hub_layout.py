import functools
import json
import shutil
import subprocess
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hub_server import BASE, LAYOUT, contents, sha256
from icae import ICAEForConditionalGeneration
from icae.cli import main
from icae.hub_upload import alone, assemble, check, check_base_id, check_training_state, training_state, verify
from icae.hub_upload.checks import _check_sizes
from icae.hub_upload.layout import CODE
from icae.model_cards import CardFacts, model_card, write_card
from tiny import make_base


@pytest.fixture
def base_folder(tmp_path, tokenizer):
    make_base().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


@pytest.fixture
def model(make_icae, base_folder):
    """A model whose base lies in a folder and is known by its name on the Hub."""
    return make_icae(base=AutoModelForCausalLM.from_pretrained(base_folder), base_model_name_or_path=BASE)


@pytest.fixture
def checkpoint(model, tmp_path):
    """As a trainer leaves it: with a tokenizer, its state and its arguments, but not for publication."""
    model.save_pretrained(tmp_path / "checkpoint", with_code=False)
    for name in ("training_args.bin", "optimizer.pt", "trainer_state.json", "events.out.tfevents.1", "notes.txt"):
        (tmp_path / "checkpoint" / name).write_text("{}")
    return tmp_path / "checkpoint"


@pytest.fixture
def folder(checkpoint, tmp_path):
    assemble(checkpoint, tmp_path / "folder")
    return tmp_path / "folder"


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


# --------------------------------------------------------------------------------------------------------- assemble


def test_a_checkpoint_becomes_the_whole_layout_and_nothing_else(checkpoint, folder):
    assert files(folder) == LAYOUT
    for name in ("icae_slots.safetensors", "adapter/adapter_model.safetensors", "generation_config.json"):
        assert (folder / name).read_bytes() == (checkpoint / name).read_bytes()
    for name, source in CODE.items():
        assert (folder / name).read_bytes() == source.read_bytes()
    config = json.loads((folder / "config.json").read_text())
    assert config["auto_map"]["AutoModel"] == "modeling_icae.ICAEForConditionalGeneration"
    assert list(config["custom_pipelines"]) == ["icae-context-generation"]
    check(folder)


def test_a_model_saved_with_its_code_gives_the_same_configuration(model, folder, tmp_path):
    model.save_pretrained(tmp_path / "whole")
    assert (tmp_path / "whole" / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    assert files(tmp_path / "whole") | {"README.md", "icae_card.json"} == LAYOUT


def test_the_card_is_made_from_the_facts_and_names_the_repository(checkpoint, tmp_path):
    CardFacts(license="apache-2.0").save(checkpoint)
    assemble(checkpoint, tmp_path / "folder", repo_id="org/icae-tiny")
    card = (tmp_path / "folder" / "README.md").read_text()
    assert card == model_card(tmp_path / "folder")
    assert "license: apache-2.0" in card and "org/icae-tiny" in card
    assert CardFacts.load(tmp_path / "folder").repo_id == "org/icae-tiny"


def test_a_generated_card_of_the_checkpoint_is_made_again_for_its_repository(checkpoint, tmp_path):
    CardFacts(name="run", repo_id="org/earlier", revision="0123abc").save(checkpoint)
    write_card(checkpoint)
    assert '"org/earlier"' in (checkpoint / "README.md").read_text()
    assemble(checkpoint, tmp_path / "same", repo_id="org/earlier")
    assert (tmp_path / "same" / "README.md").read_bytes() == (checkpoint / "README.md").read_bytes()
    facts = CardFacts.load(checkpoint)
    facts.license = "mit"  # known only after the card was made
    facts.save(checkpoint)
    assemble(checkpoint, tmp_path / "folder", repo_id="org/icae-tiny")
    card = (tmp_path / "folder" / "README.md").read_text()
    assert '"org/icae-tiny"' in card and "org/earlier" not in card and "license: mit" in card
    assert "0123abc" not in card, "a commit of another repository"


def test_a_card_of_the_checkpoint_s_own_is_kept(checkpoint, tmp_path):
    write_card(checkpoint)
    changed = (checkpoint / "README.md").read_text().replace("## Limits", "## Limits, as I see them")
    for number, text in enumerate(("# Mine\n", changed)):
        (checkpoint / "README.md").write_text(text)
        assemble(checkpoint, tmp_path / str(number))
        assert (tmp_path / str(number) / "README.md").read_text() == text


def test_the_adapter_names_the_base_and_its_revision_as_the_configuration_does(checkpoint, tmp_path):
    config = json.loads((checkpoint / "config.json").read_text())
    config |= {"base_model_name_or_path": "org/renamed", "base_model_revision": "v1"}
    (checkpoint / "config.json").write_text(json.dumps(config))
    assemble(checkpoint, tmp_path / "folder")
    adapter = json.loads((tmp_path / "folder" / "adapter" / "adapter_config.json").read_text())
    assert (adapter["base_model_name_or_path"], adapter["revision"]) == ("org/renamed", "v1")


def test_a_checkpoint_without_a_tokenizer_gets_the_given_one(checkpoint, tokenizer, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (checkpoint / name).unlink()
    with pytest.raises(ValueError, match=r"Expected a tokenizer in .* got none; give the base's as `tokenizer`"):
        assemble(checkpoint, tmp_path / "folder")
    assemble(checkpoint, tmp_path / "folder", tokenizer=tokenizer)
    assert files(tmp_path / "folder") == LAYOUT
    found = AutoTokenizer.from_pretrained(tmp_path / "folder")
    assert found("a b")["input_ids"] == tokenizer("a b")["input_ids"]


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(
        ValueError, match=r"Expected a saved ICAE in the folder .*, but icae_slots.safetensors, adapter"
    ):
        assemble(tmp_path, tmp_path / "folder")


# ------------------------------------------------------------------------------------------------------------ check


def change_config(folder: Path, **values):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def change_adapter(folder: Path, **values):
    file = folder / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def append(name: str, text: str):
    def change(folder: Path):
        (folder / name).write_text((folder / name).read_text() + text)

    return change


def write(name: str, content: bytes = b"{}"):
    def change(folder: Path):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)

    return change


def fill(name: str, size: int):
    """A safetensors file that loads but holds a tensor too many."""

    def change(folder: Path):
        save_file(load_file(folder / name) | {"base": torch.zeros(size)}, folder / name)

    return change


TOKEN = "hf_" + "a1B2c3D4" * 4
REFUSALS = {
    "pickle": (write("training_args.bin"), "Expected no pickles, .* got training_args.bin; remove"),
    "pickle below": (
        write("last-checkpoint/optimizer.pt"),
        "Expected no pickles, .* got last-checkpoint/optimizer.pt",
    ),
    "root adapter": (
        write("adapter_config.json"),
        r"Expected no 'adapter_config.json' at the root, got one: .* bare base .* 'adapter/adapter_config.json'",
    ),
    "missing": (lambda folder: (folder / "README.md").unlink(), "Expected the whole layout, but README.md is missing"),
    "undeclared": (write("notes.txt"), "Expected only files of an ICAE and its tokenizer, got also notes.txt; remove"),
    "undeclared below": (write("adapter/model.safetensors"), "got also adapter/model.safetensors; remove"),
    "other code": (
        append("modeling_icae.py", "\n# changed\n"),
        "Expected 'modeling_icae.py' to be this package's file byte for byte, got another one; assemble",
    ),
    "local base": (
        lambda folder: change_config(folder, base_model_name_or_path="/data/models/llama"),
        r"Expected `base_model_name_or_path` to be the Hub id of the base, .* got '/data/models/llama', .* Set it in",
    ),
    "no base": (lambda folder: change_config(folder, base_model_name_or_path=None), "Hub id of the base, .* got None"),
    "two bases": (
        lambda folder: change_adapter(folder, base_model_name_or_path="org/other"),
        "Expected one base in both configurations, got 'org/tiny-base' in 'config.json' and 'org/other'",
    ),
    "path": (
        lambda folder: change_adapter(folder, trained_in="/data/runs/7"),
        "Expected no paths of this machine, got '/data/runs/7' in 'adapter/adapter_config.json'; give",
    ),
    "home": (lambda folder: change_config(folder, data="~/corpus"), "got '~/corpus' in 'config.json'"),
    "path within": (
        lambda folder: change_config(folder, sources=[{"name": "C:\\data\\x"}]),
        r"got 'C:\\\\data\\\\x' in 'config.json'",
    ),
    "path in a command": (
        lambda folder: change_config(folder, command="train --data=/nfs/me/books --out 'runs/7'"),
        "got '/nfs/me/books' in 'config.json'",
    ),
    "home in a command": (lambda folder: change_config(folder, command="cat ~/a/b"), "got '~/a/b' in 'config.json'"),
    "path in the card": (
        append("README.md", "\nTrained on /data/books/a.txt."),
        "got '/data/books/a.txt.' in 'README",
    ),
    "path of a cluster in the card": (append("README.md", "\nFrom `/scratch1/me`."), "got '/scratch1/me' in 'README"),
    "token in the card": (
        append("README.md", f"\nexport HF_TOKEN={TOKEN}\n"),
        "Expected no secrets, got what looks like a Hugging Face token in 'README.md' .hf_a1B2c….; remove it there",
    ),
    "key in a configuration": (
        lambda folder: change_config(folder, key="AKIA" + "A1B2" * 4),
        "got what looks like an AWS key in 'config.json'",
    ),
    "token in a card that is no UTF-8": (
        write("README.md", b"caf\xe9 " + TOKEN.encode()),
        "a Hugging Face token in 'README.md'",
    ),
    "private key": (
        append("chat_template.jinja", "-----BEGIN RSA PRIVATE KEY-----"),
        "got what looks like a private key in 'chat_template.jinja'",
    ),
    "whole base": (
        fill("icae_slots.safetensors", 300_000),
        r"Expected 'icae_slots.safetensors' to take at most [\d,]+ bytes, as the configuration says, got 1,2",
    ),
    "large adapter": (
        fill("adapter/adapter_model.safetensors", 300_000),
        "'adapter/adapter_model.safetensors' to take",
    ),
    "large card": (append("README.md", "x" * 1_000_001), "'README.md' to take at most 1,000,000 bytes"),
    "large tokenizer": (write("vocab.json", b" " * 1_200_000), "'vocab.json' to take at most 1,101,000 bytes"),
    "no text_config": (lambda folder: change_config(folder, text_config=None), "describes the base in `text_config`"),
}


@pytest.mark.parametrize(("change", "message"), REFUSALS.values(), ids=REFUSALS)
def test_what_must_not_leave_is_refused(folder, change, message):
    change(folder)
    with pytest.raises(ValueError, match=message):
        check(folder)


def test_nothing_is_taken_for_a_path_or_a_secret_that_is_none(folder):
    pattern = r"[^\r\n\p{L}]?[\p{Lu}]+| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|/x/"
    change_config(folder, note="keys/values, 4/1", template="</s> /no_think", url="https://example.org/data/x")
    change_config(folder, ratio="1/2", about="~5/10 of a / b, see ./a/b", pattern=pattern)
    append(
        "README.md", "\nSee https://huggingface.co/org/data/tree/main and `results/answers.json`; sk-learn, hf_hub."
    )(folder)
    check(folder)


def test_tokenizers_of_all_kinds_may_leave(folder):
    for name in ("spm.model", "source.spm", "target.spm", "tekken.json", "qwen.tiktoken"):
        (folder / name).write_text("{}")
    check(folder)


def test_weights_beside_a_base_in_float64_may_take_twice_the_bytes(model, folder, monkeypatch):
    monkeypatch.setattr("icae.hub_upload.checks.HEADER_BYTES", 600)
    weights, config = {"icae_slots.safetensors": folder / "icae_slots.safetensors"}, model.config
    slots = {
        name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in load_file(*weights.values()).items()
    }
    save_file(slots, folder / "icae_slots.safetensors")
    with pytest.raises(ValueError, match=r"Expected 'icae_slots\.safetensors' to take at most"):
        _check_sizes(weights, config)
    config.text_config.dtype = torch.float64
    _check_sizes(weights, config)


@pytest.fixture
def resumable(checkpoint):
    """A trainer's checkpoint with what it resumes from, and with more."""
    torch.save({"state": {0: {"step": torch.ones(1)}}}, checkpoint / "optimizer.pt")
    torch.save({"python": (3, (1, 2), None), "numpy": numpy.random.get_state()}, checkpoint / "rng_state_0.pth")
    state = {"best_model_checkpoint": str(checkpoint.parent / "checkpoint-2"), "log": "x" * 1_000_001}
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    for name in ("pytorch_model_fsdp.bin", "pytorch_model_fsdp_0/.metadata", "optimizer_0/__0_0.distcp"):
        (checkpoint / name).parent.mkdir(exist_ok=True)
        (checkpoint / name).write_text("all of the base")
    (checkpoint / "scheduler.pt").symlink_to(checkpoint / "notes.txt")
    return checkpoint


def test_a_state_to_resume_from_leaves_the_arguments_the_base_and_this_machine_s_folders_behind(resumable, tmp_path):
    training_state(resumable, tmp_path / "state")
    check_training_state(tmp_path / "state")
    expected = LAYOUT - {"README.md", "icae_card.json", *CODE}
    assert files(tmp_path / "state") == expected | {"optimizer.pt", "rng_state_0.pth", "trainer_state.json"}
    for name in expected | {"optimizer.pt"}:
        assert (tmp_path / "state" / name).read_bytes() == (resumable / name).read_bytes()
    assert (
        json.loads((tmp_path / "state" / "trainer_state.json").read_text())["best_model_checkpoint"] == "checkpoint-2"
    )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("optimizer.pt", functools.partial(print, "run"), "Expected only tensors and random states in 'optimizer.pt'"),
        ("optimizer.pt", b"", "Expected only tensors and random states in 'optimizer.pt', got a damaged file"),
        (
            "optimizer.pt",
            b"PK\x03\x04",
            "Expected only tensors and random states in 'optimizer.pt', got a damaged file",
        ),
        ("optimizer.bin", {"base": torch.zeros(3_000_000)}, "Expected 'optimizer.bin' to take at most .*bytes"),
        ("rng_state.pth", {"base": torch.zeros(300_000)}, "Expected 'rng_state.pth' to take at most 1,000,000 bytes"),
        (
            "trainer_state.json",
            b'{"best_model_checkpoint": null, "x": "/mnt/me"}',
            "Expected no paths of this machine",
        ),
        ("chat_template.jinja", b"hf_" + 32 * b"x", "Expected no secrets"),
    ],
)
def test_a_state_to_resume_from_that_must_not_leave_is_refused(resumable, tmp_path, name, content, message):
    if isinstance(content, bytes):
        (resumable / name).write_bytes(content)
    else:
        torch.save(content, resumable / name)
    training_state(resumable, tmp_path / "state")
    with pytest.raises(ValueError, match=message):
        check_training_state(tmp_path / "state")


def test_a_folder_of_the_same_name_is_not_the_hub_s_base(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_base_id(model.config)
    Path(BASE).mkdir(parents=True)
    with pytest.raises(ValueError, match=f"got '{BASE}', which others cannot load"):
        check_base_id(model.config)


# ----------------------------------------------------------------------------------------------------------- verify


def test_another_model_s_folder_is_refused(model, folder):
    with torch.no_grad():
        model.memory_embeddings.add_(1)
    with pytest.raises(ValueError, match=r"Expected the folder to be the live model \(fingerprint \w+\), got another"):
        verify(folder, model)


def test_a_folder_that_does_not_load_elsewhere_is_refused(model, folder):
    (folder / "memory_icae.py").write_text("from icae.modeling_icae.memory_icae import *\n")
    with pytest.raises(ValueError, match=r"Expected the folder to load in a fresh process .* but: .*No module named"):
        verify(folder, model)


def test_code_that_computes_something_else_is_refused(model, folder):
    code = (folder / "modeling_icae.py").read_text()
    changed = code.replace("self.get_input_embeddings()(ids)", "self.get_input_embeddings()(ids) + 0.1")
    assert changed != code
    (folder / "modeling_icae.py").write_text(changed)
    with pytest.raises(ValueError, match="Expected the same slots from the folder as from the live model, got others"):
        verify(folder, model)


def test_another_token_of_a_task_is_refused(model, folder):
    with torch.no_grad():
        model.task_embeddings[1] += 5  # [LM]; the slots do not depend on it
    with pytest.raises(
        ValueError, match="Expected the same continuation losses from the folder as from the live model"
    ):
        verify(folder, model)


def test_code_that_answers_otherwise_is_refused(model, folder):
    code = (folder / "modeling_icae.py").read_text()
    changed = code.replace(
        "with self.adapter(False):\n            output =", "with self.adapter(True):\n            output ="
    )
    assert changed != code
    (folder / "modeling_icae.py").write_text(changed)
    with pytest.raises(
        ValueError, match="Expected the same scores from the folder as from the live model, got others"
    ):
        verify(folder, model)


def test_a_folder_that_is_the_live_model_is_verified_and_leaves_it_as_it_was(model, folder):
    """Also in training with `bf16=True`, when accelerate has put autocast around `forward`."""
    model.train()
    patched = model.forward = torch.autocast("cpu", dtype=torch.bfloat16)(model.forward)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        verify(folder, model)
    assert model.training and any(parameter.requires_grad for parameter in model.parameters())
    assert model.__dict__["forward"] is patched


def test_packages_are_found_where_this_process_finds_them(model, folder, tmp_path, monkeypatch):
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "only_here.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path / "path")
    append("memory_icae.py", "\nimport only_here\n")(folder)
    verify(folder, model)


def test_a_process_that_does_not_end_is_refused_and_leaves_the_model_as_it_was(model, folder, monkeypatch):
    commands = []

    def run(command, timeout, **options):
        commands.append(command)
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", run)
    model.train()._hub_kwargs = {"cache_dir": "cache", "token": "hf_tester"}
    with pytest.raises(ValueError, match="Expected the folder to load in a fresh process within 1800 seconds, got no"):
        verify(folder, model)
    assert json.loads(commands[0][4])["cache_dir"] == str(Path("cache").absolute()), "where the base may lie"
    assert "hf_tester" not in "".join(commands[0])
    monkeypatch.setattr("icae.hub_upload.alone.PROMPT", None)
    with pytest.raises(ValueError, match="Expected a prompt as str"):
        verify(folder, model)
    assert model.training


# ------------------------------------------------------------------------------------------------------ icae push


def test_a_dry_run_shows_the_files_and_the_card(checkpoint, base_folder, tmp_path, capsys):
    command = ["push", str(checkpoint), "org/icae-tiny", "--base", base_folder, "--dry-run"]
    assert main(command) == 0, capsys.readouterr().err
    tree, card = capsys.readouterr().out.split("\n\n", 1)
    assemble(checkpoint, tmp_path / "folder", repo_id="org/icae-tiny")
    listed = [line.split() for line in tree.splitlines()]
    assert {name: (digest, size) for digest, size, name in listed} == {
        name: (sha256(content), f"{len(content):,}") for name, content in contents(tmp_path / "folder").items()
    }
    assert card == (tmp_path / "folder" / "README.md").read_text() and '"org/icae-tiny"' in card


def test_push_names_a_folder_that_is_no_checkpoint(tmp_path, capsys):
    assert main(["push", str(tmp_path), "org/x"]) == 2
    assert "Expected CHECKPOINT to be the folder of a saved ICAE" in capsys.readouterr().err


def test_a_model_on_a_local_base_is_not_pushed(make_icae, base_folder):
    model = make_icae(base=AutoModelForCausalLM.from_pretrained(base_folder))
    with pytest.raises(ValueError, match=r"Expected the Hub id of the base in `model.config.base_model_name_or_path`"):
        model.push_to_hub("org/icae-tiny")


def test_a_loaded_checkpoint_is_assembled_from_its_own_files(checkpoint, base_folder, tmp_path):
    """A folder that was assembled is itself a checkpoint, and assembling it again changes nothing."""
    assemble(checkpoint, tmp_path / "first")
    assemble(tmp_path / "first", tmp_path / "second")
    assert files(tmp_path / "second") == LAYOUT
    for name in LAYOUT - {"icae_card.json"}:
        assert (tmp_path / "second" / name).read_bytes() == (tmp_path / "first" / name).read_bytes(), name
    shutil.rmtree(checkpoint)
    loaded = ICAEForConditionalGeneration.from_pretrained(tmp_path / "second", base_model=base_folder)
    assert loaded.config.base_model_name_or_path == BASE


def test_what_is_verified_fits_into_few_positions_and_is_one_greedy_answer(make_icae):
    model = make_icae(base=make_base(max_position_embeddings=80), span_length=60)
    model.generation_config.update(do_sample=True, num_return_sequences=2, num_beams=2)
    assert len(alone.outputs(model.eval())["scores"]) == 2  # rows
    assert model.reconstruct([5, 6, 7])
