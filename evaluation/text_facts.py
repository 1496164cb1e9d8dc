"""
Facts of real text, found by rule, and what tells whether a reader knows them.

A value in a passage — a number, a year, a capitalised word, a long word, a "not" — is exchanged for one of the same
kind from another passage of the same source, which makes the passage's **twin**. Both are read, and of both is asked
which of two phrases stands in it. As with the texts of [`icae.evaluation.facts`], a reader that sees neither is right
in exactly half of them.
"""

import random
import re
from collections import Counter

from icae.evaluation.facts import Pair, Probe


QUESTION = "Which phrase stands in the text?"
VERBS = "is are was were do does did has have had can could will would should".split()
PATTERNS = {
    "numbers": r"(?<![\d.,])(?!1[5-9]\d\d\b|20\d\d\b)\d{2,6}\b(?![.,]\d)",
    "years": r"(?<![\d.,])(?:1[5-9]|20)\d\d\b(?![.,]\d)",
    "capitalised words": r"(?<=[a-z,;] )[A-Z][a-z]{2,}\b",
    "long words": r"\b[a-z]{7,}\b",
    "negations": "(?:" + "|".join(rf"(?<=\b{verb} )" for verb in VERBS) + ")not ",
}
WORDS_BEFORE, WORDS_BEHIND = 6, 3  # of a phrase, around the value


def make_text_pairs(passages: list[tuple[str, str]], per_kind: int, seed: int) -> list[Pair]:
    """
    Pairs of a passage and its twin with one probe each, up to `per_kind` of every kind in `PATTERNS`.

    Passages are pairs of a text and its source. Capitalised words are left out if they also stand in small letters,
    long ones if they stand anywhere else.
    """
    rng = random.Random(seed)
    found = {
        kind: [(text, source, match) for text, source in passages for match in re.finditer(pattern, text)]
        for kind, pattern in PATTERNS.items()
    }
    seen = Counter(word for text, _ in passages for word in re.findall(r"\w+", text))
    allowed = {"capitalised words": lambda word: not seen[word.lower()], "long words": lambda word: seen[word] == 1}
    for kind, allow in allowed.items():
        found[kind] = [value for value in found[kind] if allow(value[2][0])]
    pairs = []
    for kind, values in found.items():
        taken: set[str] = set()
        rng.shuffle(values)
        for text, source, match in values:
            # Without "not", a passage says the opposite; all other values give way to another one.
            others = [other[0] for _, where, other in values if where == source and other[0] not in text]
            if kind == "negations":
                others = [""]
            once = len(re.findall(rf"\b{re.escape(match[0])}", text)) == 1
            if text in taken or not others or not (once or kind == "negations") or len(taken) == per_kind:
                continue
            taken.add(text)
            pairs.append(_make_pair(kind, text, match, rng.choice(others)))
    return pairs


def _make_pair(kind: str, text: str, match: re.Match, other: str) -> Pair:
    (before,) = re.findall(rf"(?:\S+\s+){{0,{WORDS_BEFORE}}}\S*$", text[: match.start()])[:1]
    (behind,) = re.findall(rf"^\S*(?:\s+\S+){{0,{WORDS_BEHIND}}}", text[match.end() :])
    answers = (before + match[0] + behind).strip(), (before + other + behind).strip()
    probe = Probe(f"{kind}, real text", QUESTION, answers, (match[0].strip(), other))
    twin = text[: match.start()] + other + text[match.end() :]
    return [(text, [probe]), (twin, [probe.reversed()])]
