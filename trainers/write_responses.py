"""
`icae write-responses --data FILE.parquet --output FILE.parquet`: responses by the teacher itself.

The frozen base reads each whole context and answers the prompt; its answer takes the place of the response, for
sequence-level distillation, as PISCO does. Tuning on the result is `icae sft` as always.
"""

import argparse
from itertools import chain

import torch
from datasets import load_dataset

from icae.cli import add_dtype_argument, load_model
from icae.evaluation.readers import TokenReader
from icae.modeling_icae.chat_icae import encode_contexts


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Responses of the frozen base with the whole context.")
    parser.add_argument("--data", required=True, help="Parquet file: context, prompt (other columns are kept)")
    parser.add_argument("--output", required=True, help="Parquet file to write")
    parser.add_argument("--model", help="an ICAE, whose base answers (default: the embedded checkpoint)")
    parser.add_argument("--base", help="its base, if not where the ICAE says")
    add_dtype_argument(parser)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=8)
    arguments = parser.parse_args(argv)
    model = load_model(arguments.model, arguments.base, arguments.dtype)
    teacher = TokenReader(model.language_model, model, lambda ids: ids)

    def answer(batch: dict[str, list]) -> dict[str, list]:
        contexts = [[*chain(*encode_contexts(model.tokenizer, context))] for context in batch["context"]]
        prompts = model.encode_prompts(batch["prompt"])
        pairs = zip(contexts, prompts, strict=True)
        rows = [{"context_ids": context, "prompt_ids": prompt} for context, prompt in pairs]
        answers = teacher.answer_ids(rows, arguments.max_new_tokens)
        return {
            "response": model.tokenizer.batch_decode(answers, skip_special_tokens=True),
            "complete": [0 < len(ids) < arguments.max_new_tokens for ids in answers],
        }

    dataset = load_dataset("parquet", data_files=arguments.data, split="train")
    missing = {"context", "prompt"} - set(dataset.column_names)
    if missing:
        raise ValueError(f"Expected the columns `context` and `prompt`, got {dataset.column_names}.")
    answered = dataset.map(answer, batched=True, batch_size=arguments.batch_size, load_from_cache_file=False)
    complete = answered.filter(bool, input_columns=["complete"]).remove_columns("complete")
    complete.to_parquet(arguments.output)
    print(
        f"{len(complete)} responses in {arguments.output}; left out are {len(answered) - len(complete)} rows whose "
        f"answer was empty or not at its end after {arguments.max_new_tokens} tokens"
    )


if __name__ == "__main__":
    main()
