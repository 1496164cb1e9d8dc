import json
import re
import shutil
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM

from chat_server import chat_server
from icae import ICAEConfig, ICAEForConditionalGeneration
from icae.cli import OWN_PARSERS, main
from icae.evaluation import curves, readme, report, tables
from tiny import make_base, make_tokenizer


TEXTS = [f"{name} met Bob in {year}. " * 8 for name in "ACE" for year in (1871, 1899)]
TRIPLES = Dataset.from_dict(
    {
        "context": [f"It was late. Cleo has {number} cats." for number in range(4)],
        "prompt": ["Who | has <b>cats</b>?"] * 4,
        "response": ["Cleo"] * 4,
        "source": ["one", "two"] * 2,
    }
)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What the commands themselves write, on a tiny model."""
    folder, tokenizer = tmp_path_factory.mktemp("work"), make_tokenizer()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        make_base(max_position_embeddings=2048).save_pretrained("base")
        tokenizer.save_pretrained("base")
        base = AutoModelForCausalLM.from_pretrained("base")
        model = ICAEForConditionalGeneration.from_base(base, ICAEConfig(span_length=16, lora_r=4), tokenizer=tokenizer)
        model.save_pretrained("icae")
        Dataset.from_dict({"text": TEXTS}).to_parquet("documents.parquet")
        TRIPLES.to_parquet("triples.parquet")
        short = ["--quick", "--lengths", "16", "32", "--target-length", "8", "--per-source", "4"]
        run("reconstruction", "--models", "tiny=icae", "--data", "documents.parquet", *short, "--altered-length", "16")
        run("continuation", "--models", "tiny=icae", "--data", "documents.parquet", *short)
        run("probes", "--models", "tiny=icae", "--quick", "--pairs", "1")
        run("answers", "--model", "icae", "--data", "triples.parquet", "--per-source", "2", "--max-new-tokens", "2")
        with chat_server(lambda message: "[[A]]") as server:
            against = ["--against", "results/answers/full-context.jsonl", "--judge", server.url, "stub"]
            run("judge", "--data", "triples.parquet", *against)
        bench = ["bench", "generate", "--model", "icae", "--contexts", "32", "--new-tokens", "2", "--repeats", "1"]
        assert main([*bench, "--no-memory"]) == 0
        measured = {"eval_ae_loss": 2.0, "eval_ae_loss_other_text": 5.0, "eval_ae_accuracy": 0.5}
        state = [measured | {"eval_num_tokens": 10.0, "step": 1}]
        (folder / "icae" / "trainer_state.json").write_text(json.dumps({"log_history": state}))
        curves.main(["icae", "--output", "results/embedded.json", "--title", "Curves of a tiny model"])
        assert main(["evaluate", "aims", "--length", "16"]) == 0
        for name in ("pretrained", "ratios", "spans"):
            shutil.copy("results/reconstruction.json", f"results/{name}.json")
        for name in ("answers_by_source", "answers_by_source_penalty"):
            shutil.copy("results/answers.json", f"results/{name}.json")
        shutil.copy("results/probes.json", "results/probes_by_ratio.json")
        shutil.copy("results/bench_generate.json", "results/bench_generate_ratios.json")
        Path("results/other.json").write_text('{"what": "something else"}')
    return folder / "results"


def run(kind, *words):
    output = ["--output", f"results/{kind}.json"]
    assert main(["evaluate", kind, *words, *output]) == 0


@pytest.fixture
def written(results, tmp_path):
    assert main(["report", "--results", str(results), "--output", str(tmp_path / "report")]) == 0
    return tmp_path / "report"


def test_the_page_shows_every_result_and_needs_no_other_file(written):
    page = (written / "index.html").read_text()
    for section in report.SECTIONS[:-1]:
        assert f"<h2>{section.title}</h2>" in page
        found = re.findall(rf'alt="{section.title}" src="data:image/png;base64,\w', page)
        assert len(found) == len(section.plots)
    assert "<h2>Curves of a tiny model</h2>" in page
    assert not re.findall(r'(?:src|href)="(?!data:|\.\.)[^"]*"', page)
    assert "| ---" not in page and page.count("<table>") >= 9  # tables are tables


def test_the_markdown_has_its_plots_beside_it_and_links_to_the_results(written, results):
    text = (written / "README.md").read_text()
    plots = re.findall(r"!\[.*?\]\((.*?)\)", text)
    expected = 1 + sum(len(section.plots) for section in report.SECTIONS)
    assert len(plots) == len(set(plots)) == expected and all((written / plot).stat().st_size > 1000 for plot in plots)
    links = [link for link in re.findall(r"(?<!!)\[[^]]*\]\((\S+?\.json)\)", text)]
    assert links and all((written / link).resolve().is_file() for link in links)


def test_every_file_of_the_results_is_in_the_report(written, results):
    text = (written / "README.md").read_text()
    assert "## Other files\n\n- [other.json](" in text and "): something else\n" in text
    shown = {section.name for section in report.SECTIONS} | {"embedded", "other"}
    assert {file.stem for file in results.glob("*.json")} <= shown


def test_what_is_missing_is_listed_with_its_command(written):
    text = (written / "README.md").read_text()
    assert text.endswith("## Not measured yet\n\n- Cost of training: `icae bench train`\n")


def test_files_that_are_no_records_are_named_and_other_pictures_left_out(results, tmp_path):
    folder = tmp_path / "results"
    folder.mkdir()
    shutil.copy(results / "embedded.json", folder)
    for name in ("embedded.png", "photo.png", "list.png"):
        shutil.copy(results / "embedded.png", folder / name)
    (folder / "list.json").write_text("[1]")  # as `icae demo --json` writes
    assert main(["report", "--results", str(folder), "--output", str(tmp_path / "report")]) == 0
    text = (tmp_path / "report" / "README.md").read_text()
    assert re.search(r"^- \[list\.json\]\(.*\): not a record$", text, re.MULTILINE)
    assert "(embedded.png)" in text and "photo" not in text and "list.png" not in text


def test_every_command_of_the_report_exists():
    for section in report.SECTIONS:
        assert any(section.command.split()[1:][: len(words)] == list(words) for words in OWN_PARSERS)


def test_texts_from_outside_are_shown_as_they_are(written):
    page = (written / "index.html").read_text()
    assert "Who &#124; has &#60;b&#62;cats&#60;/b&#62;?" in page or "Who | has &lt;b&gt;cats&lt;/b&gt;?" in page
    assert "<b>cats" not in page


def test_each_section_says_how_it_was_made(written):
    text = (written / "README.md").read_text()
    assert len(re.findall(r"^Made by `.*`, .*\d{4}-\d\d-\d\d", text, re.MULTILINE)) == len(report.SECTIONS)
    assert "Made by `icae evaluate answers --model icae --data triples.parquet" in text


def test_differences_from_the_icae_are_shown_with_their_sign_and_interval(results):
    record = json.loads((results / "answers_by_source.json").read_text())
    record["icae_minus"]["no context"]["one"] = {"f1": -0.125, "f1_interval": [-0.5, -0.001], "loss": 0.5}
    shown = tables.icae_minus(record)
    assert "-0.12 [-0.50, +0.00]" in shown and "| +0.50 |" in shown
    assert "| ROUGE-L |" not in shown  # no source has long answers
    for sources in record["icae_minus"].values():
        sources["two"] |= {"rougeL": 0.375}
    rouge = tables.icae_minus(record).split("| ROUGE-L |")[1].split("| loss |")[0]
    assert "| +0.38 |" in rouge and "| two |" in rouge and "| one |" not in rouge


def test_sources_are_counted_where_slots_are_better_and_named_where_they_are_worse(results):
    record = json.loads((results / "answers_by_source.json").read_text())
    record.pop("full_context_minus", None)
    record["icae_minus"] = {
        "no context": {
            "one": {"f1": 0.1, "f1_interval": [0.05, 0.2], "loss": 0.3, "loss_interval": [0.1, 0.5]},
            "two": {"f1": -0.1, "f1_interval": [-0.2, 0.1], "loss": 0.2},
        }
    }
    shown = tables.better_and_worse(record)
    assert "| icae against no context | 1 of 2, 1 surely | two | 0 of 2, 0 surely | **one**, two |" in shown
    assert f"Token F1, the mean over sources: icae {record['summary']['icae']['f1']:.2f} [" in shown
    assert "full context against" not in shown.replace("icae against full context", "")
    record["full_context_minus"] = {"truncated context": {"one": {"f1": 0.1, "loss": -0.1}}}
    shown = tables.better_and_worse(record)
    assert "| full context against truncated context | 1 of 1, 0 surely | – | 1 of 1, 0 surely | – |" in shown
    record["icae_minus"]["no context"]["two"] |= {"rougeL": 0.1, "rougeL_interval": [0.05, 0.2]}
    shown = tables.better_and_worse(record)
    assert (
        "| icae against no context | 1 of 2, 1 surely | two | 1 of 1, 1 surely | – | 0 of 2, 0 surely | **one**, two |"
        in shown
    )
    record["arguments"]["repetition_penalty"] = 1.15
    shown = tables.better_and_worse(record, "penalised")
    assert "repetition penalty** of 1.15" in shown and "(results/penalised.json)" in shown
    assert (
        "| icae against no context | 1 of 2, 1 surely | two | 1 of 1, 1 surely | – |\n" in shown
    )  # losses are the same with it


def test_the_readme_has_the_same_tables(written, results):
    text = readme.render(results)
    assert [line for line in text.splitlines() if line.startswith("|")]
    page = (written / "README.md").read_text()
    assert all(line in page for line in text.splitlines() if line.startswith("|"))


def test_a_table_in_markdown():
    assert tables.table(("", "a"), [("x", "1"), ("", "")]) == "| | a |\n| --- | --- |\n| x | 1 |\n| | |"
    assert tables.with_interval(0.5, [0.25, 1]) == "0.50 [0.25, 1.00]" and tables.with_interval(0.5, None) == "0.50"


def test_a_folder_without_results_gives_the_commands_only(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert main(["report", "--results", str(tmp_path / "empty"), "--output", str(tmp_path / "report")]) == 0
    text = (tmp_path / "report" / "README.md").read_text()
    assert all(f"`{section.command}`" in text for section in report.SECTIONS)
    assert main(["report", "--results", str(tmp_path / "none"), "--output", str(tmp_path / "report")]) == 2
    assert "Expected a folder with results, got" in capsys.readouterr().err
