"""
`icae evaluate answers --data FILE.parquet`: answers from slots beside answers from other things.

Held-out prompts are answered greedily from each of

- `icae`: the memory of the context;
- `full context`: the frozen base with the context itself;
- `full context, tuned`: the same with a LoRA of the same size, tuned on the same data (`--tuned`, optional; made by
  `python -m icae.evaluation.tune_full_context`);
- `no context`: the frozen base with the prompt alone;
- `untrained slots`: an ICAE without any training;
- `another text's slots`: the control, which has learnt to answer as `icae` has but reads another context's memory;

and by the frozen base from as many tokens as there are slots:

- `truncated context`: the first ones of the context;
- `summary`: one that the base itself wrote of the context, cut to that length;
- `retrieved sentences`: those that fit the prompt best (BM25);
- `LLMLingua`, `kvpress`: what other tools leave of the context, or of its keys and values (`--llmlingua`, `--kvpress`,
  optional; see [`icae.evaluation.third_party`]).

Measured are token F1 and exact match (SQuAD), ROUGE, and the loss of the reference answer in nats per token. All means
are taken over the rows of a source first, then over sources. Intervals hold 95% of 2,000 bootstrap draws of rows
within each source; all readers share the draws, so that the share of the full context's F1 is compared row by row.
There are none for one row of each source, and a source with one row adds nothing to their width. `icae_minus` holds
the mean differences of each source, `icae` minus each other reader, in F1, loss and, where references are long,
ROUGE-L: above 0 is better for the scores and worse for loss; their intervals are Student's, of the source's rows.
`full_context_minus` holds the same of the full context: where it is no better than less of the context, slots can
hardly be.

`--repetition-penalty` makes less likely what an answer itself has said, for all readers alike, since a small base that
is decoded greedily loops. It takes an `--output` of its own, and `kvpress`, which answers by code of its own, cannot
take part.

`--readers` compares some of these only, on more rows in the same time, in an `--output` of their own.

Each reader's answers are kept in a file of their own in a folder beside the output. What is there is not computed
again, be it after an interruption, for more rows, or for another checkpoint on the same base; only the answers of an
earlier checkpoint give way to those of a new one. Answers of the optional readers that are kept to all of the rows
take part without these options.
"""

import json
import re
from collections import defaultdict
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import concatenate_datasets
from peft import PeftModel
from scipy.stats import t as student
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from icae.cli import load_model, whole_number
from icae.evaluation.answer_files import AnswerFile, Line, digest, forget_other_weights
from icae.evaluation.arguments import command_line, evaluation_parser, identity, parse, recorded, saved_weights
from icae.evaluation.documents import batches
from icae.evaluation.files import check_filled
from icae.evaluation.measures import ROUGE, SHORT_ANSWERS, mean, scores
from icae.evaluation.readers import (
    Reader,
    RetrievalReader,
    Row,
    SlotReader,
    SummaryReader,
    TokenReader,
    number_of_slots,
)
from icae.evaluation.record import current_commit, write_record
from icae.evaluation.third_party import KVPressReader, LLMLinguaReader, tool_version
from icae.evaluation.triples import load_triples
from icae.modeling_icae import ICAEForConditionalGeneration
from icae.modeling_icae.chat_icae import encode_contexts


QUICK = {"per_source": 1, "max_context_length": 256, "max_new_tokens": 16}
READERS = (
    "icae",
    "full context",
    "full context, tuned",
    "truncated context",
    "summary",
    "retrieved sentences",
    "LLMLingua",
    "kvpress",
    "no context",
    "untrained slots",
    "another text's slots",
)
OPTIONAL = {"full context, tuned": "--tuned", "LLMLingua": "--llmlingua", "kvpress": "--kvpress"}
FORM = ("memory_type", "encoder_layout", "decoder_layout", "lora_r", "lora_target_modules")  # of an ICAE
BySource = dict[str, list[float]]  # one number for each row


def main(argv: list[str] | None = None) -> None:
    parser = evaluation_parser("evaluate answers", "Answers from slots beside answers from other things.")
    parser.add_argument(
        "--data", required=True, help="Parquet file: context, prompt, response, source, or PwC's columns"
    )
    parser.add_argument("--tuned", help="PEFT adapter of the baseline tuned on full contexts")
    parser.add_argument("--llmlingua", metavar="PYTHON", help="interpreter of an environment with llmlingua")
    parser.add_argument("--kvpress", metavar="PYTHON", help="interpreter of an environment with kvpress")
    parser.add_argument(
        "--readers",
        nargs="+",
        choices=READERS,
        metavar="NAME",
        help=f"only some, 'icae' and 'full context' (which shares are of) among them: {', '.join(map(repr, READERS))}",
    )
    parser.add_argument("--per-source", type=whole_number(1), default=8, help="rows of each source (default: 8)")
    parser.add_argument(
        "--max-context-length", type=whole_number(1), default=768, help="tokens; longer rows are left out"
    )
    parser.add_argument("--max-new-tokens", type=whole_number(1), default=48)
    parser.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        help="of what an answer itself has said, for all readers alike (default: 1, none)",
    )
    parser.add_argument(
        "--batch-size", type=whole_number(1), default=16, help="rows answered at once, of similar length"
    )
    arguments = parse(parser, argv, QUICK)
    penalty = arguments.repetition_penalty
    if arguments.readers:
        check_readers(arguments.readers, arguments.output, parser.get_default("output"))
    if penalty != 1:
        check_penalty(penalty, arguments.kvpress, arguments.output, parser.get_default("output"))

    model = load_model(arguments.model, arguments.base, arguments.dtype)
    rows, left_out = choose_rows(
        arguments.data, arguments.per_source, arguments.max_context_length, arguments.seed, model
    )
    shared = {
        "data": digest(arguments.data),
        "dtype": arguments.dtype,
        "max_new_tokens": arguments.max_new_tokens,
    }
    if penalty != 1:
        shared["repetition_penalty"] = penalty
    answers, earlier = {}, {}
    if arguments.output.is_file():
        earlier = json.loads(arguments.output.read_text())
    optional = (arguments.tuned, arguments.llmlingua, arguments.kvpress)
    for reader in compared(model, *optional, arguments.seed, penalty):
        if reader.name not in (arguments.readers or READERS):
            continue
        if reader.name == "another text's slots" and all(row["context"] == rows[0]["context"] for row in rows):
            print(f"{reader.name}: left out, for all rows are about one context")
            continue
        words = re.findall(r"[a-z]+", reader.name.lower().replace("'", ""))
        file = arguments.output.with_suffix("") / f"{'-'.join(words)}.jsonl"
        made_from = {"reader": reader.name, **shared, **reader.made_from}
        if reader.make is None:
            if (kept := kept_answers(file, made_from, rows)) is not None:
                answers[reader.name] = kept
            elif arguments.readers:
                raise ValueError(
                    f"Expected answers of {reader.name!r} to all rows in {str(file)!r}, got none; give "
                    f"`{OPTIONAL[reader.name]}`, which makes them."
                )
            continue
        forget_other_weights(file, made_from)
        answers[reader.name] = AnswerFile(file, made_from)
        fill(answers[reader.name], reader.make, rows, arguments.max_new_tokens, arguments.batch_size)
    measured = {name: measure(file.rows, rows) for name, file in answers.items()}
    limit = arguments.max_new_tokens
    long = long_sources(rows)
    summary = summarize(measured, long)
    record = {
        "what": "answers to held-out prompts",
        "unit": "intervals of 95%: bootstrap over the rows of each source; of differences, Student's",
        "rows": len(rows),
        "rows_left_out_as_too_long": left_out,
        "context_tokens": sum(len(row["context_ids"]) for row in rows),
        "slots": sum(number_of_slots(model, row["context_ids"]) for row in rows),
        "answers_at_the_limit": {
            name: sum(reaches(model.tokenizer, file.rows[row["row"]]["answer"], limit) for row in rows)
            for name, file in answers.items()
        },
        "references_above_the_limit": sum(len(row["response_ids"]) - 1 > limit for row in rows),  # without the end
        "arguments": recorded(arguments),
        "commits": {
            name: sorted({str(file.rows[row["row"]].get("commit")) for row in rows}) for name, file in answers.items()
        },
        "weights": {"icae": saved_weights(model)},
        "summary": summary,
        "by_source": {name: means(found) for name, found in measured.items()},
        "icae_minus": {
            name: minus(measured["icae"], found, long) for name, found in measured.items() if name != "icae"
        },
        "full_context_minus": {  # what there is to gain from the rest of the context
            name: minus(measured["full context"], measured[name], long)
            for name in ("truncated context", "no context")
            if name in measured
        },
        "examples": examples(answers, rows),
    }
    if arguments.tuned and "full context, tuned" in answers:
        if (file := Path(arguments.tuned, "tuned_on.json")).is_file():  # an adapter of another's has none
            record["tuned_on"] = json.loads(file.read_text())
    elif "full context, tuned" in answers and "tuned_on" in earlier:
        record["tuned_on"] = earlier["tuned_on"]
    write_record(arguments.output, record, command=command_line(parser, argv))
    for name, found in summary.items():
        print(f"{name:20s} F1 {found['f1']:.3f}  loss {found['loss']:.3f}")


def choose_rows(data: str, per_source: int, max_length: int, seed: int, model) -> tuple[list[Row], int]:
    """
    The same number of rows of each source, with their token ids and their number in the file (`row`), shortest context
    first; and how many rows of the file are too long to be chosen. More rows of each source are those that fewer would
    be, and others.
    """
    tokenizer = model.tokenizer
    dataset = load_triples(data)
    check_filled(dataset, ("source",), data)
    if not all(isinstance(prompt, str) for prompt in dataset["prompt"]):
        raise ValueError(
            "Expected prompts as texts, which can be searched for, got conversations; give their last turns."
        )
    dataset = dataset.add_column("row", list(range(len(dataset)))).shuffle(seed=seed)
    if "source" not in dataset.column_names:
        dataset = dataset.add_column("source", ["all"] * len(dataset))
    # Not `map`, which would find the ids that an earlier version of `encode_contexts` made.
    ids = [[*chain(*encode_contexts(tokenizer, context))] for context in dataset["context"]]
    dataset = dataset.add_column("context_ids", ids)
    fitting = dataset.filter(lambda ids: len(ids) <= max_length, input_columns=["context_ids"])
    if not len(fitting):
        raise ValueError(
            f"Expected rows with a context of at most {max_length} tokens, got none among {len(dataset)}; raise "
            "`--max-context-length`."
        )
    parts = [
        fitting.filter(lambda found, source=source: found == source, input_columns=["source"]).take(per_source)
        for source in sorted(set(fitting["source"]))
    ]
    rows = []
    for row in concatenate_datasets(parts):
        row["prompt_ids"] = model.encode_prompts([row["prompt"]])[0]
        row["response_ids"] = model.encode_responses([row["response"]])[0]
        rows.append(row)
    return sorted(rows, key=lambda row: len(row["context_ids"])), len(dataset) - len(fitting)


# ----------------------------------------------------------------------------------------------- what answers are from


class Compared(NamedTuple):
    """
    A reader that is loaded when it is needed, its name, and what its answers depend on: all of it, or as much as is
    known without its weights or tool, which are not here (`make` is `None`).
    """

    name: str
    made_from: Line
    make: Callable[[], Reader] | None


def compared(
    model: ICAEForConditionalGeneration,
    tuned: str | None,
    llmlingua: str | None,
    kvpress: str | None,
    seed: int,
    repetition_penalty: float = 1.0,
) -> list[Compared]:
    """What is compared. Readers of the frozen base depend on an ICAE only by the number of its slots."""
    base = model.language_model  # at rest the frozen base
    frozen = {"base": model.config.base_model_fingerprint}
    names = ("span_length", "compression_ratio", "num_memory_slots")
    budget = frozen | {name: getattr(model.config, name) for name in names}
    form = budget | {name: getattr(model.config, name) for name in FORM}
    how: dict[str, Any] = {"repetition_penalty": repetition_penalty}

    def untrained() -> Reader:
        torch.manual_seed(seed)
        fresh = ICAEForConditionalGeneration.from_base(
            base.name_or_path, model.config, tokenizer=model.tokenizer, dtype=base.dtype
        )
        return SlotReader(fresh.eval().to(base.device), **how)

    def full_context_tuned() -> Reader:
        adapted = AutoModelForCausalLM.from_pretrained(base.name_or_path, dtype=base.dtype)
        adapted = PeftModel.from_pretrained(adapted, tuned).eval().to(base.device)
        return TokenReader(adapted, model, lambda ids: ids, **how)

    found = [
        Compared("icae", {"model": identity(model)}, lambda: SlotReader(model, **how)),
        Compared("full context", frozen, lambda: TokenReader(base, model, lambda ids: ids, **how)),
        Compared(
            "truncated context",
            budget,
            lambda: TokenReader(base, model, lambda ids: ids[: number_of_slots(model, ids)], **how),
        ),
        Compared("summary", budget, lambda: SummaryReader(base, model, **how)),
        Compared("retrieved sentences", budget, lambda: RetrievalReader(base, model, **how)),
        Compared("no context", frozen, lambda: TokenReader(base, model, lambda ids: [], **how)),
        Compared("untrained slots", form | {"seed": seed}, untrained),
        Compared(
            "another text's slots", {"model": identity(model)}, lambda: SlotReader(model, other_text=True, **how)
        ),
    ]
    optional = [Compared("full context, tuned", frozen, None)]
    optional += [Compared(name, budget, None) for name in ("LLMLingua", "kvpress")]
    if tuned:
        adapter = frozen | {"adapter": digest(f"{tuned}/adapter_model.safetensors")}
        optional[0] = Compared("full context, tuned", adapter, full_context_tuned)
    if llmlingua:
        made_from = budget | {"llmlingua": tool_version(llmlingua, "llmlingua")}
        optional[1] = Compared("LLMLingua", made_from, lambda: LLMLinguaReader(base, model, llmlingua, **how))
    if kvpress:
        made_from = budget | {"kvpress": tool_version(kvpress, "kvpress")}
        optional[2] = Compared("kvpress", made_from, lambda: KVPressReader(base, model, kvpress))
    return [*found[:2], optional[0], *found[2:5], *optional[1:], *found[5:]]


def check_readers(names: list[str], output: Path, default: Path) -> None:
    """
    Checks what `--readers` chose, before anything is loaded.

    Raises:
        `ValueError`: if `icae` and `full context` are not among the names, or if some readers would take the place of
            the results of all.
    """
    if not {"icae", "full context"}.issubset(names):
        raise ValueError(f"Expected 'icae' and 'full context' among `--readers`, got {names}; add what is missing.")
    if output == default:
        raise ValueError(f"Expected an `--output` of its own with `--readers`, got {str(output)!r}, that of all.")


def check_penalty(penalty: float, kvpress: str | None, output: Path, default: Path) -> None:
    """
    Checks what `--repetition-penalty` says, before anything is loaded.

    Raises:
        `ValueError`: if it is not above 0, if kvpress would have to heed it, or if the output is the default one, of
            greedy answers.
    """
    if penalty <= 0:
        raise ValueError(f"Expected a `--repetition-penalty` above 0, got {penalty}; 1 is none, 1.15 a usual one.")
    if kvpress:
        raise ValueError("Expected no `--kvpress` beside `--repetition-penalty`, got both; kvpress answers greedily.")
    if output == default:
        raise ValueError(
            f"Expected an `--output` of its own with `--repetition-penalty`, got {str(output)!r}, that of "
            "greedy answers."
        )


def kept_answers(path: Path, known: Line, rows: list[Row]) -> AnswerFile | None:
    """The answers of a reader that is not here, if they are kept to all rows; if to others only, a line says so."""
    if not path.is_file():
        return None
    file = AnswerFile(path)
    if file.made_from.items() >= known.items() and all(row["row"] in file.rows for row in rows):
        return file
    print(f"{path}: left out, for the answers kept are to other rows or made from {file.made_from}")
    return None


@torch.no_grad()
def fill(file: AnswerFile, make: Callable[[], Reader], rows: list[Row], max_new_tokens: int, batch_size: int) -> None:
    """Answers the rows that a file does not hold yet, in the same batches as if it held none."""
    missing = [batch for batch in batches(rows, batch_size) if any(row["row"] not in file.rows for row in batch)]
    if not missing:
        return
    reader, commit = make(), current_commit()
    for batch in tqdm(missing, desc=file.name):
        losses, answers = reader.losses(batch), reader.answers(batch, max_new_tokens)
        found = zip(batch, losses, answers, strict=True)
        lines = [
            {"row": row["row"], "loss": round(loss, 6), "answer": answer, "commit": commit}
            for row, loss, answer in found
        ]
        file.add([line for line in lines if line["row"] not in file.rows])


# -------------------------------------------------------------------------------------------------------- the numbers


def measure(answers: dict[int, Line], rows: list[Row]) -> dict[str, BySource]:
    """All measures of the answers to some rows, by name."""
    values: dict[str, BySource] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        line = answers[row["row"]]
        for name, value in ({"loss": line["loss"]} | scores(line["answer"], row["response"])).items():
            values[name][row["source"]].append(value)
    return values


def reaches(tokenizer: PreTrainedTokenizerBase, answer: str, limit: int) -> bool:
    """Whether an answer has so many tokens, at which it was cut, as far as its text tells."""
    return len(tokenizer(answer, add_special_tokens=False)["input_ids"]) >= limit


def means(values: dict[str, BySource]) -> dict[str, dict[str, float]]:
    """Means of each source."""
    sources = sorted(values["f1"])
    return {
        source: {name: mean(found[source]) for name, found in values.items()} | {"rows": len(values["f1"][source])}
        for source in sources
    }


def long_sources(rows: list[Row]) -> set[str]:
    """Sources whose references are long on average."""
    words: dict[str, list[int]] = defaultdict(list)
    for row in rows:
        words[row["source"]].append(len(row["response"].split()))
    return {source for source, counts in words.items() if mean(counts) >= SHORT_ANSWERS}


def minus(one: dict[str, BySource], other: dict[str, BySource], long: set[str]) -> dict[str, dict[str, Any]]:
    """
    Mean F1, loss and, of the sources of long answers, ROUGE-L of one reader minus another's in each source; intervals
    where a source has several rows.
    """
    found: dict[str, dict[str, Any]] = {}
    for source in sorted(one["f1"]):
        found[source] = {}
        for name in ("f1", "loss", "rougeL") if source in long else ("f1", "loss"):
            differences = np.subtract(one[name][source], other[name][source]).tolist()  # row by row
            found[source][name] = mean(differences)
            if (rows := len(differences)) > 1:
                # Student's, for a bootstrap of so few rows would miss a true difference of 0 too often.
                error = float(np.std(differences, ddof=1)) / rows**0.5 * float(student.ppf(0.975, rows - 1))
                found[source][f"{name}_interval"] = [found[source][name] - error, found[source][name] + error]
    return found


def summarize(measured: dict[str, dict[str, BySource]], long: set[str]) -> dict[str, dict[str, Any]]:
    """
    Means over sources: loss and F1 of all, exact match of short-answer sources, ROUGE of the `long` ones; and of F1,
    its interval and its share of the full context's.
    """
    counts = {source: len(found) for source, found in measured["full context"]["f1"].items()}
    everything, short = set(counts), set(counts) - long

    def over(values: BySource, chosen: set[str]) -> float:
        return mean([mean(values[source]) for source in sorted(chosen)])

    summary: dict[str, dict[str, Any]] = {}
    for name, values in measured.items():
        summary[name] = {"loss": over(values["loss"], everything), "f1": over(values["f1"], everything)}
        if short:
            summary[name] |= {f"short_{key}": over(values[key], short) for key in ("f1", "exact_match")}
        if long:
            summary[name] |= {f"long_{key}": over(values[key], long) for key in ROUGE}
    draws = draw_means({name: values["f1"] for name, values in measured.items()})
    full, full_draws = summary["full context"]["f1"], draws["full context"]
    intervals = sum(counts.values()) > len(everything)
    for name, row in summary.items():
        if intervals:
            row["f1_interval"] = _interval(draws[name])
        if full > 0:
            row["f1_share_of_full_context"] = row["f1"] / full
        if intervals and full_draws.min() > 0:
            row["f1_share_interval"] = _interval(draws[name] / full_draws)
    return summary


def draw_means(values: dict[str, BySource], seed: int = 0, draws: int = 2000) -> dict[str, np.ndarray]:
    """
    Bootstrap of means over sources: arrays of shape `(draws,)` by reader. Rows are drawn within each source, one fewer
    than there are, so that the spread is right for few rows too (Rao and Wu, 1988); a draw is the same rows for all
    readers.
    """
    generator = np.random.default_rng(seed)
    (first, *_) = values.values()
    total = {name: np.zeros(draws) for name in values}
    for source, found in sorted(first.items()):
        chosen = generator.integers(len(found), size=(draws, max(1, len(found) - 1)))
        for name, sources in values.items():
            total[name] += np.asarray(sources[source])[chosen].mean(axis=1) / len(first)
    return total


def examples(answers: dict[str, AnswerFile], rows: list[Row]) -> dict[str, dict[str, Any]]:
    """Of each source the row with the shortest context: prompt, reference and all answers."""
    chosen: dict[str, Row] = {}
    for row in rows:
        chosen.setdefault(row["source"], row)
    return {
        source: {
            "prompt": row["prompt"],
            "reference": row["response"],
            "answers": {name: file.rows[row["row"]]["answer"] for name, file in answers.items()},
        }
        for source, row in sorted(chosen.items())
    }


def _interval(draws: np.ndarray) -> list[float]:
    return [float(bound) for bound in np.quantile(draws, (0.025, 0.975))]


if __name__ == "__main__":
    main()
