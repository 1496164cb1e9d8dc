"""
`icae evaluate reconstruction --data FILE`: how much of held-out text comes back from its slots (paper, 3.3.1).

For one or several checkpoints on the same windows: loss and teacher-forced accuracy of autoencoding, the loss of the
text that follows, both losses with another text's slots as the control, and, of what is really written out, BLEU and
the share of the context before the first wrong token (the paper's "EM"). By context length, by source, and for text
that a language model cannot guess (paper, table 3): `patterned`, every token id raised by one, and `random` token ids.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from sacrebleu.metrics import BLEU
from tqdm.auto import tqdm

from icae.cli import whole_number
from icae.evaluation.arguments import Parts, evaluation_parser, finish, identity, named_models, parse, saved_weights
from icae.evaluation.documents import (
    Window,
    add_document_arguments,
    add_window_arguments,
    batches,
    cut_windows,
    load_documents,
    split_window,
)
from icae.evaluation.measures import exact_prefix, mean, mean_interval
from icae.evaluation.readers import next_of_same_source
from icae.modeling_icae import GREEDY, ICAEForConditionalGeneration


QUICK = {"lengths": [64], "target_length": 16, "per_source": 1, "written_per_source": 1, "altered_length": 64}
DEFAULTS = {"lengths": [64, 128, 256, 512], "target_length": 32, "per_source": 4, "batch_size": 20}
TASKS = {"ae": "autoencoding", "lm": "continuation"}
WITH_INTERVAL = ("ae_loss", "exact_prefix")
DRAWS = 1000  # bootstrap samples of BLEU
Row = dict[str, Any]


def alter(windows: list[Window], kind: str, tokenizer, seed: int) -> list[Window]:
    """The windows as they are (`normal`), with every id raised by one (`patterned`), or with ids drawn at random."""
    words = np.array(sorted(set(range(len(tokenizer))) - set(tokenizer.all_special_ids)))
    rng = np.random.default_rng(seed)
    changes: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "normal": lambda ids: ids,
        "patterned": lambda ids: words[(np.searchsorted(words, ids) + 1) % len(words)],
        "random": lambda ids: rng.choice(words, len(ids)),
    }
    return [window | {"ids": changes[kind](np.array(window["ids"])).tolist()} for window in windows]


@torch.no_grad()
def read_back(
    model: ICAEForConditionalGeneration, windows: list[Window], length: int, target_length: int
) -> list[Row]:
    """
    Losses and accuracies of a batch of windows, each read from its own slots and from those of the next one of its
    source.
    """
    pairs = [split_window(window, length, target_length) for window in windows]
    ids, follows = (torch.tensor(part, device=model.memory_embeddings.device) for part in zip(*pairs, strict=True))
    memory = model.compress(ids)
    own = model(context_ids=ids, continuation_ids=follows, memory=memory)
    next_ones = memory[next_of_same_source([(window["source"], window["ids"]) for window in windows])]
    other = model(context_ids=ids, continuation_ids=follows, memory=next_ones)
    rows = []
    for index, window in enumerate(windows):
        row: Row = {"source": window["source"], "slots": int(memory.num_slots[index])}
        for short, task in TASKS.items():
            row[f"{short}_loss"] = own.token_losses[task][index].mean().item()
            row[f"{short}_loss_other_text"] = other.token_losses[task][index].mean().item()
            row[f"{short}_accuracy"] = own.token_correct[task][index].float().mean().item()
        rows.append(row)
    return rows


def write_out(
    model: ICAEForConditionalGeneration, windows: list[Window], length: int, target_length: int
) -> list[Row]:
    """What is really written from the slots of a batch of windows, beside what should be."""
    contexts = [split_window(window, length, target_length)[0] for window in windows]
    output = model.generate(contexts, task="autoencoding", max_new_tokens=length + 1, **GREEDY).tolist()
    decode = model.tokenizer.batch_decode
    texts = zip(decode(output, skip_special_tokens=True), decode(contexts, skip_special_tokens=True), strict=True)
    return [
        {"source": window["source"], "exact_prefix": exact_prefix(ids, context), "written": written, "text": text}
        for window, ids, context, (written, text) in zip(windows, output, contexts, texts, strict=True)
    ]


def evaluate(model: ICAEForConditionalGeneration, windows: list[Window], length: int, arguments) -> list[Row]:
    """The rows of all windows, and of the first ones of each source also what is written out."""
    sizes, seen, chosen = (length, arguments.target_length), Counter[str](), []
    for number, window in enumerate(windows):
        seen[window["source"]] += 1
        if seen[window["source"]] <= arguments.written_per_source:
            chosen.append(number)

    def rows_of(numbers: Sequence[int], read: Callable[..., list[Row]]) -> list[Row]:
        parts = [[windows[number] for number in batch] for batch in batches(numbers, arguments.batch_size)]
        found = [row for part in parts for row in read(model, part, *sizes)]
        return [row | {"window": number} for number, row in zip(numbers, found, strict=True)]

    return rows_of(range(len(windows)), read_back) + rows_of(chosen, write_out)


def summarize(rows: list[Row]) -> dict[str, Any]:
    """
    Means over rows, and BLEU of all that was written out (0 to 1). Intervals are drawn over windows, which may have a
    row for each of several lengths; that of BLEU (sacrebleu's) is drawn over rows, so it is left out there.
    """
    values = defaultdict(list)
    of_windows: dict[str, dict[int, list[float]]] = {name: defaultdict(list) for name in WITH_INTERVAL}
    for row in rows:
        for key, value in row.items():
            if isinstance(value, float):
                values[key].append(value)
            if key in WITH_INTERVAL:
                of_windows[key][row["window"]].append(value)
    summary: dict[str, Any] = {key: mean(found) for key, found in values.items()}
    for name, found in of_windows.items():
        if found:
            summary[f"{name}_interval"] = mean_interval([mean(same) for same in found.values()])
    summary["rows"] = len(values["ae_loss"])
    if written := [row for row in rows if "written" in row]:
        draws = DRAWS if len(written) == len({row["window"] for row in written}) > 1 else 1
        texts = [row["written"] for row in written], [[row["text"] for row in written]]
        score: Any = BLEU().corpus_score(*texts, n_bootstrap=draws)
        summary |= {"bleu": score.score / 100, "written": len(written)}
        if draws > 1:
            middle, half = score._mean / 100, score._ci / 100
            summary["bleu_interval"] = [max(0.0, middle - half), min(1.0, middle + half)]
    return summary


def summarize_by(key: str, rows: list[Row]) -> dict[str, Any]:
    """A summary for each value of `key`."""
    values = dict.fromkeys(row[key] for row in rows)
    return {str(value): summarize([row for row in rows if row[key] == value]) for value in values}


def main(argv: list[str] | None = None) -> None:
    parser = evaluation_parser(
        "evaluate reconstruction", "How much of held-out text comes back from its slots.", several_models=True
    )
    add_document_arguments(parser)
    add_window_arguments(parser)
    parser.add_argument(
        "--written-per-source", type=whole_number(0), default=4, help="windows of each that are written out"
    )
    parser.add_argument(
        "--altered-length", type=whole_number(0), default=128, help="context tokens of altered text; 0: none"
    )
    parser.set_defaults(**DEFAULTS)
    arguments = parse(parser, argv, QUICK)
    documents, about = load_documents(arguments)
    lengths, altered = arguments.lengths, arguments.altered_length
    if altered not in (0, *lengths):
        raise ValueError(f"Expected `--altered-length` to be 0 or one of the `--lengths` {lengths}, got {altered}.")
    cells = [("normal", length) for length in lengths]
    cells += [(kind, altered) for kind in ("patterned", "random") if altered]
    longest = max(lengths) + arguments.target_length
    parts = Parts(arguments)
    results: dict[str, Any] = {}
    weights: dict[str, str] = {}
    for name, model in named_models(arguments):
        weights[name] = saved_weights(model)
        windows = cut_windows(documents, model.tokenizer, longest, arguments.per_source, arguments.seed)
        rows = []
        for kind, length in tqdm(cells, desc=name):
            found = parts(
                lambda: evaluate(model, alter(windows, kind, model.tokenizer, arguments.seed), length, arguments),  # noqa: B023
                kind=kind,
                length=length,
                weights=identity(model),
                data=about,
            )
            rows += [row | {"kind": kind, "length": length} for row in found]
        normal = [row for row in rows if row["kind"] == "normal"]
        results[name] = summarize(normal) | {
            "slots": {row["length"]: row["slots"] for row in normal if "slots" in row},
            "by_length": summarize_by("length", normal),
            "by_source": summarize_by("source", normal),
            "by_text": summarize_by("kind", [row for row in rows if row["length"] == altered]),
        }
    record = {
        "what": "held-out text from its slots, beside another text's slots",
        "unit": "nats per token; shares; BLEU of 0 to 1; intervals of 95%, bootstrap over windows",
        "data": about,
        "rows": len(windows) * len(lengths),
        "context_tokens": len(windows) * sum(lengths),
        "models": results,
        "weights": weights,
    }
    finish(parser, argv, arguments, parts, record)
    for name, summary in results.items():
        for length, row in summary["by_length"].items():
            shown = [f"{key} {value:.3f}" for key, value in row.items() if isinstance(value, float)]
            print(f"{name}, {length} tokens:", "  ".join(shown))


if __name__ == "__main__":
    main()
