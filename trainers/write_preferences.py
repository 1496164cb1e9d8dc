"""
`icae write-preferences --data FILE.parquet --output FILE.parquet`: pairs of a model's own better and worse answers.

The model answers each prompt from the slots of its context, greedily and a few times by chance. Of these answers, the
one that overlaps most with the response of the row is preferred to the greedy one or, where the greedy one is as good,
to the one that overlaps least. Tuning on both (`icae sft --preference_weight`) teaches what tuning on responses alone
cannot: not to say what the model itself would say wrongly, such as the same words again and again.

The pairs are rows of their own behind those of the data, with which they share an encoder pass in tuning. Their
responses are token ids as they were written; one that was not at its end has no end token, and so none is trained.
Rows that are too long for the base to answer are left out, and counted.

Overlap is ROUGE-L, and token F1 with responses of less than ten words.
"""

import argparse
from typing import Any

import torch
from datasets import Dataset, Features
from tqdm.auto import tqdm

from icae.cli import add_dtype_argument, load_model, whole_number
from icae.evaluation.measures import overlap
from icae.evaluation.triples import check_output, load_triples
from icae.modeling_icae import GREEDY, ICAEForConditionalGeneration
from icae.modeling_icae.chat_icae import encode_contexts, encode_response

from .pretraining_data import IDS
from .sft_data import positions_taken


def answers(model: ICAEForConditionalGeneration, rows: list[dict[str, Any]], **sampling: Any) -> list[list[list[int]]]:
    """For each row, the token ids of its greedy answer and of `num_return_sequences` others, each with its end."""
    memory = model.compress([row["context"] for row in rows])
    prompts, length = [row["prompt"] for row in rows], sampling.pop("max_new_tokens")
    greedy = model.generate(memory=memory, prompt=prompts, max_new_tokens=length, **GREEDY)
    how = GREEDY | {"do_sample": True, "top_k": 0} | sampling
    others = model.generate(memory=memory, prompt=prompts, max_new_tokens=length, **how)

    def ended(ids: list[int]) -> list[int]:
        ends = [place for place, token in enumerate(ids) if token in model.end_token_ids]
        return ids[: ends[0] + 1] if ends else ids

    samples = others.view(len(rows), -1, others.shape[1])
    return [[ended(ids.tolist()) for ids in (first, *more)] for first, more in zip(greedy, samples, strict=True)]


def better_and_worse(overlaps: list[float], least_gap: float) -> tuple[int, int] | None:
    """Which of several answers, the greedy one first, to prefer to which; none if they overlap alike."""
    better, worse = max(range(len(overlaps)), key=overlaps.__getitem__), 0
    if overlaps[better] - overlaps[0] < least_gap:
        worse = min(range(len(overlaps)), key=overlaps.__getitem__)
    return (better, worse) if overlaps[better] - overlaps[worse] >= least_gap else None


def load_rows(file: str) -> Dataset:
    """
    Triples of which pairs can be made.

    Raises:
        `ValueError`: if they have a column `rejected`, or a row without a prompt or response.
    """
    dataset = load_triples(file)
    if "rejected" in dataset.column_names:
        raise ValueError(
            "Expected rows without a column `rejected`, which is to be written, got one; remove it, or join its rows "
            "with those of the output."
        )
    for index, row in enumerate(dataset.select_columns(["prompt", "response"])):
        if not isinstance(row["response"], str) or not row["response"] or not row["prompt"]:
            raise ValueError(
                f"Expected a prompt and a response of at least one letter, got {row} in row {index}; filter the rows."
            )
    return dataset


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="icae write-preferences",
        description="Pairs of a model's own better and worse answers, beside given rows.",
    )
    parser.add_argument("--data", required=True, help="Parquet file: context, prompt, response")
    parser.add_argument("--output", required=True, help="Parquet file to write: those rows and the pairs")
    parser.add_argument("--model", help="the ICAE that answers (default: the embedded checkpoint)")
    parser.add_argument("--base", help="its base, if not where the ICAE says")
    add_dtype_argument(parser)
    parser.add_argument("--samples", type=whole_number(1), default=4, help="answers by chance, beside the greedy one")
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--least-gap", type=float, default=0.08, help="of overlap, above 0; others make no pair")
    parser.add_argument("--max-new-tokens", type=whole_number(1), default=48)
    parser.add_argument("--batch-size", type=whole_number(1), default=6, help="prompts answered at once")
    parser.add_argument("--seed", type=whole_number(0), default=0)
    arguments = parser.parse_args(argv)
    check_output(arguments.data, arguments.output)
    import rouge_score  # noqa: F401 (of the extra `eval`: it should not be missed after the hours that answers take)

    if not 0 < arguments.least_gap <= 1:
        raise ValueError(f"Expected a `--least-gap` above 0 and at most 1, got {arguments.least_gap}.")
    if arguments.temperature <= 0 or not 0 < arguments.top_p <= 1:
        raise ValueError(
            "Expected a `--temperature` above 0 and a `--top-p` above 0 and at most 1, got "
            f"{arguments.temperature} and {arguments.top_p}."
        )
    given = load_rows(arguments.data)
    model = load_model(arguments.model, arguments.base, arguments.dtype)
    prefix_length = len(model._prefix("instruction"))

    def can_be_answered(row: dict[str, Any]) -> bool:
        lengths = [len(ids) for ids in encode_contexts(model.tokenizer, row["context"])]
        behind = len(model.encode_prompts(row["prompt"])[0]) + arguments.max_new_tokens
        return positions_taken(model.config, prefix_length, lengths) + behind <= model._num_positions

    dataset = given.select([index for index, row in enumerate(given) if can_be_answered(row)])
    if not len(dataset):
        raise ValueError(f"Expected rows that the base has positions for, got {len(given)} that are too long.")
    torch.manual_seed(arguments.seed)
    sampling = {
        "num_return_sequences": arguments.samples,
        "temperature": arguments.temperature,
        "top_p": arguments.top_p,
        "max_new_tokens": arguments.max_new_tokens,
    }
    written = []
    for first in tqdm(range(0, len(dataset), arguments.batch_size)):
        batch = dataset.select(range(first, min(first + arguments.batch_size, len(dataset)))).to_list()
        for row, found in zip(batch, answers(model, batch, **sampling), strict=True):
            response = encode_response(model.tokenizer, row["response"], model.end_token_ids)
            written.append(row | {"response": response, "rejected": None})
            texts = model.tokenizer.batch_decode(found, skip_special_tokens=True)
            pair = better_and_worse([overlap(text, row["response"]) for text in texts], arguments.least_gap)
            if pair is not None:
                better, worse = pair
                written.append(row | {"response": found[better], "rejected": found[worse]})
    features = Features(dataset.features | {"response": IDS, "rejected": IDS})
    Dataset.from_list(written, features=features).to_parquet(arguments.output)
    print(
        f"{len(written)} rows in {arguments.output}, {len(written) - len(dataset)} of them pairs; left out are "
        f"{len(given) - len(dataset)} rows that are too long for the base"
    )


if __name__ == "__main__":
    main()
