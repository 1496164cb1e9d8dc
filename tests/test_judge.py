import json
import random
import re
from http.client import IncompleteRead

import pytest
from datasets import Dataset

from chat_server import chat_server
from icae.cli import main
from icae.evaluation.answer_files import AnswerFile, digest, read_lines
from icae.evaluation.chat_client import ChatClient


OURS = ["good", "bad", "same", "good", "odd"]
THEIRS = ["bad", "good", "same", "good too", "even"]


@pytest.fixture
def files(tmp_path):
    """Five rows, of which one has the same answer twice, with the answers of two systems."""
    count = range(len(OURS))
    texts = Dataset.from_dict({"context": [f"text {n}" for n in count], "prompt": [f"prompt {n}" for n in count]})
    texts.to_parquet(tmp_path / "data.parquet")
    for name, answers in (("ours", OURS), ("theirs", THEIRS)):
        made_from = {"reader": name, "data": digest(tmp_path / "data.parquet"), "max_new_tokens": 48}
        file = AnswerFile(tmp_path / f"{name}.jsonl", made_from)
        file.add([{"row": number, "answer": answer} for number, answer in enumerate(answers)])
    return tmp_path


def judge(files, server, *more, against=("theirs.jsonl",)):
    """Runs the command; the record it wrote, or None if it failed."""
    output = files / "judge.json"
    output.unlink(missing_ok=True)
    data, answers = str(files / "data.parquet"), str(files / "ours.jsonl")
    command = ["--data", data, "--answers", answers, "--judge", server.url, "stub-judge", "--output", str(output)]
    if against:
        command += ["--against", *(str(files / name) if "=" not in name else name for name in against)]
    code = main(["evaluate", "judge", *command, *more])
    return json.loads(output.read_text()) if code == 0 else None


def answers_in(message):
    return re.search(r"\[Answer A\]\n(.*)\n\n\[Answer B\]\n(.*)\n\nGive", message, re.DOTALL).groups()


def by_quality(message):
    """Good before bad; equally good is a tie; of anything else the first."""
    first, second = (answer.split()[0] for answer in answers_in(message))
    if first == second:
        return "Both are. [[tie]]"
    return "Not [[A]], no: [[B]]" if second == "good" else "It is the first. [[A]]"


def test_an_output_without_an_ending_is_refused_before_anything_is_asked(files, capsys):
    with chat_server(by_quality) as server:
        assert judge(files, server, "--output", str(files / "judged")) is None
        assert not server.requests
    assert "Expected an `--output` with an ending, as `judge.json`" in capsys.readouterr().err


def test_each_pair_is_judged_in_both_orders_and_won_only_if_both_say_so(files):
    with chat_server(by_quality) as server:
        record = judge(files, server)
    found = record["against"]["theirs"]
    # Won, lost, the same without asking, a tie twice, and one where the judge always takes the first.
    assert (found["win"], found["lose"], found["tie"]) == pytest.approx((0.2, 0.2, 0.6))
    assert found["on_par"] == pytest.approx(0.8) and found["win_to_lose"] == 1 and found["pairs"] == 5
    low, high = found["on_par_interval"]
    assert low < 0.8 < high
    assert found["identical"] == 1 and found["without_verdict"] == 0
    assert found["both_orders_agree"] == 3 / 4 and found["first_preferred"] == 4 / 6
    asked = sorted(answers_in(request["messages"][0]["content"]) for request in server.requests)
    pairs = [pair for pair in zip(OURS, THEIRS, strict=True) if pair != ("same", "same")]
    assert asked == sorted([*pairs, *(pair[::-1] for pair in pairs)])
    first = server.requests[0]
    assert first["model"] == "stub-judge" and first["temperature"] == 0
    assert re.search(r"\[Text\]\ntext (\d)\n\n\[Prompt\]\nprompt \1\n", first["messages"][0]["content"])


def test_what_is_judged_is_not_asked_again(files):
    with chat_server(by_quality) as server:
        first = judge(files, server)
        count = len(server.requests)
        assert judge(files, server)["against"] == first["against"]
        assert len(server.requests) == count == 8
        judge(files, server, "--judge-options", '{"temperature": 1}')
        assert len(server.requests) == 2 * count  # another way to judge is another judgement


def test_an_interrupted_run_goes_on_where_it_was(files, capsys):
    count = [0]

    def fails_at_the_fourth(message):
        count[0] += 1
        return (400, "out of credit") if count[0] == 4 else by_quality(message)

    with chat_server(fails_at_the_fourth) as server:
        assert judge(files, server, "--parallel", "1") is None
        assert "Expected a reply of stub-judge, got status 400: out of credit" in capsys.readouterr().err
        known = len(read_lines(files / "judge" / "verdicts.jsonl"))
        assert 3 <= known < 8
        assert judge(files, server, "--parallel", "1")["against"]["theirs"]["pairs"] == 5
    assert count[0] == 8 + 1


def test_a_reply_without_a_verdict_is_asked_again_with_a_reminder(files):
    def forgets(message):
        return "[[B]]" if message.startswith("Please") else "I like both [A] and [B]."

    with chat_server(forgets) as server:
        found = judge(files, server)["against"]["theirs"]
    assert found["requests"] == 16 and found["without_verdict"] == 0 and found["tie"] == 1
    roles = [message["role"] for message in server.requests[-1]["messages"]]
    assert roles in (["user"], ["user", "assistant", "user"])
    assert found["prompt_tokens"] == 160 and found["completion_tokens"] == 32


def test_pairs_on_which_a_judge_gives_no_verdict_are_counted_apart(files):
    def mute(message):
        return "well" if "odd" in message or message.startswith("Please") else by_quality(message)

    with chat_server(mute) as server:
        found = judge(files, server)["against"]["theirs"]
        assert found["without_verdict"] == 1 and found["pairs"] == 4 and found["win"] == 1 / 4
        assert found["requests"] == 6 + 2 * 3
        judge(files, server)
        assert len(server.requests) == found["requests"]  # nor is it asked for ever


def test_a_judge_that_never_gives_a_verdict_is_refused(files, capsys):
    (files / "ours.jsonl").write_text((files / "ours.jsonl").read_text().replace("same", "other"))
    with chat_server(lambda message: "no idea") as server:
        assert judge(files, server) is None
    assert "Expected verdicts of stub-judge, got none in 10 replies" in capsys.readouterr().err


def test_tokens_and_price_are_counted(files):
    with chat_server(by_quality) as server:
        for _ in range(2):  # the second time from the file
            record = judge(files, server, "--price-per-million", "2", "8")
            assert record["judge_tokens"] == {"prompt": 80, "completion": 16}
            assert record["price"] == pytest.approx((80 * 2 + 16 * 8) / 1e6)


def test_a_pair_that_stands_in_two_comparisons_is_paid_once(files):
    with chat_server(by_quality) as server:
        record = judge(files, server, against=("theirs.jsonl", f"again={files / 'theirs.jsonl'}"))
    assert list(record["against"]) == ["theirs", "again"]
    assert len(server.requests) == 8 and record["judge_tokens"] == {"prompt": 80, "completion": 16}


def test_served_models_are_compared_with_and_asked_once(files, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "secret-of-the-judge")
    monkeypatch.setenv("ANSWER_KEY", "secret-of-the-other")
    with chat_server(by_quality) as server, chat_server(lambda message: f"bad {message}") as other:
        options = [
            "--answer-with",
            other.url,
            "org/rival-7b",
            "--answer-key",
            "ANSWER_KEY",
            "--judge-key",
            "JUDGE_KEY",
        ]
        for _ in range(2):
            record = judge(files, server, *options, against=())
        asked = sorted(request["messages"][0]["content"] for request in other.requests)
        assert asked == [f"text {number}\n\nprompt {number}" for number in range(5)]
        assert all(request["max_tokens"] == 48 for request in other.requests)  # as many as ours
        assert set(other.keys) == {"Bearer secret-of-the-other"}
        assert set(server.keys) == {"Bearer secret-of-the-judge"}
    assert record["against"]["org/rival-7b"]["win"] == pytest.approx(2 / 5)
    (line, *_) = read_lines(files / "judge" / "org-rival-7b.jsonl")[1:]
    assert line["prompt_tokens"] == 10
    assert record["answer_tokens"]["org/rival-7b"]["prompt"] == 5 * 10
    written = "".join(path.read_text() for path in files.rglob("*.json*"))
    assert "secret" not in written and "JUDGE_KEY" in written  # in the command


def test_two_checkpoints_are_told_apart_by_the_names_given(files, capsys):
    with chat_server(by_quality) as server:
        theirs = files / "theirs.jsonl"
        assert judge(files, server, against=("theirs.jsonl", "theirs.jsonl")) is None
        assert "Expected a name of its own for each comparison" in capsys.readouterr().err
        record = judge(files, server, against=("theirs.jsonl", f"64 slots={theirs}"))
        assert list(record["against"]) == ["theirs", "64 slots"] and len(server.requests) == 8


def test_other_rows_or_another_data_file_cannot_be_compared(files, capsys):
    with chat_server(by_quality) as server:
        (left_out,) = set(range(5)) - set(random.Random(0).sample(range(5), 4))
        head, *lines = (files / "theirs.jsonl").read_text().splitlines(keepends=True)
        kept = [line for line in lines if json.loads(line)["row"] != left_out]
        (files / "theirs.jsonl").write_text("".join([head, *kept]))
        assert judge(files, server) is None
        assert "got none to 1 of 5" in capsys.readouterr().err and not server.requests
        assert judge(files, server, "--max-rows", "4")["rows"] == 4  # drawn at random, not the first ones
        (files / "others.jsonl").write_text("".join([json.dumps(json.loads(head) | {"data": "other"}) + "\n", *kept]))
        assert judge(files, server, "--max-rows", "4", against=["others.jsonl"]) is None
        assert "got answers to another (digest other)" in capsys.readouterr().err
        Dataset.from_dict({"context": ["other"], "prompt": ["?"]}).to_parquet(files / "data.parquet")
        assert judge(files, server) is None
        assert "Expected the data file that" in capsys.readouterr().err
        assert judge(files, server, against=()) is None
        assert "Expected something to compare with, got nothing" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------- the client


def client_of(server, waited, **options):
    return ChatClient(server.url, "stub", wait=waited.append, **options)


def test_a_busy_or_failing_endpoint_is_asked_again_after_the_time_it_names():
    replies = iter([(429, ""), (503, ""), (500, ""), "there"])
    waited = []
    with chat_server(lambda message: next(replies)) as server:
        assert client_of(server, waited).reply([{"role": "user", "content": "hello"}]).text == "there"
    assert waited == [7, 2, 4]


def test_an_endpoint_that_answers_with_something_else_is_asked_again(monkeypatch):
    class Answer:
        def __init__(self, content):
            self.content = content

        def __enter__(self):
            return self

        def __exit__(self, *error):
            return None

        def read(self):
            if isinstance(self.content, Exception):
                raise self.content
            return self.content

    said = [b'{"error": "busy"}', b"<html>", IncompleteRead(b""), b'{"choices": [{"message": {"content": "there"}}]}']
    replies = iter(map(Answer, said))
    monkeypatch.setattr("urllib.request.urlopen", lambda *given, **options: next(replies))
    waited = []
    client = ChatClient("http://localhost/v1", "stub", wait=waited.append)
    assert client.reply([{"role": "user", "content": "hello"}]).text == "there" and waited == [1, 2, 4]


def test_an_endpoint_that_stays_away_ends_the_run_with_a_message():
    waited = []
    with chat_server(lambda message: (429, "")) as server:
        client = client_of(server, waited, attempts=3)
        with pytest.raises(ConnectionError, match=r"Expected a reply of stub at .*, got status 429 3 times; run the"):
            client.reply([{"role": "user", "content": "hello"}])
    assert waited == [7, 7] and len(server.requests) == 3
    with pytest.raises(ConnectionError, match="refused"):
        client.reply([{"role": "user", "content": "hello"}])


def test_a_key_that_an_endpoint_repeats_is_not_shown(monkeypatch):
    monkeypatch.setenv("KEY", "s3cret")
    with chat_server(lambda message: (401, "wrong key: s3cret")) as server:
        with pytest.raises(ValueError, match="got status 401: wrong key: …"):
            client_of(server, [], key_variable="KEY").reply([{"role": "user", "content": "hello"}])


def test_keys_are_taken_from_the_environment_only(monkeypatch):
    monkeypatch.delenv("KEY", raising=False)
    with pytest.raises(ValueError, match="Expected an API key in the environment variable KEY, got none"):
        ChatClient("http://localhost/v1", "m", "KEY")
    for url in ("http://me:s3cret@localhost/v1", "https://localhost/v1?key=s3cret", "localhost/v1"):
        with pytest.raises(ValueError, match="Expected the URL of an endpoint without key or password") as error:
            ChatClient(url, "m")
        assert "s3cret" not in str(error.value)
