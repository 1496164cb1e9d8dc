"""All ways onto the Hub end in the same repository, against a Hub on this machine."""

import functools
import json
import shutil
from importlib import import_module
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalEntryNotFoundError
from transformers import AutoModelForCausalLM

from hub_server import BASE, LAYOUT, HubServer, Repository, contents
from icae import ICAEForConditionalGeneration
from icae.cli import main
from icae.hub_upload import assemble, training_state, upload
from icae.hub_upload.layout import WEIGHTS
from icae.model_cards import CardFacts
from icae.trainers import ICAEPretrainingConfig, ICAEPretrainingTrainer
from tiny import SHORT_RUN, make_base


UPLOAD = import_module("icae.hub_upload.upload")  # the module, not the function
REPO = "org/icae-tiny"
TRAINER = "icae.trainers.icae_trainer"
DOCUMENTS = Dataset.from_dict({"text": ["The lighthouse keeper had not spoken to anyone since October."] * 12})


@pytest.fixture
def hub(monkeypatch):
    """A Hub that this process is logged in to."""
    with HubServer() as server:
        server.log_in(monkeypatch)
        yield server


@pytest.fixture
def verified(monkeypatch, hub):
    """Takes the place of the verification, which has its own tests; keeps how many requests had been made before."""
    requests_before: list[int] = []

    def verify(folder, model, base=None):
        assert set(contents(folder)) == LAYOUT
        requests_before.append(len(hub.requests))

    monkeypatch.setattr(UPLOAD, "verify", verify)
    monkeypatch.setattr(f"{TRAINER}.verify", verify)
    return requests_before


@pytest.fixture
def warnings(monkeypatch):
    """What the trainer warns of."""
    texts: list[str] = []
    monkeypatch.setattr(f"{TRAINER}.logger.warning", texts.append)
    return texts


@pytest.fixture
def base_folder(tmp_path, tokenizer):
    make_base().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


@pytest.fixture
def make_model(make_icae, base_folder):
    """Makes a model whose base lies in a folder and is known by its name on the Hub."""
    return lambda: make_icae(base=AutoModelForCausalLM.from_pretrained(base_folder), base_model_name_or_path=BASE)


@pytest.fixture
def make_trainer(make_model, tmp_path):
    def make(folder="run", **options):
        options = {"output_dir": str(tmp_path / folder), "per_device_train_batch_size": 4, "max_steps": 3} | options
        args = ICAEPretrainingConfig(**(SHORT_RUN | options))
        return ICAEPretrainingTrainer(make_model(), args, DOCUMENTS, eval_dataset=DOCUMENTS)

    return make


@pytest.fixture
def checkpoint(make_model, tmp_path):
    make_model().save_pretrained(tmp_path / "checkpoint", with_code=False)
    return tmp_path / "checkpoint"


@pytest.fixture
def folder(checkpoint, tmp_path):
    assemble(checkpoint, tmp_path / "folder", repo_id=REPO)
    return tmp_path / "folder"


def published(files: dict[str, bytes]) -> dict[str, bytes]:
    """Without what the Hub itself puts into a new repository."""
    return {name: content for name, content in files.items() if name != ".gitattributes"}


# ------------------------------------------------------------------------------------------------------ the three ways


def test_the_command_uploads_the_whole_layout_in_one_commit(hub, verified, checkpoint, base_folder, folder, capsys):
    assert main(["push", str(checkpoint), REPO, "--base", base_folder]) == 0
    repository = hub.repositories[REPO]
    assert repository.messages == ["initial commit", "Upload ICAE"] and not repository.private
    assert published(repository.files()) == contents(folder)
    assert verified == [0], "nothing is sent before the verification"
    assert capsys.readouterr().out.strip() == f"{hub.url}/{REPO}/commit/{repository.refs['main']}"


def test_a_model_uploads_the_same_files_in_one_commit(hub, verified, make_model, folder):
    make_model().push_to_hub(REPO)
    repository = hub.repositories[REPO]
    assert repository.messages == ["initial commit", "Upload ICAE"] and verified == [0]
    found, expected = published(repository.files()), contents(folder)
    assert set(found) == LAYOUT
    for name in LAYOUT - {"icae_card.json", "README.md"}:  # a folder has a name for the card
        assert found[name] == expected[name], name


def test_a_trainer_uploads_the_same_layout_in_one_commit(hub, verified, make_trainer, tmp_path):
    trainer = make_trainer(push_to_hub=True, hub_model_id=REPO, hub_strategy="end", save_steps=2)
    trainer.train()
    assert hub.repositories[REPO].messages == ["initial commit"], "the strategy `end` waits for the end"
    commit = trainer.push_to_hub()
    repository = hub.repositories[REPO]
    assert repository.messages == ["initial commit", "End of training"] and len(verified) == 1
    assert commit.oid == repository.refs["main"]
    found = published(repository.files())
    assert set(found) == LAYOUT
    assert b"ICAE pretraining" in found["README.md"] and REPO.encode() in found["README.md"]
    trainer.model.save_pretrained(tmp_path / "live")
    for name in WEIGHTS:
        assert found[name] == (tmp_path / "live" / name).read_bytes()


def test_a_trainer_takes_what_scripts_say_for_the_card(hub, verified, make_trainer):
    trainer = make_trainer(max_steps=1, hub_model_id=REPO)
    trainer.train()
    options = {"license": "mit", "language": "en", "tags": "tiny", "model_name": "Tiny"}
    trainer.push_to_hub(None, dataset_name="org/letters", **options)
    repository = hub.repositories[REPO]
    card = repository.files()["README.md"].decode()
    metadata = yaml.safe_load(card.split("---\n")[1])
    assert repository.messages[-1] == "End of training" and "# Tiny\n" in card
    assert (metadata["license"], metadata["language"], metadata["datasets"]) == ("mit", ["en"], ["org/letters"])
    assert metadata["tags"] == ["icae", "context-compression", "custom_code", "tiny"]
    requests = len(hub.requests)
    with pytest.raises(TypeError, match="dataset_tags"):
        trainer.push_to_hub(dataset_tags="letters")
    with pytest.raises(ValueError, match="Expected languages as codes"):
        trainer.push_to_hub(language="English")
    assert len(hub.requests) == requests


def test_a_model_takes_tags_for_the_card(hub, verified, make_model):
    make_model().push_to_hub(REPO, tags=["tiny"], commit_message=None)
    repository = hub.repositories[REPO]
    assert repository.messages[-1] == "Upload ICAE"
    assert yaml.safe_load(repository.files()["README.md"].decode().split("---\n")[1])["tags"][-1] == "tiny"


def test_an_option_that_no_upload_has_is_refused_first(hub, verified, make_model):
    with pytest.raises(TypeError, match="unexpected keyword argument 'max_shard_size'"):
        make_model().push_to_hub(REPO, max_shard_size="5GB")
    assert verified == [] and hub.requests == []


def test_saving_a_trainer_s_model_pushes_it(hub, verified, make_trainer):
    trainer = make_trainer(push_to_hub=True, hub_model_id=REPO, hub_strategy="end", hub_private_repo=True)
    trainer.save_model()
    repository = hub.repositories[REPO]
    assert repository.messages == ["initial commit", "Model save"] and repository.private
    assert set(published(repository.files())) == LAYOUT


def test_a_trainer_without_the_option_pushes_when_it_is_told_to(hub, verified, make_trainer):
    job = make_trainer("icae-run").push_to_hub("First", blocking=False, private=True, revision="try")
    assert job.result().commit_message == "First"
    repository = hub.repositories["tester/icae-run"]
    assert repository.private and set(published(repository.files("try"))) == LAYOUT
    assert b'model_info(repo, revision="try").sha' in repository.files("try")["README.md"]
    assert published(repository.files()) == {}


@pytest.mark.parametrize("strategy", ["every_save", "checkpoint", "all_checkpoints"])
def test_every_push_of_a_checkpoint_is_the_whole_layout(hub, verified, make_trainer, tmp_path, strategy):
    options = {"push_to_hub": True, "hub_model_id": REPO, "hub_strategy": strategy, "hub_always_push": True}
    trainer = make_trainer(save_steps=1, hub_token="hf_tester", **options)
    trainer.train()
    repository = hub.repositories[REPO]
    assert repository.messages[1:] == [f"Training in progress, step {step}" for step in (1, 2, 3)]
    for step, files in zip((1, 2, 3), list(repository.commits.values())[1:], strict=True):
        saved = contents(tmp_path / "run" / f"checkpoint-{step}")
        assert all(files[name] == saved[name] for name in WEIGHTS)
        states = {
            "every_save": [],
            "checkpoint": [("last-checkpoint", step)],
            "all_checkpoints": [(f"checkpoint-{number}", number) for number in range(1, step + 1)],
        }
        expected = set(LAYOUT)
        for name, number in states[strategy]:
            kept = contents(tmp_path / "run" / f"checkpoint-{number}")
            del kept["training_args.bin"]  # holds the token
            expected |= {f"{name}/{file}" for file in kept}
            del kept["icae_card.json"]  # written again after the push, with the time that it took
            assert {f"{name}/{file}": content for file, content in kept.items()}.items() <= files.items()
        assert set(published(files)) == expected
        assert b"hf_tester" not in b"".join(files.values())
    assert len(verified) == 3


@pytest.mark.parametrize(("refused_by", "error"), [("verify", ValueError), ("check", OSError), ("assemble", KeyError)])
def test_training_goes_on_when_a_checkpoint_is_refused_and_nothing_of_it_is_sent(
    hub, verified, make_trainer, monkeypatch, warnings, refused_by, error
):
    def refuse(*args, **kwargs):
        raise error("not this one")

    monkeypatch.setattr(f"{TRAINER}.{refused_by}", refuse)
    trainer = make_trainer(push_to_hub=True, hub_model_id=REPO, hub_strategy="checkpoint", save_steps=2)
    trainer.train()
    assert trainer.state.global_step == 3 and len(warnings) == 2
    assert all("the checkpoint is only in `output_dir`: " in text and "not this one" in text for text in warnings)
    assert hub.repositories[REPO].messages == ["initial commit"]


def test_a_model_goes_without_a_state_to_resume_from_that_is_refused(
    hub, verified, make_trainer, monkeypatch, warnings
):
    def refuse(folder):
        raise ValueError("not this one")

    monkeypatch.setattr(f"{TRAINER}.check_training_state", refuse)
    make_trainer(push_to_hub=True, hub_model_id=REPO, hub_strategy="checkpoint").train()
    assert warnings == ["A push to the Hub failed, the state to resume from is only in `output_dir`: not this one"]
    assert set(published(hub.repositories[REPO].files())) == LAYOUT


def test_only_the_first_process_pushes_and_the_others_train_on(hub, verified, make_trainer, monkeypatch):
    monkeypatch.setattr(ICAEPretrainingTrainer, "is_world_process_zero", lambda trainer: False)
    trainer = make_trainer(push_to_hub=True, hub_model_id=REPO, save_steps=1)
    trainer.train()
    assert trainer.push_to_hub() is None
    assert trainer.state.global_step == 3 and hub.repositories == {} and verified == []


def test_checkpoints_that_are_deleted_meanwhile_are_sent_whole(hub, verified, make_trainer, tmp_path, warnings):
    options = {"push_to_hub": True, "hub_model_id": REPO, "hub_strategy": "checkpoint", "hub_always_push": True}
    trainer = make_trainer(save_steps=1, save_total_limit=1, **options)
    hub.delay = 0.1
    trainer.train()
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-3"] and warnings == []
    versions = list(hub.repositories[REPO].commits.values())[1:]
    for step, files in zip((1, 2, 3), versions, strict=True):
        assert set(published(files)) == set(published(versions[-1])) > LAYOUT
        assert json.loads(files["last-checkpoint/trainer_state.json"])["global_step"] == step
        assert files["last-checkpoint/icae_slots.safetensors"] == files["icae_slots.safetensors"]


def test_a_push_before_training_says_what_is_known(hub, verified, checkpoint, base_folder, tmp_path):
    CardFacts(license="apache-2.0").save(checkpoint)
    model = ICAEForConditionalGeneration.from_pretrained(checkpoint, base_model=base_folder, is_trainable=True)
    args = ICAEPretrainingConfig(**(SHORT_RUN | {"output_dir": str(tmp_path / "run")}))
    ICAEPretrainingTrainer(model, args, DOCUMENTS).push_to_hub()
    assert b"license: apache-2.0" in hub.repositories["tester/run"].files()["README.md"]


def test_a_run_goes_on_exactly_from_a_pushed_checkpoint(hub, verified, make_trainer, tmp_path):
    options = {"push_to_hub": True, "hub_model_id": REPO, "hub_strategy": "checkpoint", "max_steps": 4}
    unbroken = make_trainer("unbroken", save_steps=2, hub_always_push=True, **options)
    unbroken.train()
    files = list(hub.repositories[REPO].commits.values())[1]
    for name, content in files.items():
        (tmp_path / "downloaded" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "downloaded" / name).write_bytes(content)
    resumed = make_trainer("resumed", max_steps=4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "downloaded" / "last-checkpoint"))
    for name, weight in resumed.model.trainable_parameters().items():
        assert torch.equal(weight, unbroken.model.trainable_parameters()[name]), name


@pytest.mark.parametrize("kept", [True, False])
def test_a_run_goes_on_from_a_pushed_checkpoint_with_the_best_one_if_it_is_there(
    hub, make_trainer, tmp_path, warnings, kept
):
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "load_best_model_at_end": True}
    options |= {"metric_for_best_model": "ae_accuracy", "greater_is_better": True, "eval_reconstructions": 0}
    first = make_trainer(max_steps=2, **options)
    first.train()
    best = Path(first.state.best_model_checkpoint)
    training_state(tmp_path / "run" / "checkpoint-2", tmp_path / "downloaded")
    described = json.loads((tmp_path / "downloaded" / "trainer_state.json").read_text())
    assert described["best_model_checkpoint"] == best.name
    # A best that nothing later can reach.
    described["best_metric"] = 2.0
    (tmp_path / "downloaded" / "trainer_state.json").write_text(json.dumps(described))
    if not kept:
        shutil.rmtree(best)
    resumed = make_trainer(max_steps=3, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "downloaded"))
    if kept:
        assert resumed.state.best_model_checkpoint == str(best) and warnings == []
    else:
        assert resumed.state.best_model_checkpoint == str(tmp_path / "run" / "checkpoint-3")
        assert warnings == [
            f"The best checkpoint so far, {best.name!r}, is not in `output_dir`; the best is looked for again."
        ]


def test_training_goes_on_when_a_push_of_a_checkpoint_fails(hub, verified, make_trainer, warnings):
    options = {"push_to_hub": True, "hub_model_id": REPO, "hub_always_push": True, "save_steps": 1}
    trainer = make_trainer(**options)
    hub.cut_at = len(hub.requests) + 1
    trainer.train()
    assert trainer.state.global_step == 3
    assert len(warnings) == 3 and all("the checkpoint is only in `output_dir`" in text for text in warnings)
    assert hub.repositories[REPO].messages == ["initial commit"]


def test_a_run_on_a_local_base_is_refused_before_it_starts(hub, make_icae, base_folder, tmp_path):
    model = make_icae(base=AutoModelForCausalLM.from_pretrained(base_folder))
    args = ICAEPretrainingConfig(output_dir=str(tmp_path / "run"), **SHORT_RUN, push_to_hub=True, hub_model_id=REPO)
    with pytest.raises(ValueError, match="Expected `base_model_name_or_path` to be the Hub id of the base"):
        ICAEPretrainingTrainer(model, args, DOCUMENTS)
    assert hub.repositories == {}


def test_a_trainer_sends_nothing_to_a_public_repository_that_should_be_private(hub, verified, make_trainer, warnings):
    hub.put(REPO, {"notes.md": b"public"})
    message = f"Expected a private repository, got '{REPO}', which is there and public"
    with pytest.raises(ValueError, match=message):
        make_trainer(push_to_hub=True, hub_model_id=REPO, hub_private_repo=True)
    with pytest.raises(ValueError, match=message):
        make_trainer(hub_model_id=REPO).push_to_hub(private=True)
    hub.repositories[REPO].private = True
    trainer = make_trainer(push_to_hub=True, hub_model_id=REPO, hub_private_repo=True)
    hub.repositories[REPO].private = False  # made public meanwhile
    trainer.train()
    assert len(warnings) == 1 and message in warnings[0]
    with pytest.raises(ValueError, match=message):
        trainer.push_to_hub()
    assert published(hub.repositories[REPO].files()) == {"notes.md": b"public"}


@pytest.mark.parametrize("way", ["command", "model"])
def test_nothing_is_sent_of_what_is_refused(hub, checkpoint, base_folder, make_model, monkeypatch, way):
    def refuse(*args, **kwargs):
        raise ValueError("another model")

    monkeypatch.setattr(UPLOAD, "verify", refuse)
    if way == "command":
        assert main(["push", str(checkpoint), REPO, "--base", base_folder]) == 2
    else:
        with pytest.raises(ValueError, match="another model"):
            make_model().push_to_hub(REPO)
    assert hub.requests == []


def test_what_a_folder_says_of_a_model_is_said_again_as_long_as_it_holds(hub, verified, checkpoint, base_folder):
    CardFacts(license="apache-2.0", language=["en"]).save(checkpoint)
    load = functools.partial(ICAEForConditionalGeneration.from_pretrained, checkpoint, base_model=base_folder)
    load().push_to_hub("org/loaded")
    load(is_trainable=True).push_to_hub("org/perhaps-changed")
    assert b"license: apache-2.0" in hub.repositories["org/loaded"].files()["README.md"]
    assert b"license: apache-2.0" not in hub.repositories["org/perhaps-changed"].files()["README.md"]


def test_what_the_hub_says_of_a_model_is_said_again_as_well(hub, verified, checkpoint, folder, base_folder, tmp_path):
    CardFacts(license="apache-2.0").save(folder)
    upload(folder, REPO, revision="v1")
    model = ICAEForConditionalGeneration.from_pretrained(checkpoint, base_model=base_folder)
    for revision, known in (("main", None), ("v1", "apache-2.0")):  # nothing lies in the main branch
        model.name_or_path, model._hub_kwargs = REPO, {"revision": revision, "cache_dir": str(tmp_path / "cache")}
        assert CardFacts.of(model).license == known
    model.push_to_hub("org/loaded")
    assert b"license: apache-2.0" in hub.repositories["org/loaded"].files()["README.md"]


def test_a_name_without_an_owner_is_the_user_s_and_the_card_gives_it_in_full(hub, verified, make_model):
    make_model().push_to_hub("icae-tiny")
    assert b'"tester/icae-tiny"' in hub.repositories["tester/icae-tiny"].files()["README.md"]


# ------------------------------------------------------------------------------------------------------------ options


def test_a_private_repository_is_made_private(hub, verified, checkpoint, base_folder):
    assert main(["push", str(checkpoint), REPO, "--base", base_folder, "--private"]) == 0
    assert hub.repositories[REPO].private


def test_what_should_be_private_does_not_go_to_a_public_repository(hub, folder):
    hub.put(REPO, {"notes.md": b"public"})
    with pytest.raises(ValueError, match=f"Expected a private repository, got '{REPO}', which is there and public"):
        upload(folder, REPO, private=True, revision="v2")
    assert set(hub.repositories[REPO].refs) == {"main"}
    assert published(hub.repositories[REPO].files()) == {"notes.md": b"public"}


def test_a_pull_request_leaves_the_main_branch_alone(hub, verified, checkpoint, base_folder, folder, capsys):
    hub.put(REPO, {"notes.md": b"mine"})
    assert main(["push", str(checkpoint), REPO, "--base", base_folder, "--create-pr"]) == 0
    repository = hub.repositories[REPO]
    assert published(repository.files()) == {"notes.md": b"mine"}
    assert published(repository.files("refs/pr/1")) == contents(folder) | {"notes.md": b"mine"}
    assert capsys.readouterr().out.strip() == f"{hub.url}/{REPO}/discussions/1"


def test_a_pull_request_for_a_branch_that_is_missing_makes_none(hub, folder):
    with pytest.raises(HfHubHTTPError, match="404"):
        upload(folder, REPO, create_pr=True, revision="v2")
    assert set(hub.repositories[REPO].refs) == {"main"}


def test_a_branch_is_made_and_the_main_branch_left_alone(hub, verified, checkpoint, base_folder, tmp_path):
    assemble(checkpoint, tmp_path / "folder", repo_id=REPO, branch="v2")
    for _ in range(2):  # there the second time
        assert main(["push", str(checkpoint), REPO, "--base", base_folder, "--revision", "v2"]) == 0
    repository = hub.repositories[REPO]
    assert published(repository.files()) == {}
    assert published(repository.files("v2")) == contents(tmp_path / "folder")
    assert b'model_info(repo, revision="v2").sha' in repository.files("v2")["README.md"]


def test_an_upload_that_fails_is_told_in_words(hub, verified, checkpoint, base_folder, capsys):
    for hub.cut_at in (1, 5):  # the first request, the upload of weights
        assert main(["push", str(checkpoint), REPO, "--base", base_folder]) == 2
        assert "Expected the Hub to take the upload, got: " in (printed := capsys.readouterr().err)
        assert "online and logged in" in printed
        hub.requests.clear()


def test_the_command_needs_the_whole_name_of_a_repository(hub, verified, checkpoint, capsys):
    assert main(["push", str(checkpoint), "icae-tiny"]) == 2
    assert "Expected the whole name of a repository, ORG/NAME, got 'icae-tiny'" in capsys.readouterr().err


def test_a_model_s_own_push_refuses_a_bad_name_before_the_verification(hub, verified, make_model):
    with pytest.raises(ValueError, match="a/b/c"):
        make_model().push_to_hub("a/b/c")
    assert not verified and not hub.requests


def test_a_model_whose_folder_is_gone_is_pushed_without_the_facts_of_the_folder(hub, verified, make_model):
    model = make_model()
    model.name_or_path = "runs/icae"
    model.push_to_hub(REPO)
    assert REPO in hub.repositories


def test_a_name_that_the_hub_does_not_take_is_refused_in_a_dry_run_as_well(hub, verified, checkpoint, capsys):
    assert main(["push", str(checkpoint), "org/icae/tiny", "--dry-run"]) == 2
    assert "org/icae/tiny" in capsys.readouterr().err
    assert main(["card", str(checkpoint), "--repo-id", "no name"]) == 2
    assert "no name" in capsys.readouterr().err


def test_who_is_not_logged_in_is_told_so(hub, verified, checkpoint, base_folder, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    assert main(["push", str(checkpoint), REPO, "--base", base_folder]) == 2
    assert "Expected the Hub to take the upload, got: Client error '401" in capsys.readouterr().err
    assert hub.repositories == {}


# ----------------------------------------------------------------------------- what is there already, interruptions


STALE = [
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapter/adapter_model.bin",
    "model.safetensors",
    "model-00001-of-00002.safetensors",
    "model.safetensors.index.json",
    "training_args.bin",
    "optimizer.pt",
    "rng_state_0.pth",
    "trainer_state.json",
    "vocab.json",
    "special_tokens_map.json",
    "spm.model",
]
OWN = [
    "notes.md",
    "images/curve.png",
    "voices.pt",
    "examples/adapter_config.json",
    "train_icae.py",
    "onnx/model.bin",
    "word2vec.model",
    "words.tiktoken",
]


def test_what_other_layouts_left_is_deleted_and_the_user_s_own_files_stay(hub, folder):
    hub.put(
        REPO, dict.fromkeys(STALE, b"old") | dict.fromkeys(OWN, b"mine") | {"config.json": b'{"model_type": "icae"}'}
    )
    upload(folder, REPO)
    repository = hub.repositories[REPO]
    assert published(repository.files()) == contents(folder) | dict.fromkeys(OWN, b"mine")
    assert repository.messages[-2:] == ["by hand", "Upload ICAE"], "in the same commit"


@pytest.mark.parametrize("options", [{}, {"revision": "v2"}, {"create_pr": True}], ids=["main", "branch", "pr"])
def test_another_kind_of_model_is_not_replaced(hub, folder, make_trainer, options):
    llama = {"config.json": b'{"model_type": "llama"}', "model.safetensors": b"weights"}
    hub.put(REPO, llama)
    message = f"Expected '{REPO}' to hold an ICAE or no model, got one of the type 'llama', .* push to another"
    with pytest.raises(ValueError, match=message):
        upload(folder, REPO, **options)
    with pytest.raises(ValueError, match=message):
        make_trainer(push_to_hub=True, hub_model_id=REPO)
    repository = hub.repositories[REPO]
    assert set(repository.refs) == {"main"} and published(repository.files()) == llama


@pytest.mark.parametrize("name", ["adapter_config.json", "model-00001-of-00002.safetensors", "model_index.json"])
def test_a_model_without_a_configuration_is_not_replaced(hub, folder, name):
    other = {name: b"somebody's", "README.md": b"Mine."}
    hub.put(REPO, other)
    with pytest.raises(ValueError, match=f"got another one's '{name}', which an upload would delete; push to another"):
        upload(folder, REPO)
    assert published(hub.repositories[REPO].files()) == other


def test_a_card_that_somebody_wrote_on_the_hub_stays(hub, folder, caplog):
    hub.put(REPO, {"README.md": b"---\nlicense: mit\n---\n"})  # as the Hub's own page for new repositories
    upload(folder, REPO)
    generated = hub.repositories[REPO].files()["README.md"]
    assert generated == (folder / "README.md").read_bytes() and not caplog.records
    hub.put(REPO, {"README.md": generated + b"More about it."})
    upload(folder, REPO)
    assert hub.repositories[REPO].files()["README.md"] == generated + b"More about it."
    assert f"The card of {REPO} stays as somebody wrote it" in caplog.text
    (folder / "README.md").write_text("Another one.", encoding="utf-8")
    upload(folder, REPO)
    assert hub.repositories[REPO].files()["README.md"] == b"Another one."


def test_a_card_that_somebody_changed_goes_along_with_the_model(hub, verified, checkpoint, base_folder):
    (checkpoint / "README.md").write_text("My own words.", encoding="utf-8")
    ICAEForConditionalGeneration.from_pretrained(checkpoint, base_model=base_folder).push_to_hub(REPO)
    assert hub.repositories[REPO].files()["README.md"] == b"My own words."


def test_the_readme_of_the_current_folder_is_no_card(hub, verified, make_model, tmp_path, monkeypatch):
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "README.md").write_text("My project.", encoding="utf-8")
    monkeypatch.chdir(tmp_path / "project")
    model = make_model()
    model.requires_grad_(False)
    model.push_to_hub(REPO)
    assert b"My project." not in hub.repositories[REPO].files()["README.md"]


def test_of_a_checkpoint_to_resume_from_nothing_older_is_left(hub, folder, tmp_path):
    old = ["last-checkpoint/global_step1/optimizer.pt", "last-checkpoint/old.txt", "last-checkpoints/mine.txt"]
    hub.put(REPO, dict.fromkeys(old, b"old"))
    (tmp_path / "state" / "adapter").mkdir(parents=True)
    for name in ("adapter/adapter_config.json", "trainer_state.json"):
        (tmp_path / "state" / name).write_bytes(b"new")
    upload(folder, REPO, subfolders={"last-checkpoint": tmp_path / "state"})
    left = set(published(hub.repositories[REPO].files())) - LAYOUT
    state = {f"last-checkpoint/{name}" for name in ("adapter/adapter_config.json", "trainer_state.json")}
    assert left == state | {"last-checkpoints/mine.txt"}


def test_a_repeated_push_changes_nothing_and_one_of_another_model_only_what_differs(hub, folder):
    first = upload(folder, REPO)
    requests = len(hub.requests)
    assert upload(folder, REPO).oid == first.oid
    assert not any(request.startswith("PUT") or "/commit/" in request for request in hub.requests[requests:])
    assert len(hub.repositories[REPO].commits) == 2
    (folder / "icae_slots.safetensors").write_bytes(b"other slots")
    upload(folder, REPO)
    assert published(hub.repositories[REPO].files()) == contents(folder)
    assert sum(request.startswith("PUT") for request in hub.requests) == 3, "two files of weights, then one"


def test_a_commit_of_somebody_else_in_between_is_not_overwritten(hub, folder, monkeypatch):
    hub.put(REPO, {"notes.md": b"old"})
    preupload = HfApi.preupload_lfs_files

    def meanwhile(*args, **kwargs):
        hub.put(REPO, {"notes.md": b"new"})
        return preupload(*args, **kwargs)

    monkeypatch.setattr(HfApi, "preupload_lfs_files", meanwhile)
    with pytest.raises(HfHubHTTPError, match="A commit has happened since"):
        upload(folder, REPO)
    assert published(hub.repositories[REPO].files()) == {"notes.md": b"new"}


@pytest.mark.parametrize("cut_late", [False, True], ids=["request lost", "answer lost"])
@pytest.mark.parametrize("options", [{}, {"revision": "v2"}, {"create_pr": True}], ids=["main", "branch", "pr"])
def test_an_upload_cut_at_any_request_leaves_the_old_version_or_the_new_one(hub, folder, tmp_path, options, cut_late):
    old = contents(folder) | dict.fromkeys(STALE, b"old") | dict.fromkeys(OWN, b"mine")
    shutil.copytree(folder, tmp_path / "new")
    for name in (*WEIGHTS, "modeling_icae.py"):
        (tmp_path / "new" / name).write_bytes(b"new " + name.encode())
    (tmp_path / "new" / "config.json").write_bytes(b'{"model_type": "icae", "new": true}')
    new = contents(tmp_path / "new") | dict.fromkeys(OWN, b"mine")

    def start_again():
        hub.repositories[REPO] = Repository()
        hub.put(REPO, old)
        hub.blobs.clear()
        hub.requests.clear()
        hub.cut_at = None

    start_again()
    upload(tmp_path / "new", REPO, **options)
    number = len(hub.requests)
    assert number >= 7 and sum(request.startswith("PUT") for request in hub.requests) == 2
    versions = []
    for request in range(1, number + 1):
        start_again()
        hub.cut_at, hub.cut_late = request, cut_late
        with pytest.raises((HTTPError, LocalEntryNotFoundError, RuntimeError)):
            upload(tmp_path / "new", REPO, **options)
        refs = {ref: published(hub.repositories[REPO].files(ref)) for ref in hub.repositories[REPO].refs}
        assert all(files in (old, new) for files in refs.values()), request
        assert refs["main"] == old or not options, "only a push to it may change the main branch"
        versions.append(new in refs.values())
        hub.cut_at = None
        commit = upload(tmp_path / "new", REPO, **options)
        assert published(hub.repositories[REPO].files(commit.oid)) == new
    # Only the commit itself makes the new version, and only when it got through.
    assert versions == [False] * (number - 1) + [cut_late]


def test_a_first_upload_cut_at_any_request_leaves_an_empty_repository_or_a_whole_one(hub, folder):
    upload(folder, REPO)
    number = len(hub.requests)
    for request in range(1, number + 1):
        hub.repositories.clear()
        hub.blobs.clear()
        hub.requests.clear()
        hub.cut_at, hub.cut_late = request, True
        with pytest.raises((HTTPError, RuntimeError)):
            upload(folder, REPO)
        for repository in hub.repositories.values():
            assert published(repository.files()) == ({} if request < number else contents(folder))
        hub.cut_at = None
        upload(folder, REPO)
        assert published(hub.repositories[REPO].files()) == contents(folder)
