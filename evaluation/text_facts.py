"""
Facts of real text, found by rule, and what tells whether a reader knows them.

A value in a passage — a number, a year, a name, a rare word, a "not" — is exchanged for one of the same kind from
another passage, which makes the passage's **twin**. Both are read, and of both is asked which of two phrases stands in
it. As with the texts of [`icae.evaluation.facts`], a reader that sees neither is right in exactly half of them.
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
    "names": r"(?<=[a-z,;] )[A-Z][a-z]{2,}\b",
    "rare words": r"\b[a-z]{7,}\b",
    "negations": "(?:" + "|".join(rf"(?<=\b{verb} )" for verb in VERBS) + ")not ",
}
WORDS_BEFORE, WORDS_BEHIND = 6, 3  # of a phrase, around the value


def make_text_pairs(passages: list[str], per_kind: int, seed: int) -> list[Pair]:
    """Pairs of a passage and its twin with one probe each, up to `per_kind` of every kind in `PATTERNS`."""
    rng = random.Random(seed)
    found = {
        kind: [(text, match) for text in passages for match in re.finditer(pattern, text)]
        for kind, pattern in PATTERNS.items()
    }
    seen = Counter(match[0] for text in passages for match in re.finditer(PATTERNS["rare words"], text))
    found["rare words"] = [(text, match) for text, match in found["rare words"] if seen[match[0]] == 1]
    pairs = []
    for kind, values in found.items():
        taken: set[str] = set()
        rng.shuffle(values)
        for text, match in values:
            # Without "not", a passage says the opposite; all other values give way to another one.
            others = [other[0] for _, other in values if other[0] not in text] if kind != "negations" else [""]
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
