"""Measures of answers: token F1 and exact match as SQuAD defines them (arXiv 1606.05250), and ROUGE; intervals."""

import math
import re
import string
from collections import Counter
from collections.abc import Sequence

import numpy as np


ROUGE = ("rouge1", "rouge2", "rougeL")
SHORT_ANSWERS = 10  # words; sources whose references are shorter on average count as short-answer sources


def normalize(text: str) -> str:
    """Lower case without punctuation, articles and double blanks (SQuAD's evaluation script)."""
    text = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(answer: str, reference: str) -> float:
    """1 if both are the same after normalisation."""
    return float(normalize(answer) == normalize(reference))


def token_f1(answer: str, reference: str) -> float:
    """Harmonic mean of precision and recall over the words of both, counted with their number."""
    found, expected = normalize(answer).split(), normalize(reference).split()
    if not found or not expected:
        return float(found == expected)
    common = sum((Counter(found) & Counter(expected)).values())
    return 2 * common / (len(found) + len(expected))


def overlap(answer: str, reference: str) -> float:
    """ROUGE-L, or token F1 with references of fewer than ten words; from 0 to 1."""
    if len(reference.split()) < SHORT_ANSWERS:
        return token_f1(answer, reference)
    from rouge_score.rouge_scorer import RougeScorer  # the trainers do without

    return RougeScorer(["rougeL"], use_stemmer=True).score(reference, answer)["rougeL"].fmeasure


def scores(answer: str, reference: str) -> dict[str, float]:
    """All measures of one answer, each from 0 to 1."""
    from rouge_score.rouge_scorer import RougeScorer  # the trainers do without

    rouge = RougeScorer(ROUGE, use_stemmer=True).score(reference, answer)
    return {
        "f1": token_f1(answer, reference),
        "exact_match": exact_match(answer, reference),
        **{name: rouge[name].fmeasure for name in ROUGE},
    }


def wilson_interval(right: float, total: int) -> list[float]:
    """Bounds of a share with 95% confidence (Wilson's score interval; `right` may count ties as halves)."""
    z = 1.96
    share, spread = right / total, z / (2 * total)
    middle, half = share + z * spread, z * math.sqrt(share * (1 - share) / total + spread**2)
    return [(middle - half) / (1 + z * z / total), (middle + half) / (1 + z * z / total)]


def mean_interval(values: Sequence[float], seed: int = 0, draws: int = 2000) -> list[float]:
    """Bounds of a mean with 95% confidence (percentile bootstrap over the values)."""
    numbers = np.asarray(values)
    means = np.random.default_rng(seed).choice(numbers, (draws, len(numbers))).mean(axis=1)
    return [float(bound) for bound in np.quantile(means, (0.025, 0.975))]


def exact_prefix(written: Sequence[int], context: Sequence[int]) -> float:
    """Share of a context that stands before the first wrong token of what was written (the paper's "EM")."""
    same = [left == right for left, right in zip(written, context, strict=False)]
    return (same.index(False) if False in same else len(same)) / len(context)


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean."""
    return sum(values) / len(values)
