"""
`icae write-responses --data FILE.parquet --output FILE.parquet`: responses by the teacher itself.

The frozen base reads each whole context and answers the prompt; its answer takes the place of the response, for
sequence-level distillation, as PISCO does. Tuning on the result is `icae sft` as always.

Answers that are not at their end are left out, or with `--cut` end with their last whole sentence. With
`--least-overlap` an answer takes the place of a response only if it shares so much with it: ROUGE-L, and token F1 with
responses of fewer than ten words.
"""

import argparse
import re
from itertools import chain

import torch

from icae.cli import add_dtype_argument, load_model, whole_number
from icae.evaluation.measures import overlap
from icae.evaluation.readers import TokenReader
from icae.evaluation.triples import TEXT, check_other_file, load_triples
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
    check_other_file(arguments.data, arguments.output)
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

    def answer(batch: dict[str, list]) -> dict[str, list]:
        contexts = [[*chain(*encode_contexts(model.tokenizer, context))] for context in batch["context"]]
        prompts = model.encode_prompts(batch["prompt"])
        pairs = zip(contexts, prompts, strict=True)
        rows = [{"context_ids": context, "prompt_ids": prompt} for context, prompt in pairs]
        fits = [sum(map(len, row.values())) <= room for row in rows]
        if not any(fits):
            return {"written": [""] * len(rows), "fits": fits}
        fitting = [row for row, fit in zip(rows, fits, strict=True) if fit]
        answers = teacher.answer_ids(fitting, arguments.max_new_tokens)
        texts = model.tokenizer.batch_decode(answers, skip_special_tokens=True)
        unfinished = whole_sentences if arguments.cut else lambda text: ""
        at_end = [len(ids) < arguments.max_new_tokens for ids in answers]
        written = iter([text if end else unfinished(text) for text, end in zip(texts, at_end, strict=True)])
        return {"written": [next(written) if fit else "" for fit in fits], "fits": fits}

    def teach(row: dict[str, str]) -> dict[str, str | bool]:
        written = row["written"]
        taught = written != "" and (least is None or overlap(written, row["response"]) >= least)
        return {"response": written if taught or least is None else row["response"], "taught": taught}

    answered = dataset.map(answer, batched=True, batch_size=arguments.batch_size, load_from_cache_file=False)
    too_long = len(answered) - sum(answered["fits"])
    answered = answered.map(teach, remove_columns=["written", "fits"], load_from_cache_file=False)
    taught = answered.filter(bool, input_columns=["taught"])
    written = taught if least is None else answered
    if not len(written):
        raise ValueError(
            f"Expected answers that come to their end within {arguments.max_new_tokens} tokens, got none for "
            f"{len(answered)} rows; raise `--max-new-tokens`, or `--cut` the others."
        )
    written.remove_columns("taught").to_parquet(arguments.output)
    others = len(answered) - len(taught)
    if least is None:
        how = "without a whole sentence" if arguments.cut else "not at its end"
        rest = f"left out are {others} rows whose answer was empty or {how} after {arguments.max_new_tokens} tokens"
    else:
        rest = f"{others} rows beside them keep theirs"
    too_long_for = f"; {too_long} of them are too long for the base" if too_long else ""
    print(f"{len(taught)} responses in {arguments.output}; {rest}{too_long_for}")


if __name__ == "__main__":
    main()
