"""Measures of answers: token F1 and exact match as SQuAD defines them (arXiv 1606.05250), and ROUGE."""

import re
import string
from collections import Counter


ROUGE = ("rouge1", "rouge2", "rougeL")


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


def scores(answer: str, reference: str) -> dict[str, float]:
    """All measures of one answer, each from 0 to 1."""
    from rouge_score.rouge_scorer import RougeScorer  # the trainers do without

    rouge = RougeScorer(ROUGE, use_stemmer=True).score(reference, answer)
    return {
        "f1": token_f1(answer, reference),
        "exact_match": exact_match(answer, reference),
        **{name: rouge[name].fmeasure for name in ROUGE},
    }
