"""
`icae evaluate probes`: which facts survive compression — numbers, names, dates, rare words, negations, order.

Facts of generated texts ([`icae.evaluation.facts`]) are asked for and, with `--data`, facts of real ones
([`icae.evaluation.text_facts`]). The main measure is a choice: is the true answer more likely than the same sentence
with another value? Chance is exactly 50%, also for a reader with habits, because every text has a twin with the facts
exchanged. More sensitive is whether a reader tells a text from its twin, whatever it likes to say: are the true
answers of both together likelier than the false ones? Chance is 50% again. And for some of the generated texts: is the
true value in what is really answered, and the false one not?

Read are the slots, and by the frozen base the full context, as many of its first tokens as there are slots, and no
context.
"""

from typing import Any

from datasets import Dataset
from tqdm.auto import tqdm

from icae.cli import whole_number
from icae.evaluation.arguments import Parts, evaluation_parser, finish, named_models, parse, weights_of
from icae.evaluation.documents import add_document_arguments, cut_windows, load_documents
from icae.evaluation.facts import Pair, Probe, make_pair
from icae.evaluation.measures import mean, normalize, wilson_interval
from icae.evaluation.readers import Reader, Row, SlotReader, TokenReader, number_of_slots
from icae.evaluation.text_facts import make_text_pairs
from icae.modeling_icae import ICAEForConditionalGeneration
from icae.modeling_icae.chat_icae import encode_plain


QUICK = {"pairs": 1, "answered_pairs": 0, "per_kind": 1, "length": 64}
ANSWER_LENGTH = 24  # tokens


def readers(model: ICAEForConditionalGeneration) -> dict[str, Reader]:
    """What is compared, by name."""
    base = model.language_model
    return {
        "icae": SlotReader(model),
        "full context": TokenReader(base, model, lambda ids: ids),
        "truncated context": TokenReader(base, model, lambda ids: ids[: number_of_slots(model, ids)]),
        "no context": TokenReader(base, model, lambda ids: []),
    }


def encode(model: ICAEForConditionalGeneration, text: str, probes: list[Probe]) -> list[Row]:
    """Two rows for each probe: the true answer, then the false one."""
    (context,) = encode_plain(model.tokenizer, [text])
    rows = []
    for probe in probes:
        (prompt,) = model.encode_prompts([probe.question])
        responses = model.encode_responses(list(probe.answers))
        rows += [{"context_ids": context, "prompt_ids": prompt, "response_ids": ids} for ids in responses]
    return rows


def margins(reader: Reader, rows: list[Row]) -> list[float]:
    """For each probe, by how many nats its true answer is more likely than the false one."""
    totals = [nats.sum().item() for nats in reader.nats(rows)]
    return [false - true for true, false in zip(totals[::2], totals[1::2], strict=True)]


def is_positive(margin: float) -> float:
    """1 or 0; half for a tie."""
    return 0.5 if margin == 0 else float(margin > 0)


def is_right(answer: str, probe: Probe) -> bool:
    """Whether the true value is among the words of an answer, and the false one is not."""
    words = f" {normalize(answer)} "
    true, false = (f" {normalize(value)} " in words for value in probe.values)
    return true and not false


def real_pairs(documents: Dataset | None, model: ICAEForConditionalGeneration, arguments) -> list[Pair]:
    """Pairs of passages of the documents, if there are any."""
    if documents is None or not arguments.per_kind:
        return []
    windows = cut_windows(documents, model.tokenizer, arguments.length, 2 * arguments.per_kind, arguments.seed)
    passages = model.tokenizer.batch_decode([window["ids"] for window in windows])
    sources = [window["source"] for window in windows]
    return make_text_pairs(list(zip(passages, sources, strict=True)), arguments.per_kind, arguments.seed)


def measure(
    reader: Reader, model: ICAEForConditionalGeneration, pairs: list[Pair], arguments, name: str
) -> list[dict[str, Any]]:
    """
    For each probe: its kind, whether the true answer is likelier, and for some whether what is written is right. For
    each probe of the first text of a pair also whether both texts are told apart.
    """
    rows = []
    for number, pair in enumerate(tqdm(pairs, desc=name)):
        probes = [probe for _, probes in pair for probe in probes]
        encoded = [row for text, probes in pair for row in encode(model, text, probes)]
        found_margins = margins(reader, encoded)
        found: list[dict[str, Any]] = [
            {"kind": probe.kind, "chosen": is_positive(margin)}
            for probe, margin in zip(probes, found_margins, strict=True)
        ]
        half = len(found) // 2
        for row, one, other in zip(found[:half], found_margins[:half], found_margins[half:], strict=True):
            row["told_apart"] = is_positive(one + other)
        if number < min(arguments.answered_pairs, arguments.pairs):
            answers = reader.answers(encoded[::2], ANSWER_LENGTH)
            for row, probe, answer in zip(found, probes, answers, strict=True):
                row["answered"] = is_right(answer, probe)
        rows += found
    return rows


def summarize(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Shares of right probes by kind, and of all."""
    summary = {}
    for kind in [*dict.fromkeys(row["kind"] for row in rows), "all"]:
        found = [row for row in rows if kind in (row["kind"], "all")]
        chosen = [row["chosen"] for row in found]
        apart = [row["told_apart"] for row in found if "told_apart" in row]
        summary[kind] = {
            "accuracy": mean(chosen),
            "interval": wilson_interval(sum(chosen), len(chosen)),
            "probes": len(chosen),
            "told_apart": mean(apart),
            "told_apart_interval": wilson_interval(sum(apart), len(apart)),
        }
        if answered := [row["answered"] for row in found if "answered" in row]:
            summary[kind] |= {"answered_right": sum(answered) / len(answered), "answered": len(answered)}
    return summary


def main(argv: list[str] | None = None) -> None:
    parser = evaluation_parser("evaluate probes", "Which facts survive compression.", several_models=True)
    add_document_arguments(parser)
    parser.add_argument("--pairs", type=whole_number(1), default=50, help="generated texts, each with its twin")
    parser.add_argument(
        "--answered-pairs", type=whole_number(0), default=8, help="of these, how many are really answered"
    )
    parser.add_argument("--per-kind", type=whole_number(0), default=30, help="real texts for each kind of fact")
    parser.add_argument("--length", type=whole_number(1), default=128, help="tokens of a real text")
    arguments = parse(parser, argv, QUICK)
    generated = [make_pair(arguments.seed + number) for number in range(arguments.pairs)]
    documents, about = load_documents(arguments) if arguments.data or arguments.quick else (None, None)
    parts = Parts(arguments)
    results: dict[str, Any] = {}
    for name, model in named_models(arguments):
        pairs = generated + real_pairs(documents, model, arguments)
        contexts = encode_plain(model.tokenizer, [text for pair in pairs for text, _ in pair])
        slots = [number_of_slots(model, ids) for ids in contexts]
        found = {
            reading: parts(
                lambda: measure(reader, model, pairs, arguments, f"{name}, {reading}"),  # noqa: B023
                reader=reading,
                slots=slots,
                weights=weights_of(reader, model),
                data=about,
            )
            for reading, reader in readers(model).items()
        }
        results[name] = {"slots": sum(slots), "readers": {reading: summarize(rows) for reading, rows in found.items()}}
    record = {
        "what": "facts of texts: is the true answer likelier than the same with another value? chance 50%",
        "unit": "share of the probes that are right, with 95% intervals (Wilson, as if all probes were independent)",
        "data": about,
        "texts": len(contexts),
        "context_tokens": sum(map(len, contexts)),
        "examples": [
            {"text": text, "probes": [vars(probe) for probe in probes]} for text, probes in (pairs[0][0], pairs[-1][0])
        ],
        "models": results,
    }
    finish(parser, argv, arguments, parts, record)
    for name, result in results.items():
        for reading, kinds in result["readers"].items():
            shown = [f"{kind} {row['accuracy']:.0%}" for kind, row in kinds.items()]
            print(f"{name}, {reading}:", "  ".join(shown))


if __name__ == "__main__":
    main()
