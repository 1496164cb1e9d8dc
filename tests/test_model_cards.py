import ast
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from datasets import Dataset
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results

from icae import EMBEDDED_CHECKPOINT, ICAEConfig, ICAEForConditionalGeneration
from icae.cli import main
from icae.embedded import EMBEDDED_BASE_CODE, EMBEDDED_BASE_FINGERPRINT
from icae.model_cards import CARD_FACTS, CardFacts, DataSource, Evaluation, TrainingStage, model_card, write_card
from icae.model_cards.card import render
from icae.model_cards.facts import weights_digest
from icae.trainers import ICAEPretrainingConfig, ICAEPretrainingTrainer, ICAESFTConfig, ICAESFTTrainer
from tiny import SHORT_RUN, make_base


ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden_card.md"
PLACEHOLDERS = re.compile(r"More Information Needed|\bTODO\b|\bNone\b|\bnan\b|\bnull\b|\{\{|\{%|Undefined")
PRETRAINING = TrainingStage(
    name="ICAE pretraining",
    steps=1600,
    rows_per_step=8,
    learning_rate=2e-3,
    schedule="cosine",
    warmup_steps=20,
    optimizer="adamw_torch",
    seed=1,
    context_tokens=812_345,
    settings={"autoencoding_weight": 0.6, "max_spans": 2},
    data=[DataSource("org/books", license="CC0", hub_id="org/books"), DataSource("Letters")],
    hardware="A CPU, 2 cores",
    seconds=5400.0,
    versions={"torch": "2.13.0", "transformers": "5.23.0"},
    evaluation={"ae_loss": 0.25, "ae_loss_other_text": 11.5, "ae_accuracy": 0.925, "bleu": 0.75},
)
TUNING = replace(PRETRAINING, name="ICAE SFT", steps=200, data=[], seconds=None, evaluation={"response_loss": 2.5})
FACTS = CardFacts(
    name="icae-tiny",
    repo_id="org/icae-tiny",
    revision="0123abc",
    license="apache-2.0",
    language=["en"],
    limits=["It is very small."],
    stages=[PRETRAINING, TUNING],
    reconstruction=Evaluation(
        rows={"icae-tiny": {"ae_loss": 0.3, "ae_loss_other_text": 10.0, "bleu": 0.5, "exact_prefix": float("nan")}},
        context_tokens=4000,
        command="icae evaluate reconstruction --data held-out.parquet",
        date="2026-01-02 03:04 UTC",
        commit="89abcdef0123",
        samples=16,
    ),
    answers=Evaluation(
        rows={
            "icae": {"loss": 2.0, "f1": 0.5},
            "full context": {"loss": 1.5, "f1": 0.75},
            "no context": {"loss": 4.0, "f1": 0.125},
            "untrained slots": {"loss": 4.5},
        },
        context_tokens=2000,
        command="icae evaluate answers --data triples.parquet",
        date="2026-01-02 03:04 UTC",
        slots=500,
    ),
)


@pytest.fixture
def config(make_icae):
    config = make_icae().config
    config.base_model_name_or_path = "org/tiny-llama"
    config.base_model_fingerprint = "feed-beef"
    return config


@pytest.fixture
def saved(tokenizer, tmp_path, monkeypatch):
    """A saved model whose paths are those of Hub repositories, seen from the current folder."""
    monkeypatch.chdir(tmp_path)
    make_base().save_pretrained("org/tiny-llama")
    tokenizer.save_pretrained("org/tiny-llama")
    ICAEForConditionalGeneration.from_base("org/tiny-llama").save_pretrained("org/icae-tiny")
    return Path("org/icae-tiny")


def body(card: str) -> str:
    return ModelCard(card).text


def snippet(card: str) -> str:
    return re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]


# -------------------------------------------------------------------------------------------------------- the card


def test_the_card_of_fixed_facts_is_the_golden_one(config, monkeypatch):
    monkeypatch.setattr("icae.model_cards.card.version", lambda package: "1.2.3")
    card = render(FACTS, config)
    assert card == GOLDEN.read_text(encoding="utf-8"), "if the change is meant, write the new card to golden_card.md"


def test_the_metadata_is_what_the_hub_asks_for(config):
    metadata = yaml.safe_load(render(FACTS, config).split("---\n")[1])
    assert metadata["library_name"] == "transformers" and metadata["pipeline_tag"] == "text-generation"
    assert (metadata["base_model"], metadata["base_model_relation"]) == ("org/tiny-llama", "adapter")
    assert metadata["tags"] == ["icae", "context-compression", "custom_code"]
    assert (metadata["license"], metadata["language"], metadata["datasets"]) == ("apache-2.0", ["en"], ["org/books"])
    again = ModelCard(render(FACTS, config)).data  # refuses metadata that it cannot read
    assert again.to_dict() == metadata


def test_the_model_index_holds_the_results_with_their_controls_and_comes_back(config):
    metadata = yaml.safe_load(render(FACTS, config).split("---\n")[1])
    name, results = model_index_to_eval_results(metadata["model-index"])
    found = {(result.dataset_name, result.metric_name): result.metric_value for result in results}
    assert name == "icae-tiny" and found == {
        ("Held-out text", "autoencoding loss"): 0.3,
        ("Held-out text", "autoencoding loss with another text's slots (control)"): 10.0,
        ("Held-out text", "BLEU"): 0.5,
        ("Held-out prompts", "loss of the reference"): 2.0,
        ("Held-out prompts", "token F1"): 0.5,
        ("Held-out prompts", "token F1 from full context (control)"): 0.75,
        ("Held-out prompts", "token F1 from no context (control)"): 0.125,
    }


def test_without_results_the_last_held_out_evaluation_of_every_stage_is_shown(config):
    twice = replace(FACTS, stages=[PRETRAINING, replace(PRETRAINING, evaluation={"ae_loss": 0.125})])
    card = render(replace(twice, reconstruction=None, answers=None), config)
    assert "| 1. ICAE pretraining | 0.25 | 11.5 | 92.5% | 0.75 |" in card
    assert "| 2. ICAE pretraining | 0.12 | – | – | – |" in card
    (metric,) = yaml.safe_load(card.split("---\n")[1])["model-index"][0]["results"][0]["metrics"]
    assert metric == {"type": "loss", "value": 0.125, "name": "autoencoding loss"}


def test_every_control_stands_in_the_table_of_its_result(config):
    text = body(render(FACTS, config))
    for row in ("| icae | 2.00 | 0.50 |", "| no context | 4.00 | 0.12 |", "| untrained slots | 4.50 | – |"):
        assert row in text
    assert "| icae-tiny | 0.30 | 10.0 | 0.50 | – |" in text
    assert "*no context*: the frozen base reads the prompt alone" in text and "truncated" not in text


@pytest.mark.parametrize(
    "facts",
    [
        CardFacts(name="x"),
        FACTS,
        CardFacts(name="x", stages=[TUNING]),
        CardFacts(name="x", stages=[PRETRAINING], repo_id="org/x"),
        CardFacts(name="x", origin="Converted from a file."),
    ],
    ids=["nothing-known", "all-known", "tuned-only", "pretrained-only", "converted"],
)
@pytest.mark.parametrize("memory_type", ["key_values", "hidden_states"])
def test_no_placeholder_survives(facts, memory_type, config):
    config.memory_type = memory_type
    card = render(facts, config)
    assert not PLACEHOLDERS.search(card), PLACEHOLDERS.search(card)
    assert "\n\n\n" not in card and not re.search(r"^\|.*\|\n\n\|", card, re.MULTILINE)


def test_what_is_not_known_is_said_to_be_unknown(config):
    config.base_model_fingerprint = None
    text = body(render(CardFacts(name="x"), config))
    for sentence in (
        "No results were recorded with this model",
        "How this model was trained was not recorded",
        "No licence was stated",
        "The versions it was made with were not recorded",
    ):
        assert sentence in text
    assert "fingerprint" not in text
    text = body(render(FACTS, config))
    assert "- Letters: licence not recorded" in text and "The data of stage 2 was not recorded." in text


def test_how_long_contexts_were_is_said_only_where_all_stages_tell(config):
    def longest(**settings):
        stages = [PRETRAINING, replace(TUNING, settings=settings)]
        text = body(render(CardFacts(name="x", stages=stages), config))
        return re.search(r"- (Trained on contexts of up to \d+|How long its training contexts were)", text)[1]

    assert longest(max_context_length=24) == "Trained on contexts of up to 32"  # two spans of the first stage
    assert longest(max_context_length=48, max_spans=9) == "Trained on contexts of up to 48", "nothing is mixed in"
    assert longest(max_context_length=48, max_spans=9, pretraining_share=0.1) == "Trained on contexts of up to 144"
    assert longest(max_spans=2) == "How long its training contexts were", "triples of any length"


def test_many_stages_are_summed_up_and_each_is_a_folded_row(config):
    stages = [replace(PRETRAINING, seed=seed) for seed in range(4)]
    stages += [
        replace(TUNING, seed=4, learning_rate=1e-3),
        replace(TUNING, seed=5, context_tokens=None, seconds=1800.0),
    ]
    text = body(render(CardFacts(name="x", stages=stages), config))
    assert "| ICAE pretraining | 4 | 6,400 | 3,249,380 | 0.002 | 6.0 hours |" in text
    assert "| ICAE SFT | 2 | 400 | 812,345 (1 not recorded) | 0.001 to 0.002 | 30 minutes (1 not recorded) |" in text
    folded = re.search(
        r"<details>\n<summary>All 6 stages, first to last</summary>\n\n(.*?)\n\n</details>", text, re.DOTALL
    )[1]
    head, _, *rows = [line.split(" | ") for line in folded.splitlines()]
    assert head[1:3] == ["steps", "contexts per step"] and "seed" in head
    assert [row[0] for row in rows] == [f"| {n}. ICAE {'pretraining' if n < 5 else 'SFT'}" for n in range(1, 7)]
    assert [row[head.index("seed")] for row in rows] == list("012345")


def test_five_stages_stand_side_by_side_and_their_data_is_said_in_ranges(config):
    stages = [PRETRAINING, TUNING, PRETRAINING, PRETRAINING, PRETRAINING]
    text = body(render(CardFacts(name="x", stages=stages), config))
    assert "| steps | 1,600 | 200 | 1,600 | 1,600 | 1,600 |" in text and "<details>" not in text
    assert "Data of stages 1 and 3–5:" in text and "The data of stage 2 was not recorded." in text


def test_a_model_that_was_not_tuned_to_answer_says_so(config):
    sentence = "This model was not trained to answer prompts"
    assert sentence in render(CardFacts(name="x", stages=[PRETRAINING]), config)
    assert sentence not in render(FACTS, config) and sentence not in render(CardFacts(name="x"), config)


def test_a_model_on_the_embedded_base_s_weights_says_how_to_get_them(config):
    plain = snippet(render(FACTS, config))
    config.base_model_fingerprint = EMBEDDED_BASE_FINGERPRINT
    card = render(FACTS, config)
    assert EMBEDDED_BASE_CODE in snippet(card) and "base_model=base)" in snippet(card)
    assert "`verify_base=False` takes the others" in card
    assert snippet(card).replace("\n" + EMBEDDED_BASE_CODE + "\n", "").replace(", base_model=base", "") == plain
    embedded = ICAEConfig.from_pretrained(ROOT / "checkpoints" / "icae-smollm2-135m")
    assert embedded.base_model_fingerprint == EMBEDDED_BASE_FINGERPRINT


def test_a_base_that_is_not_on_the_hub_is_named_without_its_path(config, tmp_path):
    config.base_model_name_or_path = str(tmp_path / "my-base")
    card = render(FACTS, config)
    assert "base_model" not in yaml.safe_load(card.split("---\n")[1])
    assert str(tmp_path) not in card and 'base = "my-base"' in card and "base_model=base" in card


def test_the_quickstart_pins_a_revision_and_runs(saved, capsys, tmp_path, monkeypatch):
    FACTS.save(saved)
    monkeypatch.chdir(saved)  # from where "org/tiny-llama" is no folder
    code = snippet(model_card("."))
    assert 'revision = "0123abc"' in code and "trust_remote_code=True" in code
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(code, names)
    assert Path("ines.safetensors").exists() and len(names["answer"]) == 1
    assert capsys.readouterr().out.count("\n") >= 2


def test_a_commit_of_one_repository_is_not_pinned_in_the_card_of_another(saved):
    FACTS.save(saved)
    assert 'revision = "0123abc"' in model_card(saved, repo_id="org/icae-tiny")
    assert "0123abc" not in model_card(saved, repo_id="org/copy")
    assert 'revision = "v2"' in model_card(saved, repo_id="org/copy", revision="v2")


def test_the_quickstart_of_an_unpinned_repository_asks_for_its_commit(config):
    code = snippet(render(replace(FACTS, revision=None), config))
    assert "revision = model_info(repo).sha" in code
    compile(code, "card", "exec")


def test_the_quickstart_of_a_branch_asks_for_the_branch_s_commit(config):
    code = snippet(render(replace(FACTS, revision=None, branch="v2"), config))
    assert 'revision = model_info(repo, revision="v2").sha' in code
    compile(code, "card", "exec")


def test_the_quickstart_of_a_folder_without_code_takes_the_package_and_runs(saved, tmp_path, monkeypatch):
    ICAEForConditionalGeneration.from_pretrained(saved).save_pretrained("plain", with_code=False)
    monkeypatch.chdir("plain")  # from where "org/tiny-llama" is no folder
    card = model_card(".")
    with_repository = model_card(".", repo_id="org/x")
    monkeypatch.chdir(tmp_path)
    assert "from icae import ICAEForConditionalGeneration\n" in card and "trust_remote_code=True)" not in card
    assert "This folder holds no code" in card and "chat_icae.py" not in card
    names: dict = {}
    exec(snippet(card), names)
    assert len(names["answer"]) == 1
    assert "trust_remote_code=True)" in with_repository, "`icae push` puts the code there"


@pytest.mark.skipif(EMBEDDED_CHECKPOINT is None, reason="an installed wheel carries no checkpoint")
def test_the_quickstart_of_the_embedded_checkpoint_names_it_and_its_base(config):
    code = snippet(model_card(EMBEDDED_CHECKPOINT))
    assert "from icae import EMBEDDED_CHECKPOINT, ICAEForConditionalGeneration, embedded_base\n" in code
    assert "folder = EMBEDDED_CHECKPOINT" in code and "(folder, base_model=embedded_base())" in code
    config.base_model_fingerprint = EMBEDDED_BASE_FINGERPRINT
    code = snippet(render(CardFacts(name="mine"), config, with_code=False))
    assert "EMBEDDED_CHECKPOINT" not in code and 'folder = "mine"' in code and "base_model=embedded_base())" in code


def test_a_name_that_was_given_stands_above_that_of_the_repository(saved):
    assert "# icae-tiny\n" in model_card(saved) and "# other\n" in model_card(saved, repo_id="me/other")
    CardFacts(name="Mine").save(saved)
    assert "# Mine\n" in model_card(saved, repo_id="me/other")


def test_a_card_of_a_folder_without_facts_takes_what_its_files_say(saved):
    card = model_card(saved)
    assert "# icae-tiny" in card and "transformers 5." in card
    assert "# other" in model_card(saved, repo_id="me/other", revision="v1") and "0123abc" not in card


# ----------------------------------------------------------------------------------------------------------- the facts


def test_facts_come_back_as_they_were_saved(tmp_path):
    facts = replace(FACTS, reconstruction=None)  # nan is not equal to itself
    facts.save(tmp_path)
    assert CardFacts.load(tmp_path) == facts
    assert CardFacts.load(tmp_path / "elsewhere") == CardFacts()


@pytest.mark.parametrize("content", ["{", '{"colour": 1}', '{"license": 3}', '{"stages": [{"name": "x"}]}', "[]"])
def test_damaged_facts_are_refused_with_the_file_s_name(content, tmp_path):
    (tmp_path / CARD_FACTS).write_text(content)
    with pytest.raises(ValueError, match=r"Expected facts for a model card in .*icae_card\.json"):
        CardFacts.load(tmp_path)


@pytest.mark.parametrize("license", ["Apache License 2.0", "MIT", ""])
def test_a_licence_that_the_hub_does_not_take_is_refused(license):
    with pytest.raises(ValueError, match=f"Expected a licence as the Hub spells it, .* got '{license}'"):
        CardFacts(license=license)
    assert CardFacts(license="cc-by-nc-sa-4.0").license and CardFacts(license="openrail++").license


@pytest.mark.parametrize("language", ["English", "en_US", "e"])
def test_a_language_that_the_hub_does_not_take_is_refused(language):
    with pytest.raises(ValueError, match=f"Expected languages as codes, .* got '{language}'"):
        CardFacts(language=["en", language])
    assert CardFacts(language=["en", "pt-BR", "zh-Hant", "yue", "multilingual", "code"]).language


def test_bars_and_line_breaks_do_not_break_tables(config):
    config.lora_target_modules = "q_proj|v_proj"
    stage = replace(PRETRAINING, hardware="one | two\nthree")
    card = render(replace(FACTS, stages=[stage]), config)
    assert r"on `q_proj\|v_proj` |" in card and r"| hardware | one \| two three |" in card


def test_the_quickstart_is_python_whatever_the_names(config):
    config.base_model_name_or_path = 'a/b/my "base"'
    for facts in (
        CardFacts(name='my"model\\ of\n# two lines'),
        CardFacts(name="x", repo_id="a/b", branch='"; exit()'),
    ):
        card = render(facts, config)
        ast.parse(snippet(card))
        assert "\n# two lines" not in card


def test_a_folder_without_an_icae_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"Expected a saved ICAE with its 'config.json'"):
        model_card(tmp_path)


def test_results_that_a_stage_names_must_be_there(tmp_path):
    facts = CardFacts(stages=[replace(PRETRAINING, curves="no-such-run")])
    with pytest.raises(ValueError, match=r"found no no-such-run\.json"):
        facts.add_results(ROOT / "results", ROOT / "checkpoints" / "icae-smollm2-135m")
    with pytest.raises(ValueError, match=r"found no reconstruction\.json"):
        CardFacts().add_results(tmp_path, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": {"icae": "0" * 16}}, r"Expected results of the model .* got those of another one \(0{16}\)"),
        ({"weights": {}}, r"got those of another one \(not recorded\); make them with `icae evaluate answers`"),
        ({"summary": []}, r"Expected what `icae evaluate answers` writes in .*answers\.json, got AttributeError"),
        ({"made_by": {}}, r"Expected what `icae evaluate answers` writes in .*answers\.json, got KeyError"),
        (None, r"Expected results in .*answers\.json, got a damaged file"),
    ],
)
def test_results_of_another_model_and_damaged_ones_are_refused(tmp_path, make_icae, change, message):
    make_icae().save_pretrained(tmp_path / "icae")
    record = {
        "rows": 2,
        "context_tokens": 16,
        "summary": {"icae": {"f1": 0.5}},
        "arguments": {},
        "made_by": {"command": "icae evaluate answers", "date": "2026-01-01", "commit": None},
        "weights": {"icae": weights_digest(tmp_path / "icae")},
    }
    (tmp_path / "answers.json").write_text(json.dumps(record))
    write_card(tmp_path / "icae", tmp_path)
    before = CardFacts.load(tmp_path / "icae")
    assert before.answers.rows == {"icae": {"f1": 0.5}}
    (tmp_path / "answers.json").write_text(json.dumps(record | (change or {}))[: None if change else 20])
    with pytest.raises(ValueError, match=message):
        write_card(tmp_path / "icae", tmp_path)
    assert CardFacts.load(tmp_path / "icae") == before


def test_the_embedded_checkpoint_s_card_is_that_of_the_results(tmp_path):
    folder = ROOT / "checkpoints" / "icae-smollm2-135m"
    copy = tmp_path / folder.name
    shutil.copytree(folder, copy)
    assert main(["card", str(copy), "--results", str(ROOT / "results")]) == 0
    for name in ("README.md", CARD_FACTS):
        assert (copy / name).read_text() == (folder / name).read_text(), (
            "run `icae card checkpoints/icae-smollm2-135m --results results`"
        )
    assert not PLACEHOLDERS.search((copy / "README.md").read_text())


# -------------------------------------------------------------------------------------------------------- in training


DOCUMENTS = Dataset.from_dict({"text": ["A train to the north leaves at ten minutes to nine, always late." * 2] * 4})
TRIPLES = Dataset.from_dict(
    {"context": ["The red cat sat."] * 4, "prompt": ["Which cat?"] * 4, "response": ["red"] * 4}
)


def pretrain(model, folder, **options):
    defaults = {"output_dir": str(folder), "per_device_train_batch_size": 4, "eval_reconstructions": 0}
    args = ICAEPretrainingConfig(**(SHORT_RUN | defaults | options))
    return ICAEPretrainingTrainer(model, args, DOCUMENTS, DOCUMENTS)


def test_a_run_that_goes_on_from_a_checkpoint_carries_its_stage_over(make_icae, tmp_path):
    trainer = pretrain(make_icae(), tmp_path / "first", eval_strategy="steps", eval_steps=6)
    trainer.card.license, trainer.card.data = "mit", [DataSource("Timetables", license="CC0")]
    trainer.train()
    trainer.save_model()
    (first,) = CardFacts.load(tmp_path / "first").stages
    last = CardFacts.load(tmp_path / "first" / "checkpoint-6").stages[0]
    assert first == replace(last, seconds=first.seconds) and first.steps == 6
    logged = [entry for entry in trainer.state.log_history if "eval_ae_loss" in entry][-1]
    assert first.evaluation["ae_loss"] == logged["eval_ae_loss"]
    assert first.evaluation["ae_loss_other_text"] == logged["eval_ae_loss_other_text"]

    model = ICAEForConditionalGeneration.from_pretrained(tmp_path / "first", base_model=make_base(), is_trainable=True)
    args = ICAESFTConfig(output_dir=str(tmp_path / "second"), eval_generations=0, **(SHORT_RUN | {"max_steps": 2}))
    ICAESFTTrainer(model, args, TRIPLES).train()
    facts = CardFacts.load(tmp_path / "second")
    assert [stage.name for stage in facts.stages] == ["ICAE pretraining", "ICAE SFT"] and facts.license == "mit"
    assert facts.stages[0] == first and facts.answers_prompts
    second = facts.stages[1]
    assert (second.steps, second.seed, second.started_from) == (2, 3, None) and second.context_tokens > 0
    assert second.settings["pretraining_share"] == 0.1 and "eval_generations" not in second.settings
    card = (tmp_path / "second" / "README.md").read_text()
    assert "| 1. ICAE pretraining | 2. ICAE SFT |" in card and "- Timetables: CC0" in card
    assert not PLACEHOLDERS.search(card)
    assert str(tmp_path) not in card + (tmp_path / "second" / CARD_FACTS).read_text()


def test_stages_in_one_process_are_all_on_the_card(make_icae, tmp_path):
    model = make_icae()
    trainer = pretrain(model, tmp_path / "first", max_steps=2)
    trainer.train()
    trainer.train()
    args = ICAESFTConfig(output_dir=str(tmp_path / "second"), eval_generations=0, **(SHORT_RUN | {"max_steps": 3}))
    ICAESFTTrainer(model, args, TRIPLES).train()
    stages = CardFacts.load(tmp_path / "second").stages
    assert [(stage.name, stage.steps) for stage in stages] == [
        ("ICAE pretraining", 2),
        ("ICAE pretraining", 2),
        ("ICAE SFT", 3),
    ]


def test_a_card_states_only_what_was_measured_of_these_weights(make_icae, tmp_path):
    trainer = pretrain(make_icae(), tmp_path, max_steps=2, eval_on_start=True)
    trainer.train()
    assert CardFacts.load(tmp_path).stages[0].evaluation == {}
    logged = trainer.evaluate()
    assert trainer.card.facts().stages[0].evaluation["ae_loss"] == logged["eval_ae_loss"]


def test_of_samples_that_were_prepared_elsewhere_the_card_states_the_longest(make_icae, tmp_path):
    samples = Dataset.from_list([{"context_ids": [7] * 30, "continuation_ids": [], "length": 30}] * 4)
    options = SHORT_RUN | {"max_steps": 1, "eval_reconstructions": 0, "autoencoding_weight": 1.0}
    ICAEPretrainingTrainer(make_icae(), ICAEPretrainingConfig(str(tmp_path), **options), samples).train()
    (stage,) = CardFacts.load(tmp_path).stages
    assert stage.settings == {"autoencoding_weight": 1.0, "longest_context": 30}
    assert "Trained on contexts of up to 30 tokens" in (tmp_path / "README.md").read_text()


def test_a_weight_of_zero_is_a_setting(make_icae, tmp_path):
    pretrain(make_icae(), tmp_path, max_steps=1, autoencoding_weight=0.0).train()
    assert CardFacts.load(tmp_path).stages[0].settings["autoencoding_weight"] == 0


def test_a_resumed_run_is_one_stage_with_the_time_of_both_parts(make_icae, tmp_path):
    pretrain(make_icae(), tmp_path / "run", max_steps=3).train()
    checkpoint = tmp_path / "run" / "checkpoint-3"
    facts = CardFacts.load(checkpoint)
    facts.stages[0].seconds = 1000.0
    facts.save(checkpoint)
    pretrain(make_icae(), tmp_path / "run").train(resume_from_checkpoint=str(checkpoint))
    (stage,) = CardFacts.load(tmp_path / "run").stages
    assert stage.steps == 6 and 1000 < stage.seconds < 1600
    (checkpoint / CARD_FACTS).unlink()  # as of a run by an older version
    pretrain(make_icae(), tmp_path / "run").train(resume_from_checkpoint=str(checkpoint))
    assert CardFacts.load(tmp_path / "run").stages[0].seconds is None


def test_what_is_set_after_training_is_stated_and_what_cannot_be_stated_ends_a_run_at_its_start(make_icae, tmp_path):
    trainer = pretrain(make_icae(), tmp_path, max_steps=1)
    trainer.card.license = "Apache License"
    with pytest.raises(ValueError, match="Expected a licence as the Hub spells it"):
        trainer.train()
    assert trainer.state.global_step == 0
    trainer.card.license = None
    trainer.train()
    trainer.card.license, trainer.card.tags, trainer.card.data = "mit", ["letters"], [DataSource("Letters")]
    facts = trainer.card.facts()
    assert (facts.license, facts.tags, facts.stages[0].data) == ("mit", ["letters"], [DataSource("Letters")])


def test_the_best_checkpoint_s_facts_are_those_of_the_model_at_the_end(make_icae, tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": True}
    pretrain(make_icae(), tmp_path, metric_for_best_model="ae_loss", greater_is_better=True, **options).train()
    assert CardFacts.load(tmp_path).stages[0].steps == 3


def test_a_start_from_a_checkpoint_without_facts_is_named(make_icae, tmp_path):
    make_icae().save_pretrained(tmp_path / "unknown")
    model = ICAEForConditionalGeneration.from_pretrained(
        tmp_path / "unknown", base_model=make_base(), is_trainable=True
    )
    pretrain(model, tmp_path / "run", max_steps=1).train()
    assert CardFacts.load(tmp_path / "run").stages[0].started_from == "unknown"
    assert "| started from | `unknown` |" in (tmp_path / "run" / "README.md").read_text()


def test_results_measured_before_a_stage_are_not_carried_over(make_icae, tmp_path):
    make_icae().save_pretrained(tmp_path / "first")
    FACTS.save(tmp_path / "first")
    model = ICAEForConditionalGeneration.from_pretrained(tmp_path / "first", base_model=make_base(), is_trainable=True)
    pretrain(model, tmp_path / "run", max_steps=1).train()
    facts = CardFacts.load(tmp_path / "run")
    assert len(facts.stages) == 3 and facts.answers is facts.reconstruction is facts.repo_id is None


def test_the_data_s_names_and_licences_come_from_the_script_s_arguments():
    from icae.trainers.scripts import ScriptArguments, data_sources

    named = ScriptArguments(train_files=["a.parquet"], data_sources=["Pepys = public domain", "Letters"])
    assert data_sources(named) == [DataSource("Pepys", license="public domain"), DataSource("Letters")]
    assert data_sources(ScriptArguments(dataset_name="org/x")) == [DataSource("org/x", hub_id="org/x")]
    assert data_sources(ScriptArguments(train_files=["a.parquet"])) == []


def test_icae_card_writes_a_readme(saved, capsys):
    assert main(["card", str(saved), "--repo-id", "me/mine", "--revision", "v1"]) == 0
    assert "me/mine" in (saved / "README.md").read_text()
    assert json.loads((saved / "config.json").read_text())["model_type"] == "icae"
    (saved / "README.md").write_text("My own words.")
    assert main(["card", str(saved)]) == 2
    assert "README.md, which somebody changed; move it" in capsys.readouterr().err
    assert (saved / "README.md").read_text() == "My own words."
    assert main(["card", str(saved.parent / "nothing")]) == 2
    assert "Expected a saved ICAE" in capsys.readouterr().err


def test_a_card_that_somebody_changed_is_not_replaced_by_a_run(make_icae, tmp_path, caplog):
    trainer = pretrain(make_icae(), tmp_path / "run", max_steps=1)
    (tmp_path / "run").mkdir(exist_ok=True)
    (tmp_path / "run" / "README.md").write_text("My own words.")
    trainer.train()
    assert (tmp_path / "run" / "README.md").read_text() == "My own words."
    assert "README.md stays as somebody wrote it" in caplog.text
