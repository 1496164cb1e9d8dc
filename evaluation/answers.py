"""
`icae evaluate answers --data FILE.parquet`: answers from slots beside answers from other things.

Held-out prompts are answered greedily from each of

- `icae`: the memory of the context;
- `full context`: the frozen base with the context itself;
- `full context, tuned`: the same with a LoRA of the same size, tuned on the same data (`--tuned`, optional; made by
  `python -m icae.evaluation.tune_full_context`);
- `truncated context`: the frozen base with as many tokens from the start of the context as there are slots;
- `no context`: the frozen base with the prompt alone;
- `untrained slots`: an ICAE without any training.

Measured are token F1 and exact match (SQuAD), ROUGE, and the loss of the reference answer in nats per token. All means
are taken over the rows of a source first, then over sources.
"""

import argparse
from collections import defaultdict
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets, load_dataset
from peft import PeftModel
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM

from icae.cli import load_model
from icae.evaluation.measures import ROUGE, scores
from icae.evaluation.readers import SlotReader, TokenReader
from icae.evaluation.record import write_record
from icae.modeling_icae import ICAEForConditionalGeneration
from icae.modeling_icae.chat_icae import encode_contexts


SHORT_ANSWERS = 10  # words; sources whose references are shorter on average count as short-answer sources


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Answers from slots beside answers from other things.")
    parser.add_argument("--data", required=True, help="Parquet file: context, prompt, response, source")
    parser.add_argument("--model", help="an ICAE (default: the embedded checkpoint)")
    parser.add_argument("--base", help="its base, if not where the ICAE says")
    parser.add_argument("--tuned", help="PEFT adapter of the baseline tuned on full contexts")
    parser.add_argument("--per-source", type=int, default=8, help="rows of each source (default: 8)")
    parser.add_argument("--max-context-length", type=int, default=768, help="tokens; longer rows are left out")
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("results/answers.json"))
    arguments = parser.parse_args(argv)

    model = load_model(arguments.model, arguments.base, "bfloat16")
    rows = choose_rows(arguments.data, arguments.per_source, arguments.max_context_length, arguments.seed, model)
    results = {}
    for name, reader in readers(model, arguments).items():
        results[name] = evaluate(reader, rows, arguments.max_new_tokens, arguments.batch_size, name)
    summary = summarize(results, rows)
    record = {
        "what": "answers to held-out prompts",
        "rows": len(rows),
        "context_tokens": sum(len(row["context_ids"]) for row in rows),
        "slots": sum(number_of_slots(model, row["context_ids"]) for row in rows),
        "arguments": vars(arguments) | {"output": str(arguments.output)},
        "summary": summary,
        "by_source": results,
    }
    write_record(arguments.output, record)
    for name, row in summary.items():
        print(f"{name:22s}", "  ".join(f"{key} {value:.3f}" for key, value in row.items()))


def choose_rows(data: str, per_source: int, max_length: int, seed: int, model) -> list[dict[str, Any]]:
    """The same number of rows of each source, with their token ids, shortest context first."""
    tokenizer = model.tokenizer
    dataset: Dataset = load_dataset("parquet", data_files=data, split="train").shuffle(seed=seed)
    if "source" not in dataset.column_names:
        dataset = dataset.add_column("source", ["all"] * len(dataset))
    dataset = dataset.map(lambda row: {"context_ids": [*chain(*encode_contexts(tokenizer, row["context"]))]}).filter(
        lambda ids: len(ids) <= max_length, input_columns=["context_ids"]
    )
    parts = [
        dataset.filter(lambda found, source=source: found == source, input_columns=["source"]).take(per_source)
        for source in sorted(set(dataset["source"]))
    ]
    rows = []
    for row in concatenate_datasets(parts):
        row["prompt_ids"] = model.encode_prompts([row["prompt"]])[0]
        row["response_ids"] = model.encode_responses([row["response"]])[0]
        rows.append(row)
    return sorted(rows, key=lambda row: len(row["context_ids"]))


# ----------------------------------------------------------------------------------------------- what answers are from


def readers(model: ICAEForConditionalGeneration, arguments) -> dict[str, SlotReader | TokenReader]:
    """What is compared, by name."""
    base = model.language_model  # at rest the frozen base
    found: dict[str, SlotReader | TokenReader] = {
        "icae": SlotReader(model),
        "full context": TokenReader(base, model, lambda ids: ids),
        "truncated context": TokenReader(base, model, lambda ids: ids[: number_of_slots(model, ids)]),
        "no context": TokenReader(base, model, lambda ids: []),
    }
    torch.manual_seed(arguments.seed)
    untrained = ICAEForConditionalGeneration.from_base(
        base.name_or_path, model.config, tokenizer=model.tokenizer, dtype=base.dtype
    )
    found["untrained slots"] = SlotReader(untrained.eval())
    if arguments.tuned:
        tuned = AutoModelForCausalLM.from_pretrained(base.name_or_path, dtype=base.dtype)
        tuned = PeftModel.from_pretrained(tuned, arguments.tuned).eval()
        found["full context, tuned"] = TokenReader(tuned, model, lambda ids: ids)
    return found


def number_of_slots(model: ICAEForConditionalGeneration, ids: list[int]) -> int:
    """Slots that a context becomes."""
    return sum(model.config.slots_for(len(span)) for span in torch.tensor(ids).split(model.config.span_length))


# -------------------------------------------------------------------------------------------------------- the numbers


@torch.no_grad()
def evaluate(reader, rows: list[dict[str, Any]], max_new_tokens: int, batch_size: int, name: str) -> dict[str, Any]:
    """Means of each source, and the first answer of each."""
    values: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    examples: dict[str, dict[str, str]] = {}
    for first in tqdm(range(0, len(rows), batch_size), desc=name):
        batch = rows[first : first + batch_size]
        losses, answers = reader.losses(batch), reader.answers(batch, max_new_tokens)
        for row, loss, answer in zip(batch, losses, answers, strict=True):
            for key, value in ({"loss": loss} | scores(answer, row["response"])).items():
                values[row["source"]][key].append(value)
            example = {"prompt": row["prompt"], "reference": row["response"], "answer": answer}
            examples.setdefault(row["source"], example)
    return {
        source: {key: sum(found) / len(found) for key, found in measures.items()}
        | {"rows": len(measures["f1"]), "example": examples[source]}
        for source, measures in sorted(values.items())
    }


def summarize(results: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Means over sources: loss and F1 of all, exact match of short-answer sources, ROUGE of the others."""
    words: dict[str, list[int]] = defaultdict(list)
    for row in rows:
        words[row["source"]].append(len(row["response"].split()))
    short = {source for source, counts in words.items() if sum(counts) / len(counts) < SHORT_ANSWERS}

    def mean(sources: dict[str, Any], key: str, chosen: set[str]) -> float:
        found = [measures[key] for source, measures in sources.items() if source in chosen]
        return sum(found) / len(found) if found else float("nan")

    everything, long = set(words), set(words) - short
    summary = {
        name: {
            "loss": mean(sources, "loss", everything),
            "f1": mean(sources, "f1", everything),
            "short_f1": mean(sources, "f1", short),
            "short_exact_match": mean(sources, "exact_match", short),
            **{f"long_{key}": mean(sources, key, long) for key in ROUGE},
        }
        for name, sources in results.items()
    }
    if full := summary["full context"]["f1"]:
        for row in summary.values():
            row["f1_share_of_full_context"] = row["f1"] / full
    return summary


if __name__ == "__main__":
    main()
