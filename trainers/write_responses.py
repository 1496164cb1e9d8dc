"""
`icae write-responses --data FILE.parquet --output FILE.parquet`: responses by the teacher itself.

The frozen base reads each whole context and answers the prompt; its answer takes the place of the response, for
sequence-level distillation, as PISCO does. Tuning on the result is `icae sft` as always. Other columns are kept, but
not a `rejected` response, which was rejected for the one that was replaced.

Answers that are not at their end are left out, or with `--cut` end with their last whole sentence. With
`--least-overlap` an answer takes the place of a response only if it shares so much with it: ROUGE-L, and token F1 with
responses of fewer than ten words.
"""

import argparse
import re
from itertools import chain
from typing import Any

import torch
from datasets import Dataset, Features, Value
from tqdm.auto import tqdm

from icae.cli import add_dtype_argument, load_model, whole_number
from icae.evaluation.measures import overlap
from icae.evaluation.readers import TokenReader
from icae.evaluation.triples import TEXT, check_output, load_triples
from icae.modeling_icae.chat_icae import encode_contexts


def whole_sentences(text: str) -> str:
    """The text up to the end of its last whole sentence; an empty one if it has none."""
    found = re.match(r""".*[.!?。！？]["'”’»)\]]*(?=\s|$)""", text, flags=re.DOTALL)
    return found.group() if found else ""


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="icae write-responses", description="Responses of the frozen base with the whole context."
    )
    parser.add_argument("--data", required=True, help="Parquet file: context, prompt (other columns are kept)")
    parser.add_argument("--output", required=True, help="Parquet file to write")
    parser.add_argument("--model", help="an ICAE, whose base answers (default: the embedded checkpoint)")
    parser.add_argument("--base", help="its base, if not where the ICAE says")
    add_dtype_argument(parser)
    parser.add_argument("--max-new-tokens", type=whole_number(1), default=128)
    parser.add_argument("--batch-size", type=whole_number(1), default=8)
    parser.add_argument("--cut", action="store_true", help="end answers of full length with their last whole sentence")
    parser.add_argument("--least-overlap", type=float, help="with the row's response, which else stays (from 0 to 1)")
    arguments = parser.parse_args(argv)
    check_output(arguments.data, arguments.output)
    least = arguments.least_overlap
    if least is not None and not 0 <= least <= 1:
        raise ValueError(f"Expected a `--least-overlap` from 0 to 1, got {least}.")
    dataset = load_triples(arguments.data, responses=least is not None)
    if least is not None:
        import rouge_score  # noqa: F401 (of the extra `eval`: it should not be missed after the hours that answers take)

        if dataset.features["response"] not in TEXT:
            raise ValueError(f"Expected responses that are text, got {dataset.features['response']}; decode them.")
    model = load_model(arguments.model, arguments.base, arguments.dtype)
    room = model._num_positions - len(model._prefix("instruction")) - arguments.max_new_tokens  # context and prompt
    teacher = TokenReader(model.language_model, model, lambda ids: ids)

    def answer(batch: list[dict[str, Any]]) -> list[str | None]:
        """The texts that may be taught, "" where there is none; None for rows that are too long."""
        contexts = [[*chain(*encode_contexts(model.tokenizer, row["context"]))] for row in batch]
        prompts = model.encode_prompts([row["prompt"] for row in batch])
        pairs = zip(contexts, prompts, strict=True)
        rows = [{"context_ids": context, "prompt_ids": prompt} for context, prompt in pairs]
        fits = [sum(map(len, row.values())) <= room for row in rows]
        if not any(fits):
            return [None] * len(rows)
        fitting = [row for row, fit in zip(rows, fits, strict=True) if fit]
        answers = teacher.answer_ids(fitting, arguments.max_new_tokens)
        texts = model.tokenizer.batch_decode(answers, skip_special_tokens=True)
        unfinished = whole_sentences if arguments.cut else lambda text: ""
        at_end = [len(ids) < arguments.max_new_tokens for ids in answers]
        written = iter([text if end else unfinished(text) for text, end in zip(texts, at_end, strict=True)])
        return [next(written) if fit else None for fit in fits]

    no_pair = {"rejected": None} if "rejected" in dataset.column_names else {}
    kept, taught, too_long = [], 0, 0
    # Not `map`, which would pickle the model to know its function again.
    for first in tqdm(range(0, len(dataset), arguments.batch_size)):
        batch = dataset.select(range(first, min(first + arguments.batch_size, len(dataset)))).to_list()
        for row, written in zip(batch, answer(batch), strict=True):
            too_long += written is None
            if written and (least is None or overlap(written, row["response"]) >= least):
                kept.append(row | no_pair | {"response": written})
                taught += 1
            elif least is not None:
                kept.append(row)
    if not kept:
        raise ValueError(
            f"Expected answers that come to their end within {arguments.max_new_tokens} tokens, got none for "
            f"{len(dataset)} rows; raise `--max-new-tokens`, or `--cut` the others."
        )
    features = Features(dataset.features | {"response": Value("string")})
    Dataset.from_list(kept, features=features).to_parquet(arguments.output)
    others = len(dataset) - taught
    if least is None:
        how = "without a whole sentence" if arguments.cut else "not at its end"
        rest = f"left out are {others} rows whose answer was empty or {how} after {arguments.max_new_tokens} tokens"
    else:
        rest = f"{others} rows beside them keep theirs"
    too_long_for = f"; {too_long} of them are too long for the base" if too_long else ""
    print(f"{taught} responses in {arguments.output}; {rest}{too_long_for}")


if __name__ == "__main__":
    main()
