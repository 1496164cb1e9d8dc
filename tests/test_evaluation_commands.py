"""The commands that measure what slots keep and cost: on a tiny model, on the passages that the package brings."""

import io
import json
import math
import os
import re
import subprocess
import sys
from collections import Counter
from contextlib import redirect_stdout

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from icae import ICAEForConditionalGeneration
from icae.cli import main
from icae.evaluation import bench_generate, bench_train, continuation, probes, reconstruction
from icae.evaluation.arguments import Parts, evaluation_parser, parse
from icae.evaluation.documents import batches, cut_windows, load_documents, split_window
from icae.evaluation.measures import exact_prefix, mean_interval, wilson_interval
from icae.evaluation.readers import next_of_same_source
from icae.evaluation.text_facts import PATTERNS, make_text_pairs
from tiny import make_base


TEXTS = Dataset.from_dict(
    {
        "text": [
            "".join(f"{name} met {other} in {year + number}. " for number in range(4))
            for year, name, other in (*zip(range(1871, 1901, 5), "ACEGIK", "BDFHJL", strict=True),)
        ],
        "source": ["prose", "speech", "prose"] * 2,
    }
)
QUALITY = {
    "reconstruction": reconstruction,
    "continuation": continuation,
    "probes": probes,
}


@pytest.fixture
def saved(make_icae, tokenizer, tmp_path, monkeypatch):
    """A working folder with a base, an ICAE of it and documents."""
    monkeypatch.chdir(tmp_path)
    make_base(max_position_embeddings=2048).save_pretrained("base")
    tokenizer.save_pretrained("base")
    make_icae(base=AutoModelForCausalLM.from_pretrained("base")).save_pretrained("icae")
    TEXTS.to_parquet("texts.parquet")
    return tmp_path


def run(*words: str) -> dict:
    assert main([*words, "--output", "out.json"]) == 0
    with open("out.json") as file:
        return json.load(file)


def options(**values: int | list[int]) -> list[str]:
    """Words of a command line."""
    words = []
    for key, value in values.items():
        words += [f"--{key.replace('_', '-')}", *map(str, value if isinstance(value, list) else [value])]
    return words


# ------------------------------------------------------------------------------------------------ all of the commands


@pytest.mark.parametrize("command", QUALITY)
def test_the_quick_subset_needs_no_files_and_a_second_run_gives_the_same_figures(saved, command):
    first, second = (run("evaluate", command, "--models", "tiny=icae", "--quick") for _ in range(2))
    assert first.pop("made_by")["command"].startswith(f"icae evaluate {command} --models tiny=icae --quick")
    second.pop("made_by")
    assert first == second and list(first["models"]) == ["tiny"]


@pytest.mark.parametrize("command", QUALITY)
def test_an_interrupted_run_goes_on_with_the_parts_that_are_missing(saved, command, monkeypatch):
    words = ["evaluate", command, "--models", "tiny=icae", "--quick"]
    whole = run(*words)
    assert not (saved / "out.parts").exists()  # nothing is left of a run that has ended

    name = {"reconstruction": "evaluate", "continuation": "evaluate", "probes": "measure"}[command]
    original, calls = getattr(QUALITY[command], name), []

    def interrupted(*arguments):
        if len(calls) == 1:
            raise KeyboardInterrupt
        calls.append(arguments)
        return original(*arguments)

    monkeypatch.setattr(QUALITY[command], name, interrupted)
    assert main([*words, "--output", "out.json"]) == 130
    assert len(list(saved.glob("out.parts/*"))) == 1
    again = []
    monkeypatch.setattr(QUALITY[command], name, lambda *arguments: again.append(0) or original(*arguments))
    resumed = run(*words)
    parts = {"reconstruction": 3, "continuation": 5, "probes": 4}[command]
    assert len(again) == parts - 1
    assert resumed["models"] == whole["models"]


def test_parts_of_other_weights_other_data_or_other_arguments_are_not_taken(saved):
    parser = evaluation_parser("evaluate something", "", several_models=True)
    arguments = [parse(parser, words, {}) for words in ([], ["--models", "other"], ["--seed", "1"])]
    assert Parts(arguments[0])(lambda: 1, weights="a") == 1
    assert Parts(arguments[1])(lambda: 2, weights="a") == 1  # the same weights under another name
    assert Parts(arguments[0])(lambda: 3, weights="b") == 3
    assert Parts(arguments[2])(lambda: 4, weights="a") == 4


@pytest.mark.parametrize("commits", ["abbbb", "aaaab"])  # of four parts, and of the end
def test_parts_of_another_commit_are_named_in_the_record(saved, monkeypatch, commits):
    words = ["evaluate", "probes", "--models", "tiny=icae", "--quick"]
    monkeypatch.setattr("icae.evaluation.arguments.current_commit", iter(commits).__next__)
    assert run(*words)["commits"] == ["a", "b"]


def test_records_hold_no_path_of_this_machine(saved):
    words = ["--models", f"tiny={saved / 'icae'}", str(saved / "icae"), "--data", str(saved / "texts.parquet")]
    words += options(lengths=8, target_length=4, per_source=2, batch_size=2)
    record = run("evaluate", "continuation", *words)
    assert str(saved) not in json.dumps(record)
    assert record["data"]["file"] == record["arguments"]["data"] == "texts.parquet"
    assert list(record["models"]) == ["tiny", "icae"] and record["models"]["tiny"] == record["models"]["icae"]


# ----------------------------------------------------------------------------------------------------------- documents


def test_windows_are_whole_and_do_not_overlap_and_those_of_a_source_stand_together(tokenizer):
    windows = cut_windows(TEXTS, tokenizer, 20, 3, seed=0)
    assert [window["source"] for window in windows] == ["prose"] * 3 + ["speech"] * 3
    texts = [tokenizer.decode(window["ids"]) for window in windows]
    assert all(len(text) == 20 for text in texts)
    starts = [document.index(text) for text in texts for document in TEXTS["text"] if text in document]
    assert all(start % 20 == 0 for start in starts)
    assert windows == cut_windows(TEXTS, tokenizer, 20, 3, seed=0) != cut_windows(TEXTS, tokenizer, 20, 3, seed=1)


def test_every_context_length_is_followed_by_the_same_targets():
    window = {"ids": list(range(10)), "source": "all"}
    assert split_window(window, 7, 3) == ([0, 1, 2, 3, 4, 5, 6], [7, 8, 9])
    assert split_window(window, 2, 3) == ([5, 6], [7, 8, 9])


@pytest.mark.parametrize("count", range(2, 12))
@pytest.mark.parametrize("size", [2, 4])
def test_no_batch_has_a_single_row_and_none_is_left_out(count, size):
    found = batches(range(count), size)
    assert [item for batch in found for item in batch] == list(range(count))
    assert all(min(size, count) <= len(batch) < 2 * size for batch in found)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lengths", "8"], "Expected `--data`, .* got none"),
        (["--data", "answers.json"], "Expected a column 'text' with documents in 'answers.json', got"),
        (
            ["--data", "texts.parquet", "--without", "verse"],
            r"Expected `--without` to name sources .* got \['verse'\]",
        ),
        (["--data", "texts.parquet", "--without", "prose", "speech"], "Expected at least one source besides"),
        (
            ["--data", "texts.parquet", "--lengths", "500"],
            "Expected documents with at least two windows of 628 tokens",
        ),
        (["--quick", "--batch-size", "1"], "Expected `--batch-size` of at least 2"),
    ],
)
def test_documents_that_cannot_be_read_are_refused(saved, words, message, capsys):
    (saved / "answers.json").write_text(json.dumps([{"answer": "yes"}]))
    assert main(["evaluate", "continuation", "--models", "icae", *words]) == 2
    assert re.search(message, capsys.readouterr().err)


# ------------------------------------------------------------------------------------------------------ reconstruction


def test_reconstruction_reports_lengths_sources_and_altered_text_beside_the_control(saved):
    words = ["--models", "tiny=icae", "--data", "texts.parquet"]
    words += options(lengths=[16, 32], altered_length=16, target_length=8, per_source=2, batch_size=2)
    record = run("evaluate", "reconstruction", *words, "--written-per-source", "1", "--dtype", "float32")
    row = record["models"]["tiny"]
    measures = {"ae_loss", "ae_loss_other_text", "ae_accuracy", "lm_loss", "lm_loss_other_text", "bleu"}
    assert measures | {"exact_prefix"} <= set(row)
    assert row["rows"] == record["rows"] == 8 and row["written"] == 4
    low, high = row["by_length"]["16"]["bleu_interval"]
    assert 0 <= low <= row["by_length"]["16"]["bleu"] <= high <= 1 and len(row["exact_prefix_interval"]) == 2
    assert record["context_tokens"] == 4 * (16 + 32) and row["slots"] == {"16": 4, "32": 8}
    assert list(row["by_length"]) == ["16", "32"] and set(row["by_source"]) == {"prose", "speech"}
    assert row["by_text"]["normal"] == row["by_length"]["16"]
    lengths = [part["ae_loss"] for part in row["by_length"].values()]
    assert row["ae_loss"] == pytest.approx(sum(lengths) / 2)
    assert len({part["ae_loss"] for part in row["by_text"].values()}) == 3

    model = ICAEForConditionalGeneration.from_pretrained("icae")
    arguments = parse(evaluation_parser("evaluate x", ""), ["--seed", "0"], {})
    arguments.data, arguments.without, arguments.quick = "texts.parquet", [], False
    windows = cut_windows(load_documents(arguments)[0], model.tokenizer, 40, 2, 0)
    with torch.no_grad():
        alone = [model(context_ids=torch.tensor([window["ids"][-24:-8]])).loss.item() for window in windows]
    assert row["by_length"]["16"]["ae_loss"] == pytest.approx(sum(alone) / 4, abs=1e-4)


@pytest.mark.slow  # two processes
def test_another_process_gives_exactly_the_same_figures(saved):
    command = ["evaluate", "reconstruction", "--models", "tiny=icae", "--quick", "--output"]
    assert main([*command, "here.json"]) == 0
    environment = os.environ | {"PYTHONHASHSEED": "1"}  # this process has another one
    subprocess.run([sys.executable, "-P", "-m", "icae.cli", *command, "there.json"], check=True, env=environment)
    first, second = (json.loads((saved / name).read_text()) for name in ("here.json", "there.json"))
    assert first["models"] == second["models"] and first["models"]["tiny"]["ae_loss"] > 0


def test_the_interval_over_several_lengths_is_drawn_over_windows_not_rows():
    losses = [1.0, 3.0, 2.5]
    rows = [{"window": window, "ae_loss": loss} for _ in range(5) for window, loss in enumerate(losses)]
    summary = reconstruction.summarize(rows)
    assert summary["rows"] == 15 and summary["ae_loss_interval"] == reconstruction.mean_interval(losses)


def written_rows(windows: list[int]) -> list[dict]:
    text = "the keeper of the light had not spoken to anyone"
    return [{"window": window, "ae_loss": 1.0} for window in windows] + [
        {"window": window, "exact_prefix": share, "written": text if share == 1 else "the keeper of it", "text": text}
        for window, share in zip(windows, (1.0, 0.25, 1.0, 0.5), strict=True)
    ]


def test_what_is_written_out_has_intervals_that_hold_its_mean():
    summary = reconstruction.summarize(written_rows([0, 1, 2, 3]))
    assert summary["exact_prefix_interval"] == reconstruction.mean_interval([1.0, 0.25, 1.0, 0.5])
    low, high = summary["bleu_interval"]
    assert 0 <= low < summary["bleu"] < high <= 1


def test_bleu_has_no_interval_where_several_lengths_of_a_window_were_written():
    summary = reconstruction.summarize(written_rows([0, 1, 0, 1]))
    assert "bleu_interval" not in summary
    assert summary["exact_prefix_interval"] == reconstruction.mean_interval([1.0, 0.375])


def test_altered_text_keeps_its_length_and_holds_no_control_token(tokenizer):
    windows = cut_windows(TEXTS, tokenizer, 20, 3, seed=0)
    special = set(tokenizer.all_special_ids)
    for kind in ("normal", "patterned", "random"):
        altered = reconstruction.alter(windows, kind, tokenizer, seed=0)
        assert all(len(window["ids"]) == 20 and not special & set(window["ids"]) for window in altered)
        assert altered == reconstruction.alter(windows, kind, tokenizer, seed=0)
    patterned = reconstruction.alter(windows, "patterned", tokenizer, seed=0)
    assert patterned[0]["ids"] == [token + 1 for token in windows[0]["ids"]]


def test_altered_text_has_a_length_that_is_measured_in_normal_text_too(saved, capsys):
    assert main(["evaluate", "reconstruction", "--models", "icae", "--quick", "--altered-length", "8"]) == 2
    assert r"Expected `--altered-length` to be 0 or one of the `--lengths` [64], got 8" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("written", "share"), [([5, 6, 7, 8], 1), ([5, 6, 9, 8], 0.5), ([9], 0), ([5, 6, 7], 0.75), ([5, 6, 7, 8, 9], 1)]
)
def test_the_exact_prefix_ends_before_the_first_wrong_token(written, share):
    assert exact_prefix(written, [5, 6, 7, 8]) == share


# -------------------------------------------------------------------------------------------------------- continuation


def test_perplexities_behind_slots_and_behind_the_context_are_those_of_the_model(saved):
    words = ["--models", "tiny=icae", "--data", "texts.parquet", "--dtype", "float32"]
    words += options(lengths=[8, 32], target_length=6, per_source=2, batch_size=2)
    record = run("evaluate", "continuation", *words)
    model = ICAEForConditionalGeneration.from_pretrained("icae")
    windows = cut_windows(TEXTS, model.tokenizer, 38, 2, 0)
    slots, full, none = [], [], []
    for window in windows:
        context, targets = torch.tensor([window["ids"][:32]]), torch.tensor([window["ids"][32:]])
        with torch.no_grad():
            slots.append(model(context, continuation_ids=targets, autoencoding_weight=0.0).loss.item())
            for losses, before in ((full, context[0].tolist()), (none, [])):
                ids = torch.tensor([[1, *before, *window["ids"][32:]]])
                scores = model.language_model(ids).logits[0, -7:-1].log_softmax(dim=-1)
                losses.append(-scores.gather(1, targets.T).mean().item())
    row = record["models"]["tiny"]["32"]
    for name, losses in (("icae", slots), ("full context", full), ("no context", none)):
        assert row[name]["nats"] == pytest.approx(sum(losses) / 4, abs=1e-4)
        assert row[name]["perplexity"] == pytest.approx(math.exp(sum(losses) / 4), rel=1e-4)
    increase = 100 * (row["icae"]["perplexity"] / row["full context"]["perplexity"] - 1)
    assert row["icae"]["perplexity_increase_percent"] == pytest.approx(increase)
    assert row["full context"]["perplexity_increase_percent_interval"] == [0, 0]
    shorter = record["models"]["tiny"]["8"]
    assert shorter["no context"]["nats"] == pytest.approx(row["no context"]["nats"])  # the same targets
    assert row["slots"] == 8 and shorter["slots"] == 2
    assert row["last tokens"]["nats"] == pytest.approx(shorter["full context"]["nats"])  # 8 tokens
    assert row["another text's slots"]["nats"] != row["icae"]["nats"]


def test_the_base_is_read_once_for_several_icaes(saved, monkeypatch):
    calls = []
    original = continuation.TokenReader.losses
    monkeypatch.setattr(continuation.TokenReader, "losses", lambda *given: calls.append(0) or original(*given))
    words = ["--data", "texts.parquet"]
    words += options(lengths=[8], target_length=6, per_source=1, batch_size=2)
    run("evaluate", "continuation", "--models", "one=icae", "two=icae", *words)
    assert len(calls) == 3  # full context, last tokens, no context


# -------------------------------------------------------------------------------------------------------------- probes


class Oracle:
    """Knows the text: an answer is likely if it stands in it."""

    def __init__(self, model):
        self.decode = model.tokenizer.decode

    def nats(self, rows):
        known = [self._is_true(self.decode(row["context_ids"]), self.decode(row["response_ids"])) for row in rows]
        return [torch.tensor([0.0 if true else 1.0]) for true in known]

    @staticmethod
    def _is_true(text, answer):
        if (early := answer.partition(" came to ")) and early[1]:
            return f"{early[0]} came to {early[2].partition(' first')[0]} first" in text
        return (
            answer.removeprefix("Yes. ").removeprefix("No. ").removesuffix("</s>").removesuffix("<|im_end|>") in text
        )


@pytest.mark.parametrize("seed", range(20))
def test_a_reader_of_the_text_is_always_right_and_one_without_it_exactly_half_the_time(make_icae, seed):
    model = make_icae()
    pair = probes.make_pair(seed)
    rows = [row for text, asked in pair for row in probes.encode(model, text, asked)]
    assert all(margin > 0 for margin in probes.margins(Oracle(model), rows))

    class Habits:
        """Likes some answers more than others, whatever the text is."""

        def nats(self, rows):
            return [torch.tensor([float(sum(row["response_ids"]) % 97)]) for row in rows]

    found = probes.margins(Habits(), rows)
    assert sum(map(probes.is_positive, found)) == len(found) / 2
    half = len(found) // 2
    assert [one + other for one, other in zip(found[:half], found[half:], strict=True)] == [0] * half


@pytest.mark.parametrize("seed", range(20))
def test_true_values_stand_in_the_text_and_false_ones_only_where_it_is_said(seed):
    for text, asked in probes.make_pair(seed):
        for probe in asked:
            if probe.kind in ("negations", "order"):
                continue
            true, false = probe.values
            assert true in text and (false in text) == probe.kind.endswith(", in the text")


def test_both_texts_of_a_pair_say_the_same_with_the_facts_exchanged():
    (text, asked), (twin, others) = probes.make_pair(0)
    assert text != twin and [probe.question for probe in asked] == [probe.question for probe in others]
    assert [probe.answers for probe in asked] == [probe.answers[::-1] for probe in others]
    assert probes.make_pair(0) == probes.make_pair(0) != probes.make_pair(1)


PASSAGES = [
    f"In {year} the young {name} was not yet a {word}, and he sold {number} pears to old {other}."
    for year, name, word, number, other in (
        (1871, "Boris", "carpenter", 35, "Anna"),
        (1902, "Clara", "violinist", 62, "Emil"),
        (1744, "Dmitri", "gardener", 418, "Ruth"),
    )
]


def test_facts_of_real_text_are_found_by_rule_and_exchanged_in_a_twin():
    passages = [(text, "letters") for text in PASSAGES]
    pairs = make_text_pairs(passages, per_kind=2, seed=0)
    kinds = Counter(pair[0][1][0].kind for pair in pairs)
    assert kinds == dict.fromkeys((f"{kind}, real text" for kind in PATTERNS), 2)
    for (text, (probe,)), (twin, (reverse,)) in pairs:
        true, false = probe.answers
        assert text in PASSAGES and true in text and false not in text and false in twin and true not in twin
        assert reverse == probe.reversed() and probe.question == reverse.question
        exchanged = ("not ", "") if probe.kind.startswith("negations") else probe.values
        assert text.replace(*exchanged) == twin and true.replace(*exchanged) == false
    assert pairs == make_text_pairs(passages, per_kind=2, seed=0)
    (pair,) = [pair for pair in make_text_pairs(passages[:2], per_kind=1, seed=0) if "years" in pair[0][1][0].kind]
    assert set(pair[0][1][0].values) == {"1871", "1902"}


def test_values_are_exchanged_within_a_source_and_words_that_are_not_what_they_seem_are_left_out():
    texts = [("he saw Anna in 35 towns", "a"), ("he saw Boris in 62 towns", "a"), ("he saw Clara in 418 towns", "b")]
    pairs = make_text_pairs(texts, per_kind=3, seed=0)
    assert {pair[0][1][0].values for pair in pairs if "numbers" in pair[0][1][0].kind} == {("35", "62"), ("62", "35")}
    also_small = make_text_pairs([*texts, ("an anna is an old coin", "a"), ("she saw Emil", "a")], per_kind=3, seed=0)
    words = {word for (_, (probe,)), _ in also_small if "capitalised" in probe.kind for word in probe.values}
    assert words == {"Boris", "Emil"}


@pytest.mark.parametrize(
    ("sources", "expected"),
    [("aabb", [1, 0, 3, 2]), ("aaab", [1, 2, 0, 0]), ("abc", [1, 2, 0]), ("abab", [2, 3, 0, 1])],
)
def test_the_control_reads_the_next_text_of_the_same_source_if_there_is_one(sources, expected):
    assert next_of_same_source([(source, [number]) for number, source in enumerate(sources)]) == expected


def test_the_control_never_reads_the_same_text_again():
    assert next_of_same_source([("a", [1]), ("b", [2]), ("a", [1]), ("a", [1])]) == [1, 2, 1, 1]
    with pytest.raises(ValueError, match="Expected two different texts in each batch of the control, got one; raise"):
        next_of_same_source([("a", [1]), ("b", [1])])


def test_facts_of_real_text_are_asked_for_beside_those_of_generated_text(saved):
    Dataset.from_dict({"text": PASSAGES}).to_parquet("passages.parquet")
    words = ["--models", "tiny=icae", "--data", "passages.parquet", "--pairs", "1", "--answered-pairs", "3"]
    record = run("evaluate", "probes", *words, *options(per_kind=2, length=60))
    assert record["data"]["file"] == "passages.parquet" and record["texts"] > 2
    for name, kinds in record["models"]["tiny"]["readers"].items():
        assert kinds["years, real text"]["probes"] == 4 and "answered" not in kinds["years, real text"]
        assert kinds["all"]["probes"] == 2 * 10 + (record["texts"] - 2)
        assert name != "no context" or kinds["all"]["accuracy"] == 0.5


@pytest.mark.parametrize(
    ("answer", "right"),
    [("It has 112 steps.", True), ("112 or 34", False), ("34", False), ("1120", False), ("", False)],
)
def test_an_answer_is_right_if_it_names_the_true_value_and_not_the_false_one(answer, right):
    assert probes.is_right(answer, probes.Probe("numbers", "How many?", ("", ""), ("112", "34"))) == right


def test_probes_report_every_kind_for_every_reader(saved):
    record = run("evaluate", "probes", "--models", "tiny=icae", "--pairs", "2", "--answered-pairs", "1")
    row = record["models"]["tiny"]["readers"]
    assert list(row) == ["icae", "full context", "truncated context", "no context"]
    for kinds in row.values():
        assert len(kinds) == 11 and kinds["all"]["probes"] == 40 and kinds["all"]["answered"] == 20
    assert row["no context"]["all"]["accuracy"] == row["no context"]["all"]["told_apart"] == 0.5
    assert row["full context"]["all"]["told_apart"] != 0.5
    assert record["texts"] == 4


# --------------------------------------------------------------------------------------------------------------- costs


def test_bench_generate_compares_slots_and_full_context_in_every_cell(saved):
    words = ["--model", "icae", "--ratios", "4", "8", "--batches", "1", "2", "--contexts", "32", "64"]
    record = run(
        "bench", "generate", *words, "--new-tokens", "3", "--repeats", "1", "--no-memory", "--dtype", "float32"
    )
    assert [(cell["batch"], cell["context_tokens"]) for cell in record["cells"]] == [
        (1, 32),
        (1, 64),
        (2, 32),
        (2, 64),
    ]
    prefix = bench_generate.FullContext(
        None, ICAEForConditionalGeneration.from_pretrained("icae"), torch.zeros(1, 64, dtype=torch.long)
    )
    per_token = 2 * 2 * 2 * 8 * 4  # keys and values, layers, heads, head size, bytes
    for cell in record["cells"]:
        assert cell["slots"] == {"4x": cell["context_tokens"] // 4, "8x": cell["context_tokens"] // 8}
        beside = prefix.ids.shape[1] - 64  # template and prompt
        for name, tokens in {"full context": cell["context_tokens"], **cell["slots"]}.items():
            assert cell["cache_bytes"][name] == cell["batch"] * per_token * (tokens + beside)
        for ratios in cell["ratios"].values():
            assert ratios["first token from cached slots, times faster"] > 0
    assert record["attention"] == "sdpa"


def test_each_ratio_loads_its_own_slots(saved, monkeypatch):
    loaded = []
    load = bench_generate.ICAEMemory.load
    monkeypatch.setattr(bench_generate.ICAEMemory, "load", lambda path: loaded.append(path.stem) or load(path))
    words = ["--model", "icae", "--ratios", "4", "8", "--contexts", "32", "--new-tokens", "2", "--repeats", "2"]
    run("bench", "generate", *words, "--no-memory")
    assert loaded == ["4x", "8x"] * 2


@pytest.mark.slow  # three processes
def test_the_trained_checkpoint_is_the_default_and_peak_memory_is_measured(saved):
    words = ["--model", "icae", "--contexts", "64", "--new-tokens", "2", "--repeats", "1"]
    (cell,) = run("bench", "generate", *words)["cells"]
    assert list(cell["ratios"]) == ["4x"]
    assert set(cell["peak_bytes"]) == {"full context", "4x icae", "4x cached"}
    assert all(value > 0 for value in cell["peak_bytes"].values())


def test_a_training_step_is_timed_with_its_peaks_measured_first(saved, monkeypatch):
    order, start_process = [], subprocess.run

    def in_this_process(command, **options):
        if "icae.evaluation.bench_train" not in command:
            return start_process(command, **options)  # git
        order.append("memory")
        monkeypatch.setattr(bench_train, "peak_bytes", lambda: len(order))
        with redirect_stdout(io.StringIO()) as said:
            bench_train.main(command[command.index("icae.evaluation.bench_train") + 1 :])
        return subprocess.CompletedProcess(command, 0, said.getvalue(), "")

    in_turn = bench_train.medians_in_turn
    monkeypatch.setattr(bench_train, "medians_in_turn", lambda *args: order.append("time") or in_turn(*args))
    monkeypatch.setattr(bench_train, "forget_peak", lambda: order.append("step"))
    monkeypatch.setattr(subprocess, "run", in_this_process)
    words = ["--base", "base", "--span-length", "8", "--batch-size", "2", "--dtype", "float32", "--repeats", "3"]
    record = run("bench", "train", *words)
    assert order == ["memory", "step"] * 7 + ["time"], "three of each variant, and one of the batch"
    assert record["memory_one_row"]["icae"]["peak_bytes"] > 0 and record["memory_batch"]["rows"] == 2
    assert len(record["ratios"]) == 5 and all(seconds > 0 for seconds in record["seconds"].values())


def test_a_training_step_whose_peak_cannot_be_measured_is_named(saved, monkeypatch, capsys):
    monkeypatch.setattr("sys.executable", "/bin/false")
    assert main(["bench", "train", "--base", "base", "--dtype", "float32"]) == 2
    assert (
        "Expected the peak memory of 'icae' from a process of its own, which ended with status 1"
        in capsys.readouterr().err
    )


def test_a_peak_that_cannot_be_measured_is_named_with_the_way_out(saved, monkeypatch, capsys):
    monkeypatch.setattr("sys.executable", "/bin/false")
    words = ["--model", "icae", "--contexts", "32", "--new-tokens", "2", "--repeats", "1"]
    assert main(["bench", "generate", *words]) == 2
    said = capsys.readouterr().err
    assert "Expected the peak memory of 'full' at 1 x 32 tokens" in said and "`--no-memory` leaves peaks out" in said


def test_both_sides_write_what_they_would_write_anyway(saved):
    model = ICAEForConditionalGeneration.from_pretrained("icae")
    full = bench_generate.FullContext(model.language_model, model, torch.randint(5, 90, (2, 24)))
    step = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(full.generate(**step), full.generate(past_key_values=full.prefill(), **step))
    measured = bench_generate.answering(full.generate, 5)()
    assert 0 < measured["first_token"] < measured["total"]


def test_contexts_beyond_the_positions_of_the_base_are_refused(saved, capsys):
    assert main(["bench", "generate", "--model", "icae", "--contexts", "2048", "--no-memory"]) == 2
    assert "Expected `--contexts` of at most" in capsys.readouterr().err


def test_ratios_say_how_much_faster_slots_are_and_from_which_prompt_they_pay():
    seconds = {
        "full context": {"first_token": 10.0, "total": 20.0, "tokens_per_second": 4.0},
        "prefill": {"seconds": 9.0},
        "full context, kept": {"first_token": 1.0, "total": 12.0, "tokens_per_second": 4.0},
        "4x compress": {"seconds": 14.0},
        "4x load": {"seconds": 0.5},
        "4x cached": {"first_token": 2.0, "total": 8.0, "tokens_per_second": 6.0},
    }
    sizes = {"full context": 100, "4x": 26}
    peak = {"full context": 50, "4x icae": 60, "4x cached": 40}
    assert bench_generate.compare("4x", seconds, sizes, peak) == {
        "first token from cached slots, times faster": 5,
        "load and first token, times faster": 4,
        "compress and first token, times faster": 10 / 16,
        "answer from cached slots, times faster": 2.5,
        "compress and answer once, times faster": 20 / 22,
        "tokens per second": 1.5,
        "answer against the kept full cache, times faster": 1.5,
        "bytes of keys and values": 0.26,
        "pays from so many prompts": 2,  # 14 seconds for 12 saved on each
        "pays against the kept full cache from so many prompts": 2,  # 5 more than the prefill, for 4 saved on each
        "peak memory, compress and answer": 1.2,
        "peak memory, cached slots": 0.8,
    }


@pytest.mark.parametrize(("spent", "saved_per_prompt", "prompts"), [(4, 3, 2), (-1, 3, 1), (1, 0, None), (6, 3, 2)])
def test_compression_pays_from_the_prompt_on_that_has_saved_what_it_cost(spent, saved_per_prompt, prompts):
    assert bench_generate.break_even(spent, saved_per_prompt) == prompts


# ----------------------------------------------------------------------------------------------------------- intervals


def test_intervals_hold_the_truth_95_times_in_100():
    generator = torch.Generator().manual_seed(0)
    draws = torch.rand(300, 60, generator=generator)
    shares = [wilson_interval(int((row < 0.3).sum()), 60) for row in draws]
    means = [mean_interval(row.tolist(), draws=300) for row in draws]
    assert 0.91 < sum(low <= 0.3 <= high for low, high in shares) / 300 < 0.99
    assert 0.91 < sum(low <= 0.5 <= high for low, high in means) / 300 < 0.99
