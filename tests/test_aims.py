import json

import pytest

from icae.cli import main
from icae.evaluation import tables
from icae.evaluation.aims import reached, slope


def reconstruction(loss: float, prefix: float = 0.7) -> dict:
    found = {"ae_loss": loss, "bleu": 0.96, "exact_prefix": prefix}
    return {"models": {"one": {"by_length": {"128": found}}}}


def curves(tokens: list[float], losses: list[float]) -> dict:
    return {"runs": {"one": {"context_tokens": tokens, "ae_loss": losses}}}


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results").mkdir()

    def write(**records) -> dict:
        for name, record in records.items():
            (tmp_path / "results" / f"{name}.json").write_text(json.dumps(record))
        assert main(["evaluate", "aims"]) == 0
        return json.loads((tmp_path / "results" / "aims.json").read_text())

    return write


def test_a_loss_should_be_below_its_aim_and_a_score_above():
    loss, bleu = ("autoencoding loss, nats", "BLEU")
    assert reached(loss, 0.10) and not reached(loss, 0.11)
    assert reached(bleu, 0.95) and not reached(bleu, 0.94)


def test_the_slope_of_a_power_law_is_its_exponent_and_leads_to_the_aim():
    tokens = [1e5, 2e5, 4e5, 8e5]
    found = slope(tokens, [10 * count**-0.5 for count in tokens], aim=0.01)
    assert found["exponent"] == pytest.approx(0.5) and found["tokens_for_aim"] == pytest.approx(1e6)


def test_the_first_half_of_a_curve_does_not_count():
    assert slope([1, 2, 4, 8], [90, 7, 0.5, 0.25], aim=0.125)["tokens_for_aim"] == pytest.approx(16)


def test_a_curve_that_rises_leads_to_no_aim():
    assert slope([1, 2, 4], [1, 1, 2], aim=0.5)["tokens_for_aim"] is None


def test_the_second_run_goes_on_from_the_tokens_of_the_first(write):
    first, second = curves([1, 2, 4], [4, 2, 1]), curves([4, 12, 28], [0.5, 0.25, 0.125])
    record = write(reconstruction=reconstruction(0.1), **{"embedded": first, "embedded-2": second})
    assert record["slopes"]["embedded"]["tokens"] == 4 and record["slopes"]["embedded-2"]["tokens"] == 32
    assert record["slopes"]["embedded-2"]["exponent"] == pytest.approx(1)


def test_tokens_of_instruction_stages_between_pretraining_runs_count(write):
    answers = {"runs": {"one": {"context_tokens": [5, 10], "response_loss": [2, 1]}}}
    first, third = curves([1, 2, 4], [4, 2, 1]), curves([0, 6, 10], [0.5, 0.25, 0.125])
    record = write(reconstruction=reconstruction(0.1), **{"embedded": first, "sft": answers, "embedded-3": third})
    assert list(record["slopes"]) == ["embedded", "embedded-3"]
    assert record["slopes"]["embedded-3"]["tokens"] == 24


def test_a_run_of_the_instruction_stage_has_no_slope(write):
    tuned = curves([1, 2, 4], [4, 2, 1])
    tuned["runs"]["one"]["response_loss"] = [3, 2, 1]
    assert write(reconstruction=reconstruction(0.1), sft=tuned)["slopes"] == {}


def test_a_short_curve_has_no_slope_but_its_tokens_count(write):
    short, third = curves([1, 4], [4, 2]), curves([0, 6, 10], [0.5, 0.25, 0.125])
    record = write(reconstruction=reconstruction(0.1), **{"embedded": short, "embedded-3": third})
    assert {name: found["tokens"] for name, found in record["slopes"].items()} == {"embedded-3": 14}


def test_a_file_with_curves_of_several_runs_is_refused(write, capsys):
    several = {"runs": curves([1, 2], [2, 1])["runs"] | {"two": {}}}
    with pytest.raises(AssertionError):
        write(reconstruction=reconstruction(0.1), embedded=several)
    assert "Expected the curve of one run in embedded.json, got those of ['one', 'two']" in capsys.readouterr().err


def test_a_length_that_was_not_measured_is_named(write, tmp_path, capsys):
    write(reconstruction=reconstruction(0.1))
    assert main(["evaluate", "aims", "--results", str(tmp_path / "results"), "--length", "64"]) == 2
    assert "Expected results of 64 tokens in reconstruction.json, got those of 128" in capsys.readouterr().err
    short = {"models": {"one": {"by_length": {"64": {"ae_loss": 0.1}}}}}  # nothing written
    write(pretrained=reconstruction(0.1))
    (tmp_path / "results" / "reconstruction.json").write_text(json.dumps(short))
    assert main(["evaluate", "aims", "--results", str(tmp_path / "results"), "--length", "64"]) == 2
    assert "Expected results of 64 tokens in pretrained.json, got those of 128" in capsys.readouterr().err


def test_the_files_that_were_measured_say_when_and_in_which_dtype(write):
    made = {"made_by": {"commit": "c0ffee", "date": "2026-11-27"}, "arguments": {"dtype": "float32"}}
    record = write(reconstruction=reconstruction(0.1) | made)
    assert record["measured_by"] == {"reconstruction": made["made_by"] | {"dtype": "float32"}}


def test_a_value_without_an_interval_is_not_sure(write):
    record = write(reconstruction=reconstruction(0.1))
    assert record["aims"][0]["reached"] and record["aims"][0]["surely_reached"] is None


def test_values_now_and_after_the_first_run_stand_beside_the_aims(write):
    answers = {"summary": {"icae": {"f1_share_of_full_context": 0.94, "f1_share_interval": [0.75, 1.18]}}}
    percent = {"perplexity_increase_percent": 8.0, "perplexity_increase_percent_interval": [7.0, 9.0]}
    continuation = {"models": {"one": {"128": {"icae": percent}}}}
    after, before = reconstruction(0.3, prefix=0.1), reconstruction(0.08)
    record = write(reconstruction=after, pretrained=before, continuation=continuation, answers=answers)
    columns = {key: [row.get(key) for row in record["aims"]] for key in ("value", "reached", "after_first_run")}
    assert columns["value"] == [0.3, 0.96, 0.1, 0.08, 0.94, None, None, None, None]
    assert columns["reached"] == [False, True, False, True, True, None, None, None, None]
    assert columns["after_first_run"] == [0.08, 0.96, 0.7, *[None] * 6]
    text = tables.aims(record)
    assert "| autoencoding loss, nats | at most 0.1 | 0.08 | 0.30 | no |" in text and "power law" not in text
    assert "| at most 0.1 | – | 0.08 [0.07, 0.09] | yes |" in text
    assert "| at least 0.9 | – | 0.94 [0.75, 1.18] | yes, but not surely |" in text


def test_what_is_not_measured_is_neither_reached_nor_missed(write):
    record = write(reconstruction=reconstruction(0.3))
    assert [row.get("reached") for row in record["aims"]] == [False, True, True, *[None] * 6]
    assert "| – | – | – |" in tables.aims(record)


def test_long_answers_of_a_source_are_better_by_rouge_l_and_short_ones_by_f1(write):
    """One that is as good is not better."""
    long, short = {"f1": -0.1, "rougeL": 0.1}, {"f1": 0.1}
    none = {"long": {"f1": 0.1, "rougeL": 0.0}, "short": short, "other": {"f1": -0.1}, "last": {"f1": 0.2}}
    by_source = {"icae_minus": {"truncated context": {"long": long, "short": short}, "no context": none}}
    record = write(reconstruction=reconstruction(0.1), answers_by_source=by_source)
    assert [row["value"] for row in record["aims"][-4:-2]] == [1.0, 0.5]
    assert [row["reached"] for row in record["aims"][-4:-2]] == [True, False]
    assert "| at least 1.0 | – | 1.00 [0.00, 1.00] | yes, but not surely |" in tables.aims(record)
    for source, interval in ((long, "rougeL_interval"), (short, "f1_interval")):
        source[interval] = [0.01, 0.2]
    assert "| at least 1.0 | – | 1.00 [1.00, 1.00] | yes |" in tables.aims(write(answers_by_source=by_source))
    long["rougeL_interval"] = [-0.01, 0.2]
    assert "| at least 1.0 | – | 1.00 [0.50, 1.00] | yes, but not surely |" in tables.aims(
        write(answers_by_source=by_source)
    )
    del by_source["icae_minus"]["truncated context"]
    assert [row["value"] for row in write(answers_by_source=by_source)["aims"][-4:-2]] == [None, 0.5]


def test_answers_with_a_repetition_penalty_have_aims_of_their_own(write):
    greedy, penalised = (
        {"icae_minus": {other: {"one": {"f1": gain}} for other in ("truncated context", "no context")}}
        for gain in (-0.1, 0.1)
    )
    files = {"answers_by_source": greedy, "answers_by_source_penalty": penalised}
    record = write(reconstruction=reconstruction(0.1), **files)
    assert [row["value"] for row in record["aims"][-4:]] == [0.0, 0.0, 1.0, 1.0]
    assert record["measured_by"].keys() >= files.keys()


def test_results_of_several_models_are_refused(write, capsys):
    several = {"models": reconstruction(0.1)["models"] | {"two": {}}}
    with pytest.raises(AssertionError):
        write(reconstruction=several)
    assert "Expected results of one model, got those of ['one', 'two']" in capsys.readouterr().err


def test_without_results_the_command_that_makes_them_is_named(tmp_path, capsys):
    assert main(["evaluate", "aims", "--results", str(tmp_path)]) == 2
    assert "Expected reconstruction.json" in capsys.readouterr().err
