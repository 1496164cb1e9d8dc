"""
From end to end: a model is trained and pushed here, and loaded by its id in processes that do not know this package.
"""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from datasets import Dataset

import hub_stranger
from hub_server import BASE, LAYOUT, TOKEN, HubServer, contents
from icae import EMBEDDED_CHECKPOINT, ICAEConfig, ICAEForConditionalGeneration, embedded_base
from icae.hub_upload import assemble, upload
from icae.trainers import ICAEPretrainingConfig, ICAEPretrainingTrainer
from tiny import SHORT_RUN, make_base, make_tokenizer


REPO = "org/icae-tiny"
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
TRUST = {"trust_remote_code": True}
DOCUMENTS = Dataset.from_dict({"text": ["The lighthouse keeper had not spoken to anyone since October."] * 12})


@pytest.fixture(scope="module")
def hub():
    with HubServer() as server, pytest.MonkeyPatch.context() as patch:
        server.log_in(patch)
        yield server


def ask_a_stranger(hub, home, steps, **environment):
    """Runs the steps in an isolated process with a home of its own; see `hub_stranger`."""
    (home / "steps.json").write_text(json.dumps(steps))
    command = [sys.executable, "-I", hub_stranger.__file__, str(home / "steps.json"), str(home / "outcomes.json")]
    own = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home / "hf"), "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}
    kept = {name: os.environ[name] for name in ("PATH", "SYSTEMROOT") if name in os.environ}
    done = subprocess.run(
        command, cwd=home, env=kept | own | environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads((home / "outcomes.json").read_text())


@pytest.fixture(scope="module")
def pushed(hub, tmp_path_factory):
    """
    Two versions of an ICAE on the Hub, the first from a trainer after three steps, and what the live model said then.
    The base is the revision `v1` of another repository, whose main branch has other weights by now.
    """
    folder, tokenizer = tmp_path_factory.mktemp("pushed"), make_tokenizer()
    for name, base in (("base", make_base()), ("other", make_base(rms_norm_eps=1e-3))):
        torch.manual_seed(1)
        if name == "other":
            base.model.norm.weight.data.add_(torch.randn(32))
        base.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    hub.put(BASE, contents(folder / "base"), ref="v1")
    hub.put(BASE, contents(folder / "other"))

    config = ICAEConfig(span_length=16, lora_r=4, lora_alpha=8, base_model_name_or_path=BASE)
    model = ICAEForConditionalGeneration.from_base(str(folder / "base"), config, tokenizer=tokenizer, revision="v1")
    options = SHORT_RUN | {"output_dir": str(folder / "run"), "max_steps": 3, "hub_model_id": REPO}
    trainer = ICAEPretrainingTrainer(model, ICAEPretrainingConfig(**options), DOCUMENTS)
    trainer.train()
    commits = [trainer.push_to_hub().oid]
    live = [hub_stranger.outputs(model.eval())]
    with torch.no_grad():
        for parameter in model.trainable_parameters().values():
            parameter.mul_(3)  # far enough for other answers
    model.save_pretrained(folder / "second")
    assemble(folder / "second", folder / "assembled", repo_id=REPO)
    commits.append(upload(folder / "assembled", REPO).oid)
    live.append(hub_stranger.outputs(model))
    with model.adapter(True):
        encoded = hub_stranger.encoded(model.language_model)
    pipe = hub_stranger.pipeline("icae-context-generation", model=model)
    return {"commits": commits, "live": live, "encoded": encoded, "answers": hub_stranger.answers(pipe)}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def online(hub, pushed, home):
    """What came out for somebody with a network and empty caches."""
    files = hub.repositories[REPO].files()
    hub.put(REPO, {"modeling_icae.py": b'raise RuntimeError("newer code")\n'}, ref="newer")
    hub.put("org/hidden", files)
    hub.put("org/trap", files | {name: files[f"adapter/{name}"] for name in ADAPTER})
    secret_base = json.loads(files["config.json"]) | {"base_model_name_or_path": "org/secret-base"}
    hub.put("org/secret", files | {"config.json": json.dumps(secret_base).encode()})
    hub.put("org/secret-base", hub.repositories[BASE].files("v1"), ref="v1")
    hub.repositories["org/secret"].private = hub.repositories["org/secret-base"].private = True
    first = pushed["commits"][0]
    secret = {"token": TOKEN} | TRUST
    steps = {
        "config": ["AutoConfig", REPO, TRUST],
        "model": ["AutoModel", REPO, TRUST],
        "causal model": ["AutoModelForCausalLM", REPO, TRUST],
        "tokenizer": ["AutoTokenizer", REPO, TRUST],
        "pipeline": ["pipeline", REPO, TRUST],
        "class": ["class", REPO, TRUST],
        "quickstart": ["quickstart", REPO, {}],
        **{f"{action} without trust": [action, REPO, {}] for action in ("AutoConfig", "AutoModel", "pipeline")},
        "first": ["AutoModel", REPO, {"revision": first} | TRUST],
        "first, pipeline": ["pipeline", REPO, {"revision": first} | TRUST],
        "newer": ["AutoModel", REPO, {"revision": "newer"} | TRUST],
        "newer, first code": ["AutoModel", REPO, {"revision": "newer", "code_revision": first} | TRUST],
        "secret": ["AutoModel", "org/secret", secret],
        "secret, tokenizer": ["AutoTokenizer", "org/secret", secret],
        "secret, pipeline": ["pipeline", "org/secret", secret],
        "secret without token": ["AutoModel", "org/secret", TRUST],
        "trap": ["class", "org/trap", TRUST],
        "peft": ["peft", REPO, {"base": BASE, "base_revision": "v1"}],
        "save and load": ["save and load", REPO, TRUST],
        "push": ["push", REPO, {"to": "org/again", "token": TOKEN} | TRUST],
    }
    return ask_a_stranger(hub, home, steps)


def test_all_auto_classes_load_the_pushed_model_by_its_id(online, pushed):
    assert online["config"] == "transformers_modules.ICAEConfig"
    assert online["class"] == "transformers_modules.ICAEForConditionalGeneration"
    assert online["model"] == online["causal model"] == pushed["live"][1]


def test_the_trained_model_is_the_one_that_was_pushed(online, pushed):
    assert online["first"] == pushed["live"][0] != pushed["live"][1]


def test_the_card_s_quickstart_loads_the_pushed_model(online, pushed):
    assert online["quickstart"] == pushed["live"][1]


def test_the_pipeline_answers_as_the_live_model_does(online, pushed):
    assert online["pipeline"] == pushed["answers"] != online["first, pipeline"]
    assert isinstance(online["first, pipeline"], list)


def test_the_tokenizer_comes_with_the_model(online, tokenizer):
    assert online["tokenizer"] == tokenizer(hub_stranger.PROMPT)["input_ids"]


@pytest.mark.parametrize("action", ["AutoConfig", "AutoModel", "pipeline"])
def test_without_the_flag_nothing_of_the_repository_runs(online, action):
    refusal = online[f"{action} without trust"]
    assert refusal.startswith("ValueError") and "`trust_remote_code=True`" in refusal


def test_revisions_of_weights_and_code_can_be_pinned(online, pushed):
    assert "newer code" in online["newer"]
    assert online["newer, first code"] == pushed["live"][1]


def test_a_private_model_on_a_private_base_loads_with_a_token_only(online, pushed):
    assert online["secret"]["slots"] == pushed["live"][1]["slots"]
    assert online["secret, tokenizer"] == online["tokenizer"]
    assert online["secret, pipeline"] == pushed["answers"]
    assert online["secret without token"].startswith("OSError") and "org/secret" in online["secret without token"]


def test_an_adapter_at_the_root_would_hide_the_icae(online):
    """Transformers loads the bare base then, without a word; so `check` refuses it and `upload` deletes it."""
    assert online["trap"] == "transformers.LlamaForCausalLM"


def test_plain_peft_has_the_same_encoder(online, pushed):
    assert online["peft"] == pushed["encoded"]


def test_a_loaded_model_can_be_saved_and_pushed_again_where_the_package_is_missing(online, pushed, hub):
    assert online["save and load"] == online["push"] == pushed["live"][1]
    assert set(hub.repositories["org/again"].files()) - {".gitattributes"} == LAYOUT - {"icae_card.json"}
    assert hub.repositories["org/again"].messages == ["initial commit", "Upload ICAE"]


def test_offline_all_comes_from_the_cache(hub, online, pushed, home):
    requests = len(hub.requests)
    steps = {
        "config": ["AutoConfig", REPO, TRUST],
        "model": ["AutoModel", REPO, TRUST],
        "causal model": ["AutoModelForCausalLM", REPO, TRUST],
        "tokenizer": ["AutoTokenizer", REPO, TRUST],
        "pipeline": ["pipeline", REPO, TRUST],
        "first": ["AutoModel", REPO, {"revision": pushed["commits"][0]} | TRUST],
        "hidden": ["AutoModel", "org/hidden", TRUST],
    }
    offline = ask_a_stranger(hub, home, steps, HF_HUB_OFFLINE="1")
    assert offline.pop("hidden").startswith("OSError"), "what was never loaded is not there"
    assert offline == {name: online[name] for name in offline} and len(offline) == 6
    assert len(hub.requests) == requests


@pytest.mark.slow
@pytest.mark.skipif(EMBEDDED_CHECKPOINT is None, reason="an installed wheel carries no checkpoint")
def test_the_embedded_checkpoint_loads_by_its_id_with_its_base_from_the_base_s_repository(hub, tmp_path):
    """The base's repository holds the embedded base here, which the checkpoint was trained on: its 4-bit weights."""
    base, repo = embedded_base(), "org/icae-smollm2-135m"
    options = {"dtype": torch.bfloat16}
    model = ICAEForConditionalGeneration.from_pretrained(EMBEDDED_CHECKPOINT, base_model=base, **options)
    model.save_pretrained(tmp_path / "saved")
    assemble(tmp_path / "saved", tmp_path / "assembled", tokenizer=model.tokenizer, repo_id=repo)
    upload(tmp_path / "assembled", repo)  # not `push_to_hub`, whose verification runs the model once more
    live = hub_stranger.outputs(model)
    # The card does not ask the base's repository, whose weights are others in truth.
    assert ask_a_stranger(hub, tmp_path, {"card": ["quickstart", repo, {}]}) == {"card": live}
    hub.put(model.config.base_model_name_or_path, contents(base))
    pipe = hub_stranger.pipeline("icae-context-generation", model=model)
    options = {"dtype": "bfloat16"} | TRUST
    steps = {"model": ["AutoModel", repo, options], "pipeline": ["pipeline", repo, options]}
    found = ask_a_stranger(hub, tmp_path, steps)
    assert found == {"model": live, "pipeline": hub_stranger.answers(pipe)}
    shutil.rmtree(tmp_path / "hf")
