"""
`icae write-quotations --data FILE.parquet --output FILE.parquet`: prompts whose responses stand in the context.

Reconstruction reads a memory from its first token to its last; an answer must find its place in it first. These rows
train the finding: which words come after a quotation, which are missing in one, which sentence has these words. They
stand behind the given rows about the same context, with which they share its encoder pass in `icae sft`, and have
their other columns (a source) from the last of these.
"""

import argparse
import re
from collections.abc import Iterator
from itertools import groupby, pairwise
from typing import Any

import numpy as np
from datasets import Dataset

from icae.cli import whole_number
from icae.evaluation.triples import TEXT, check_output, load_triples


QUOTED_WORDS = (4, 8)  # of a quotation in a prompt, at least and at most
ANSWER_WORDS = (8, 32)  # that follow it
GAP_WORDS = (1, 6)  # that are missing between two of them
KEY_WORDS = 3  # that name a sentence

WORD = re.compile(r"\S+")
KEY_WORD = re.compile(r"\w{5,}")
# Whole ones: not from the middle of a word, of a number or of a line that goes on, nor up to a dot within.
SENTENCE = re.compile(r"(?:^|(?<=[.!?]\s)|(?<=\n))(?![a-z])[^\s.!?][^.!?\n]{40,240}[.!?](?!\S)")


def quotations(context: str, number: int, rng: np.random.Generator) -> Iterator[tuple[str, str]]:
    """
    Up to `number` pairs of a prompt and its response, which stands word for word in `context`. They are fewer if the
    context is short, or if a second place in it fits the prompt as well.
    """
    words = [match.span() for match in WORD.finditer(context)]
    sentences = SENTENCE.findall(context)
    least, most = np.array([QUOTED_WORDS, ANSWER_WORDS, GAP_WORDS]).T
    for kind in rng.integers(3, size=number):
        quoted, following, missing = rng.integers(least, most, endpoint=True).tolist()
        if kind == 0:
            parts = _parts(context, words, [quoted, following], rng)
            if parts:
                yield f'Which words come right after "{parts[0]}"?', parts[1]
        elif kind == 1:
            parts = _parts(context, words, [quoted, missing, quoted], rng)
            if parts:
                yield f'Which words are missing in "{parts[0]} ... {parts[2]}"?', parts[1]
        elif sentences:
            sentence = str(rng.choice(sentences))
            keys = rng.permutation(sorted({*KEY_WORD.findall(sentence)}))[:KEY_WORDS]
            # A sentence too long to be asked for, or across lines, may have all of them, too.
            if len(keys) == KEY_WORDS and min(_places(context, key) for key in keys) == 1:
                yield f"Quote the sentence with the words {', '.join(keys)}.", sentence


def _parts(context: str, words: list[tuple[int, int]], sizes: list[int], rng: np.random.Generator) -> list[str]:
    """Neighbouring parts of so many words each, from a random place; none if the first part is found twice."""
    if len(words) < sum(sizes):
        return []
    edges = np.cumsum([rng.integers(len(words) - sum(sizes), endpoint=True), *sizes])
    parts = [context[words[first][0] : words[end - 1][1]] for first, end in pairwise(edges)]
    return parts if _places(context, parts[0]) == 1 else []


def _places(context: str, part: str) -> int:
    """How often a part stands in the context; places may overlap."""
    return len(re.findall(f"(?={re.escape(part)})", context))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="icae write-quotations", description="Prompts whose responses stand in the context, beside given triples."
    )
    parser.add_argument("--data", required=True, help="Parquet file: context, prompt, response")
    parser.add_argument("--output", required=True, help="Parquet file to write: those rows and the new ones")
    parser.add_argument("--per-context", type=whole_number(1), default=2, help="new rows per context, at most")
    parser.add_argument("--seed", type=whole_number(0), default=0)
    arguments = parser.parse_args(argv)
    check_output(arguments.data, arguments.output)
    dataset = load_triples(arguments.data)
    for name in ("context", "prompt", "response"):
        if dataset.features[name] not in TEXT:
            raise ValueError(
                f"Expected contexts, prompts and responses that are text, got {name}s as {dataset.features[name]}."
            )
    others = {"rejected": None} if "rejected" in dataset.column_names else {}  # is of another prompt

    def rows() -> Iterator[dict[str, Any]]:
        for index, (context, group) in enumerate(groupby(dataset, lambda row: row["context"])):
            yield from (given := list(group))
            new = quotations(context, arguments.per_context, np.random.default_rng([arguments.seed, index]))
            yield from (given[-1] | others | {"prompt": prompt, "response": response} for prompt, response in new)

    written = Dataset.from_list(list(rows()), features=dataset.features)
    written.to_parquet(arguments.output)
    print(f"{len(written)} rows in {arguments.output}, {len(written) - len(dataset)} of them new")


if __name__ == "__main__":
    main()
