"""
`icae evaluate judge`: answers from slots against other answers, as a served language model judges them (paper, tables
4 and 5).

    icae evaluate judge --data FILE.parquet --judge https://api.openai.com/v1 gpt-4.1 \\
        --answers results/answers/icae.jsonl --against results/answers/full-context.jsonl results/answers/summary.jsonl

The judge sees the text, the prompt and two answers, and says which is better or that neither is. It is asked twice,
with the answers in either order: a pair is won or lost if both verdicts say so, and a tie otherwise. Two answers that
are the same are a tie without asking. *On par* are the pairs that are won or tied.

Compared are files of answers, as `icae evaluate answers` keeps them, and the answers of other served models, which
read the whole text (`--answer-with URL MODEL`). Any endpoint that speaks OpenAI's chat completions will do. API keys
come from environment variables and are written nowhere.

Answers and verdicts are kept in files in a folder beside the output, and nothing that is there is asked again. Tokens
are those that all verdicts of the table took, whenever they were asked for.
"""

import argparse
import hashlib
import json
import random
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from tqdm.auto import tqdm

from icae.cli import whole_number
from icae.evaluation.answer_files import AnswerFile, Line, append_lines, digest, read_lines
from icae.evaluation.arguments import command_line
from icae.evaluation.chat_client import ChatClient, Message
from icae.evaluation.measures import wilson_interval
from icae.evaluation.record import write_record
from icae.evaluation.triples import load_triples


JUDGE_PROMPT = """\
Below are a text, a prompt about it and two answers to the prompt. Which answer is better? A good answer does what \
the prompt asks for, is right according to the text, and leaves out nothing that matters. The order of the answers \
and their length are no reason to prefer one.

[Text]
{context}

[Prompt]
{prompt}

[Answer A]
{first}

[Answer B]
{second}

Give your reason in one or two sentences. Then end with [[A]] if answer A is better, [[B]] if answer B is better, or \
[[tie]] if they are equally good."""
REMINDER = "Please end with exactly one of [[A]], [[B]] and [[tie]]."
VERDICT = re.compile(r"\[\[(A|B|tie)\]\]")


class Pair(NamedTuple):
    """Two answers to a prompt about a text, in the order in which the judge sees them."""

    context: str
    prompt: str
    first: str
    second: str


class Judge:
    """
    Verdicts on pairs of answers.

    Args:
        client ([`ChatClient`]): the judge.
        path (`Path`): file of all verdicts so far; what it holds is not asked again.
        attempts (`int`, *optional*, defaults to `3`): how often a judge is asked that gives no verdict.
    """

    def __init__(self, client: ChatClient, path: Path, attempts: int = 3):
        self.client, self.path, self.attempts = client, path, attempts
        self.known: dict[str, Line] = {line["request"]: line for line in read_lines(path)}
        self.used: dict[str, Line] = {}  # of the known ones, those that this run has asked for
        self._lock = Lock()

    def verdict(self, pair: Pair) -> Line:
        """The known verdict — `"A"`, `"B"`, `"tie"`, or None if the judge gave none — and what it took."""
        return self.known[self._key(pair)]

    def ask(self, pairs: Iterable[Pair], parallel: int) -> None:
        """Asks for the verdicts that are not known yet."""
        todo = {self._key(pair): pair for pair in pairs}  # the same pair once
        in_parallel(self._ask, [pair for key, pair in todo.items() if key not in self.known], parallel, "verdicts")
        self.used |= {key: self.known[key] for key in todo}

    def _ask(self, pair: Pair) -> None:
        key, messages = self._key(pair), self._messages(pair)
        line: Line = {"request": key, "verdict": None, "replies": [], "prompt_tokens": 0, "completion_tokens": 0}
        while line["verdict"] is None and len(line["replies"]) < self.attempts:
            reply = self.client.reply(messages)
            line["prompt_tokens"] += reply.prompt_tokens
            line["completion_tokens"] += reply.completion_tokens
            line["replies"].append(reply.text)
            if found := VERDICT.findall(reply.text):
                line["verdict"] = found[-1]
            messages = [
                *messages,
                {"role": "assistant", "content": reply.text},
                {"role": "user", "content": REMINDER},
            ]
        with self._lock:
            append_lines(self.path, [line])
            self.known[key] = line

    def _messages(self, pair: Pair) -> list[Message]:
        return [{"role": "user", "content": JUDGE_PROMPT.format(**pair._asdict())}]

    def _key(self, pair: Pair) -> str:
        """Digest of the request: a verdict holds for these very texts, this judge, where it is, and these options."""
        request = json.dumps([self.client.url, self.client.request(self._messages(pair))], sort_keys=True)
        return hashlib.sha256(request.encode()).hexdigest()[:16]


def in_parallel(ask: Callable[[Any], None], tasks: Sequence[Any], parallel: int, what: str) -> None:
    """Several requests at once. The first error ends it; what is answered by then is kept."""
    with ThreadPoolExecutor(parallel) as pool:
        for _ in tqdm(pool.map(ask, tasks), total=len(tasks), desc=what, disable=not tasks):
            pass


def answer_with(client: ChatClient, path: Path, rows: dict[int, Line], data: str, parallel: int) -> AnswerFile:
    """Answers of a served model that reads the whole text, in a file that grows."""
    made_from = {"reader": client.model, "endpoint": urlsplit(client.url).netloc, "data": data}
    file = AnswerFile(path, made_from | {"options": client.options})
    lock = Lock()

    def ask(number: int) -> None:
        row = rows[number]
        reply = client.reply([{"role": "user", "content": f"{row['context']}\n\n{row['prompt']}"}])
        line = {
            "row": number,
            "answer": reply.text,
            "prompt_tokens": reply.prompt_tokens,
            "completion_tokens": reply.completion_tokens,
        }
        with lock:
            file.add([line])

    in_parallel(ask, [number for number in rows if number not in file.rows], parallel, client.model)
    return file


def compare(judge: Judge, ours: AnswerFile, other: AnswerFile, rows: dict[int, Line], parallel: int) -> dict[str, Any]:
    """
    Shares of the pairs that are won, lost, tied and on par, and what speaks for the judge: how often both orders gave
    the same outcome, and how often the first of two answers was preferred.
    """
    pairs, identical = [], 0
    for number, row in rows.items():
        answers = ours.rows[number]["answer"].strip(), other.rows[number]["answer"].strip()
        if answers[0] == answers[1]:
            identical += 1
        else:
            pairs.append([Pair(row["context"], row["prompt"], *order) for order in (answers, answers[::-1])])
    judge.ask([pair for both in pairs for pair in both], parallel)
    lines = [judge.verdict(pair) for both in pairs for pair in both]
    verdicts = [(first["verdict"], second["verdict"]) for first, second in zip(lines[::2], lines[1::2], strict=True)]
    judged = [both for both in verdicts if None not in both]
    total = len(judged) + identical
    if not total:
        raise ValueError(
            f"Expected verdicts of {judge.client.model}, got none in {len(lines)} replies that ends with [[A]], [[B]] "
            f"or [[tie]]; see {judge.path}, and choose another judge."
        )
    win, lose = judged.count(("A", "B")), judged.count(("B", "A"))
    agreed = win + lose + judged.count(("tie", "tie"))
    preferred = [verdict for both in judged for verdict in both if verdict != "tie"]
    return {
        "pairs": total,
        "win": win / total,
        "lose": lose / total,
        "tie": 1 - (win + lose) / total,
        "on_par": 1 - lose / total,
        "on_par_interval": wilson_interval(total - lose, total),
        "win_to_lose": win / lose if lose else None,
        "identical": identical,
        "without_verdict": len(verdicts) - len(judged),
        "both_orders_agree": agreed / len(judged) if judged else None,
        "first_preferred": preferred.count("A") / len(preferred) if preferred else None,
        "requests": sum(len(line["replies"]) for line in lines),
        "prompt_tokens": sum(line["prompt_tokens"] for line in lines),
        "completion_tokens": sum(line["completion_tokens"] for line in lines),
    }


def read_rows(data: str, ours: AnswerFile, max_rows: int | None) -> dict[int, Line]:
    """Text and prompt of the rows that are answered, by their number in the data file."""
    if (found := digest(data)) != ours.made_from["data"]:
        raise ValueError(
            f"Expected the data file that {str(ours.path)!r} answers (digest {ours.made_from['data']}), got {data!r} "
            f"(digest {found})."
        )
    dataset = load_triples(data, responses=False)
    numbers, rows = sorted(ours.rows), {}
    if max_rows is not None and max_rows < len(numbers):
        numbers = random.Random(0).sample(numbers, max_rows)
    for number in numbers:
        context, prompt = dataset[number]["context"], dataset[number]["prompt"]
        rows[number] = {"context": context if isinstance(context, str) else "\n\n".join(context), "prompt": prompt}
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="icae evaluate judge", description="Answers as a language model judges them."
    )
    endpoint: dict[str, Any] = {"nargs": 2, "metavar": ("URL", "MODEL")}
    parser.add_argument("--data", required=True, help="the Parquet file that is answered")
    parser.add_argument("--answers", type=Path, default=Path("results/answers/icae.jsonl"), help="answers in question")
    parser.add_argument(
        "--against", nargs="+", default=[], metavar="[NAME=]FILE", help="answers of others (default name: the file's)"
    )
    parser.add_argument("--answer-with", action="append", default=[], **endpoint, help="or a served model; repeatable")
    parser.add_argument("--answer-key", metavar="VARIABLE", help="environment variable with the API key for these")
    parser.add_argument(
        "--answer-options",
        type=json.loads,
        metavar="JSON",
        help="of their requests (default: temperature 0 and as many tokens as the answers in question may have)",
    )
    parser.add_argument("--judge", required=True, **endpoint, help="the judge")
    parser.add_argument("--judge-key", metavar="VARIABLE", help="environment variable with its API key")
    parser.add_argument("--judge-options", type=json.loads, default={"temperature": 0}, metavar="JSON")
    parser.add_argument(
        "--price-per-million", type=float, nargs=2, metavar=("IN", "OUT"), help="of the judge's tokens"
    )
    parser.add_argument("--max-rows", type=whole_number(1), help="compare so many, drawn at random")
    parser.add_argument("--parallel", type=whole_number(1), default=4, help="requests at once (default: 4)")
    parser.add_argument("--output", type=Path, default=Path("results/judge.json"), help="JSON file to write")
    arguments = parser.parse_args(argv)
    if not arguments.against and not arguments.answer_with:
        raise ValueError("Expected something to compare with, got nothing; name `--against` or `--answer-with`.")

    folder = arguments.output.with_suffix("")
    if folder == arguments.output:
        raise ValueError(
            f"Expected an `--output` with an ending, as `judge.json`, got {str(folder)!r}, which is the folder of its "
            "verdicts."
        )
    ours = AnswerFile(arguments.answers)
    rows = read_rows(arguments.data, ours, arguments.max_rows)
    url, model = arguments.judge
    judge = Judge(ChatClient(url, model, arguments.judge_key, arguments.judge_options), folder / "verdicts.jsonl")
    others = {}
    for argument in arguments.against:
        name, _, path = argument.rpartition("=")
        file = AnswerFile(Path(path))
        if (found := file.made_from.get("data")) != ours.made_from["data"]:
            raise ValueError(
                f"Expected in {path!r} answers to the data file that {str(ours.path)!r} answers (digest "
                f"{ours.made_from['data']}), got answers to another (digest {found})."
            )
        others[name or file.name] = file
    options = {"temperature": 0}
    if "max_new_tokens" in ours.made_from:
        options["max_tokens"] = ours.made_from["max_new_tokens"]
    for url, model in arguments.answer_with:
        client = ChatClient(url, model, arguments.answer_key, arguments.answer_options or options)
        path = folder / f"{re.sub(r'[^A-Za-z0-9.]+', '-', model)}.jsonl"
        others[model] = answer_with(client, path, rows, ours.made_from["data"], arguments.parallel)
    if len(others) < len(arguments.against) + len(arguments.answer_with):
        raise ValueError(f"Expected a name of its own for each comparison, got only {list(others)}; add `NAME=`.")
    results = {}
    for name, other in others.items():
        if missing := [number for number in rows if number not in other.rows]:
            raise ValueError(
                f"Expected answers to the same rows, got none to {len(missing)} of {len(rows)} in "
                f"{str(other.path)!r}; answer them too, or take answers to fewer rows as `--answers`."
            )
        results[name] = compare(judge, ours, other, rows, arguments.parallel)
        shown = {key: results[name][key] for key in ("win", "lose", "tie", "on_par")}
        print(f"{name:24s}", "  ".join(f"{key} {share:.1%}" for key, share in shown.items()))
    # A pair that stands in several comparisons was asked once.
    tokens = {key: sum(line[f"{key}_tokens"] for line in judge.used.values()) for key in ("prompt", "completion")}
    record = {
        "what": f"{ours.name} against other answers to the same prompts, in the eyes of a language model",
        "unit": "shares of the pairs, each judged in both orders; on par with a 95% interval (Wilson)",
        "judge": judge.client.model,
        "judge_options": judge.client.options,
        "rows": len(rows),
        "against": results,
        "judge_tokens": tokens,
        "answer_tokens": {
            model: {key: sum(others[model].rows[row][f"{key}_tokens"] for row in rows) for key in tokens}
            for _, model in arguments.answer_with
        },
    }
    if arguments.price_per_million:
        prices = dict(zip(tokens, arguments.price_per_million, strict=True))
        record["price_per_million"] = prices
        record["price"] = sum(tokens[key] * price / 1e6 for key, price in prices.items())
        print(f"price of all verdicts: {record['price']:.2f}")
    write_record(arguments.output, record, command=command_line(parser, argv))


if __name__ == "__main__":
    main()
