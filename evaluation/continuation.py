"""
`icae evaluate continuation --data FILE`: how well held-out text goes on from slots (paper, table 1).

The loss of the tokens that follow a context, read from

- `icae`: the memory of the context, behind the `[LM]` token;
- `another text's slots`: the control, a text of the same source — as good as `icae`, and the slots are not read;
- `full context`: the frozen base with the context itself;
- `last tokens`: the frozen base with as many tokens from the end of the context as there are slots;
- `no context`: the frozen base with neither.
"""

import math
from collections import defaultdict
from typing import Any

from tqdm.auto import tqdm

from icae.evaluation.arguments import Parts, evaluation_parser, finish, named_models, parse, weights_of
from icae.evaluation.documents import (
    Window,
    add_document_arguments,
    add_window_arguments,
    batches,
    cut_windows,
    load_documents,
    split_window,
)
from icae.evaluation.measures import mean, mean_interval
from icae.evaluation.readers import Reader, SlotReader, TokenReader, number_of_slots
from icae.modeling_icae import ICAEForConditionalGeneration


QUICK = {"lengths": [64], "target_length": 16, "per_source": 1}


def readers(model: ICAEForConditionalGeneration) -> dict[str, Reader]:
    """What is compared, by name."""
    base, task = model.language_model, "continuation"
    return {
        "icae": SlotReader(model, task),
        "another text's slots": SlotReader(model, task, other_text=True),
        "full context": TokenReader(base, model, lambda ids: ids, task),
        "last tokens": TokenReader(base, model, lambda ids: ids[-number_of_slots(model, ids) :], task),
        "no context": TokenReader(base, model, lambda ids: [], task),
    }


def evaluate(reader: Reader, windows: list[Window], length: int, target_length: int, batch_size: int) -> list[float]:
    """Mean nats per target token of each window, with a context of `length` tokens."""
    rows = []
    for window in windows:
        context, targets = split_window(window, length, target_length)
        rows.append({"context_ids": context, "prompt_ids": [], "response_ids": targets, "source": window["source"]})
    return [loss for batch in batches(rows, batch_size) for loss in reader.losses(batch)]


def summarize(losses: list[float], windows: list[Window]) -> dict[str, Any]:
    """Loss and perplexity over all windows, and the perplexity of each source."""
    by_source = defaultdict(list)
    for window, loss in zip(windows, losses, strict=True):
        by_source[window["source"]].append(loss)
    return {
        "nats": mean(losses),
        "nats_interval": mean_interval(losses),
        "perplexity": math.exp(mean(losses)),
        "perplexity_by_source": {source: math.exp(mean(found)) for source, found in sorted(by_source.items())},
    }


def compare(losses: list[float], full: list[float]) -> dict[str, Any]:
    """How much higher a perplexity is than that of the full context, on the same windows."""
    worse = [one - other for one, other in zip(losses, full, strict=True)]
    return {
        "perplexity_increase_percent": 100 * math.expm1(mean(worse)),
        "perplexity_increase_percent_interval": [100 * math.expm1(bound) for bound in mean_interval(worse)],
    }


def main(argv: list[str] | None = None) -> None:
    parser = evaluation_parser(
        "evaluate continuation", "How well held-out text goes on from slots.", several_models=True
    )
    add_document_arguments(parser)
    add_window_arguments(parser)
    arguments = parse(parser, argv, QUICK)
    documents, about = load_documents(arguments)
    parts, targets = Parts(arguments), arguments.target_length
    results: dict[str, Any] = {}
    for name, model in named_models(arguments):
        longest = max(arguments.lengths) + targets
        windows = cut_windows(documents, model.tokenizer, longest, arguments.per_source, arguments.seed)
        results[name] = {}
        for length in tqdm(arguments.lengths, desc=name):
            slots = number_of_slots(model, [0] * length)
            losses = {
                condition: parts(
                    lambda: evaluate(reader, windows, length, targets, arguments.batch_size),  # noqa: B023
                    condition=condition,
                    length=length,
                    slots=slots,
                    weights=weights_of(reader, model),
                    data=about,
                )
                for condition, reader in readers(model).items()
            }
            results[name][length] = {"slots": slots} | {
                condition: summarize(found, windows) | compare(found, losses["full context"])
                for condition, found in losses.items()
            }
    record = {
        "what": "loss of the text that follows a context; the same targets at every context length",
        "unit": "nats per target token; intervals of 95%, bootstrap over windows",
        "data": about,
        "rows": len(windows),
        "target_tokens": len(windows) * targets,
        "models": results,
    }
    finish(parser, argv, arguments, parts, record)
    for name, lengths in results.items():
        for length, row in lengths.items():
            shown = [f"{key} {row[key]['perplexity']:.2f}" for key in readers(model)]
            print(f"{name}, {length} tokens in {row['slots']} slots: perplexity", "  ".join(shown))


if __name__ == "__main__":
    main()
