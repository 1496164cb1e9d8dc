"""What the files in `results/` say, in Markdown: for the README and for `icae report`."""

import re
from collections.abc import Iterable
from typing import Any

from icae.evaluation.aims import RUNS
from icae.evaluation.measures import SHORT_ANSWERS


Record = dict[str, Any]
ANSWERS = {  # measures of answers, and the heads of their columns
    "loss": "loss of the reference",
    "f1": "token F1",
    "f1_share_of_full_context": "of full context",
    "short_f1": "short: F1",
    "short_exact_match": "exact match",
    "long_rougeL": "long: ROUGE-L",
}
KEPT = ("loss", "another text's slots", "accuracy", "exact prefix", "BLEU")
ENDS = {"f1": "f1_interval", "f1_share_of_full_context": "f1_share_interval"}


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(re.sub(r"(?<=\|)  (?=\|)", " ", f"| {' | '.join(line)} |") for line in lines)


def with_interval(value: float, bounds: list[float] | None, form: str = "{:.2f}") -> str:
    """A number and, where it is known, its interval."""
    return form.format(value) + (f" [{', '.join(map(form.format, bounds))}]" if bounds else "")


def embedded(record: Record) -> str:
    """What the checkpoints reconstruct."""
    arguments = record["arguments"]
    contexts = _lengths(arguments["lengths"])
    control = "another text's slots"
    losses = table(
        ("", "autoencoding loss", control, "accuracy", "BLEU", "continuation loss", control),
        (
            [
                name,
                f"{row['ae_loss']:.2f}",
                f"{row['ae_loss_other_text']:.1f}",
                f"{row['ae_accuracy']:.1%}",
                f"{row['bleu']:.2f}" if "bleu" in row else "–",
                f"{row['lm_loss']:.2f}",
                f"{row['lm_loss_other_text']:.2f}",
            ]
            for name, row in record["models"].items()
        ),
    )
    title, links = "**Held-out text back from its slots**", "[reconstruction.json](results/reconstruction.json)"
    if list(record["models"]) == ["embedded"]:
        title = "**The embedded checkpoint** (SmolLM2-135M-Instruct, 4x) on held-out text"
        runs = ", ".join(f"[{name}](results/{name}.png)" for name in RUNS)
        links += f";\n[how it was trained](results/README.md), with curves of the first {len(RUNS)} runs: {runs}"
    return f"""\
{title},
{record["context_tokens"]:,} tokens in contexts of {contexts} ({links}):

{losses}

Losses in nats per token, accuracy teacher-forced, BLEU of the text that is really written out.
"""


def lengths(record: Record) -> str:
    """What comes back by context length, and of text that cannot be guessed."""
    rows = []
    for name, model in record["models"].items():
        for length, found in model.get("by_length", {}).items():
            rows.append([name, f"{length} tokens", str(model["slots"][length]), *_kept(found)])
        for kind, found in model.get("by_text", {}).items():
            rows.append([name, f"{record['arguments']['altered_length']}, {kind} text", "", *_kept(found)])
    return table(("", "context", "slots", *KEPT), rows) + "\n"


def kinds_of_text(record: Record) -> str:
    """What comes back of each source, over all lengths."""
    rows = [
        [name, source, str(found["rows"]), *_kept(found)]
        for name, model in record["models"].items()
        for source, found in model["by_source"].items()
    ]
    return table(("", "source", "rows", *KEPT), rows) + "\n"


def continuation(record: Record) -> str:
    """How well text goes on from slots."""
    rows = []
    for name, lengths in record["models"].items():
        for length, found in lengths.items():
            conditions = {condition: row for condition, row in found.items() if condition != "slots"}
            icae = conditions["icae"]
            rows.append(
                [
                    f"{name}, {length} → {found['slots']}",
                    *(f"{row['perplexity']:.2f}" for row in conditions.values()),
                    with_interval(
                        icae["perplexity_increase_percent"], icae["perplexity_increase_percent_interval"], "{:+.0f}%"
                    ),
                ]
            )
    return f"""\
**How text goes on**: perplexity of the {record["arguments"]["target_length"]} tokens behind a context, the same
{record["target_tokens"]:,} targets at every length ([continuation.json](results/continuation.json)):

{table(["tokens → slots", *conditions, "slots above full context"], rows)}

"Last tokens" are as many as there are slots. Intervals hold 95%.
"""


def answers(record: Record) -> str:
    """Answers to held-out prompts."""
    rows = [
        [name, *(with_interval(row[key], row.get(ENDS.get(key, ""))) if key in row else "–" for key in ANSWERS)]
        for name, row in record["summary"].items()
    ]
    intervals = " Intervals hold 95%." if "f1_interval" in record["summary"]["icae"] else ""
    reads = "The frozen base reads the full, the truncated (as many tokens as there are slots) and no context"
    if "summary" in record["summary"]:
        reads = (
            "The frozen base reads the full context or none, or in as many tokens as there are slots the first of\n"
            "the context, a summary that it wrote itself, or the sentences that fit the prompt best (BM25)"
        )
    learnt = '"Untrained slots" are those of an ICAE\nbefore any training.'
    if record["arguments"]["model"] is None:  # the embedded one
        learnt = f"The ICAE was tuned to answer prompts of these sources, the frozen base was not. {learnt}"
    if "another text's slots" in record["summary"]:
        learnt += """ "Another text's slots" are the same ICAE with the memory of another context."""
    if tools := [name for name in ("LLMLingua", "kvpress") if name in record["summary"]]:
        reads += f",\nor what {' and '.join(tools)} leave of it"
    tuned = ""
    if "full context, tuned" in record["summary"]:
        tuned_on = f"{record['tuned_on']['triples']:,} triples" if "tuned_on" in record else "data of the same kind"
        tuned = f"""\
; "tuned" is a LoRA of
the same size, tuned on {tuned_on} with the full context ([how long](results/README.md))"""
    return f"""\
**Answers from the slots**: {record["rows"]} held-out prompts of {len(record["by_source"]["icae"])} sources,
{record["context_tokens"]:,} context tokens in {record["slots"]:,} slots ([answers.json](results/answers.json)):

{table(["answers from", *ANSWERS.values()], rows)}

{reads}{tuned}.
{learnt}{intervals}
{_limits(record)}
"""


def _limits(record: Record) -> str:
    """What bounds answers and contexts, and how often it does; records of earlier versions do not say."""
    if "answers_at_the_limit" not in record:
        return ""
    arguments, cut = record["arguments"], record["answers_at_the_limit"]
    limit, longest = arguments["max_new_tokens"], arguments["max_context_length"]
    longer, left_out = record["references_above_the_limit"], record["rows_left_out_as_too_long"]
    drawn = f"""\
Prompts are drawn from those about contexts of at most {longest:,}
tokens; {left_out:,} are about longer ones."""
    if not left_out:
        drawn = "Prompts are drawn from\nall of the file, none of whose contexts is too long to take part."
    return f"""\
Answers end after {limit} tokens at the latest, which {cut["icae"]} from slots and {cut["full context"]} from the full
context reach; {longer} references are longer. {drawn}"""


def by_source(record: Record) -> str:
    """Token F1 of each source."""
    found = record["by_source"]
    rows = [
        [source, str(row["rows"]), *(f"{sources[source]['f1']:.2f}" for sources in found.values())]
        for source, row in found["icae"].items()
    ]
    return table(["token F1", "rows", *found], rows) + "\n"


def icae_minus(record: Record) -> str:
    """Token F1, ROUGE-L and loss from slots minus those from other things, source by source."""
    others, sources = record["icae_minus"], record["by_source"]["icae"]
    shown = [_differences(head, measure, others, sources) for head, (measure, _) in _measures(record).items()]
    tables = "\n\n".join(shown)
    return f"""\
Each source's mean from slots, and that mean minus the one of each other reader: above 0 is better for token F1
and ROUGE-L (of sources whose references have {SHORT_ANSWERS} words or more on average) and worse for the loss of the
reference. Intervals hold 95%, each for itself: by chance alone, one of twenty would miss a true difference of 0. A
source with one row has none.

{tables}
"""


def _measures(record: Record) -> dict[str, tuple[str, int]]:
    """What differences are of, and whether more (1) or less (-1) of it is better; ROUGE-L if any answers are long."""
    (first, *_) = record["icae_minus"].values()
    measures = {"token F1": ("f1", 1), "ROUGE-L": ("rougeL", 1), "loss": ("loss", -1)}
    return {head: one for head, one in measures.items() if any(one[0] in found for found in first.values())}


def _differences(head: str, measure: str, others: Record, sources: Record) -> str:
    def cell(found: Record) -> str:
        return with_interval(found[measure], found.get(f"{measure}_interval"), "{:+z.2f}")  # no -0.00

    rows = [
        [source, str(row["rows"]), f"{row[measure]:.2f}", *(cell(found[source]) for found in others.values())]
        for source, row in sources.items()
        if all(measure in found[source] for found in others.values())
    ]
    return table([head, "rows", "icae", *(f"icae − {name}" for name in others)], rows)


def better_and_worse(record: Record, name: str = "answers_by_source") -> str:
    """
    On how many sources slots are better than other things, and on which they are worse; and so the full context, where
    it is no better than less there is nothing for slots to gain.
    """
    penalty = record["arguments"].get("repetition_penalty", 1)  # which losses know nothing of
    measures = _measures(record)
    if penalty != 1:
        del measures["loss"]
    pairs = {f"icae against {other}": sources for other, sources in record["icae_minus"].items()}
    of_full = record.get("full_context_minus", {}).items()  # records of earlier versions have none
    pairs |= {f"full context against {other}": sources for other, sources in of_full}
    rows = []
    for pair, sources in pairs.items():
        row = [pair]
        for measure, sign in measures.values():
            measured = {source: found for source, found in sources.items() if measure in found}
            better = [source for source, found in measured.items() if sign * found[measure] > 0]
            worse = [source for source, found in measured.items() if sign * found[measure] < 0]
            sure = {source for source, found in measured.items() if _excludes_zero(found.get(f"{measure}_interval"))}
            row.append(f"{len(better)} of {len(measured)}, {len(sure.intersection(better))} surely")
            row.append(", ".join(f"**{source}**" if source in sure else source for source in worse) or "–")
        rows.append(row)
    head = ["", *(word for name in measures for word in (f"{name} better", "worse"))]
    rows_each = record["arguments"]["per_source"]
    prompts = f"{record['rows']} held-out prompts, at most {rows_each} of each source"
    title = f"**Source by source**, {prompts}"
    if penalty != 1:
        title = f"**With a repetition penalty** of {penalty} on what an answer itself has said, all readers, {prompts}"
    surely = f"""\
ROUGE-L is of the sources whose references have {SHORT_ANSWERS} words or more on average.
Surely, and in bold: the interval of the difference, which holds 95%, does not hold 0.
"""
    means = [f"{who} {with_interval(row['f1'], row.get('f1_interval'))}" for who, row in record["summary"].items()]
    return f"""\
{title}
([{name}.json](results/{name}.json)):

{table(head, rows)}

Token F1, the mean over sources: {", ".join(means)}.
{_limits(record)}
{surely if penalty == 1 else ""}"""


def _excludes_zero(interval: list[float] | None) -> bool:
    return interval is not None and not interval[0] <= 0 <= interval[1]


def examples(record: Record) -> str:
    """One prompt of each source with all answers."""
    parts = []
    for source, example in record.get("examples", {}).items():
        given = {"reference": example["reference"], **example["answers"]}
        parts.append(f"*{source}*: {_in_line(example['prompt'])}\n\n" + table(("", ""), _texts(given)))
    if not parts:
        return ""
    summary = "<summary>One prompt of each source with all answers</summary>"
    return "\n\n".join([f'<details markdown="1">\n{summary}', *parts, "</details>\n"])


def judge(record: Record) -> str:
    """Wins and losses in the eyes of a judge."""
    rows = [
        [
            name,
            f"{row['win']:.1%}",
            f"{row['lose']:.1%}",
            f"{row['tie']:.1%}",
            with_interval(row["on_par"], row["on_par_interval"], "{:.1%}"),
            "–" if row["win_to_lose"] is None else f"{row['win_to_lose']:.1f}",
            "–" if row["both_orders_agree"] is None else f"{row['both_orders_agree']:.0%}",
        ]
        for name, row in record["against"].items()
    ]
    return f"""\
**In the eyes of a judge** ({record["judge"]}, {record["rows"]} prompts, each pair in both orders;
[judge.json](results/judge.json)):

{table(["slots against", "win", "lose", "tie", "on par", "win : lose", "both orders agree"], rows)}
"""


def probes(record: Record, name: str = "probes") -> str:
    """Which facts survive. `name` is that of the file."""
    rows = []
    for model_name, model in record["models"].items():
        for reading, kinds in model["readers"].items():
            accuracies = [f"{row['accuracy']:.0%}" for row in kinds.values()]
            rows.append([f"{model_name}, {reading}", *accuracies, f"{kinds['all']['told_apart']:.0%}"])
    (low, high) = next(iter(record["models"].values()))["readers"]["icae"]["all"]["interval"]
    return f"""\
**Which facts survive**: is the true answer likelier than the same with another value? {record["texts"]}
{"generated and real" if record["data"] else "generated"} texts, chance is 50% ([{name}.json](results/{name}.json)):

{table(["", *kinds, "told apart"], rows)}

"Told apart": are the true answers about a text and about its twin, which has other values, together likelier than the
false ones? The 95% interval of the first number for all kinds reaches from {low:.0%} to {high:.0%}.
"""


def answering(record: Record, name: str = "bench_generate") -> str:
    """What an answer costs, as ratios. `name` is that of the file."""
    columns = {
        f"{cell['batch']} × {cell['context_tokens']:,}, {compression}": ratios
        for cell in record["cells"]
        for compression, ratios in cell["ratios"].items()
    }
    measures = dict.fromkeys(measure for ratios in columns.values() for measure in ratios)

    def show(value: float | None) -> str:
        return "never" if value is None else str(value) if isinstance(value, int) else f"{value:.2f}"

    rows = [
        [measure, *(show(ratios[measure]) if measure in ratios else "–" for ratios in columns.values())]
        for measure in measures
    ]
    hardware = record["made_by"]["hardware"]
    threads = hardware["torch_threads"]
    machine = hardware["accelerator"] or f"{threads} CPU thread{'s' * (threads > 1)}"
    arguments = record["arguments"]
    return f"""\
**What answering costs** (`icae bench generate`, ratios to the full context within one run on {machine}; rows × context
tokens, {arguments["new_tokens"]} new tokens, {arguments["dtype"]} and {record["attention"]} on both sides;
[{name}.json](results/{name}.json)):

{table(["", *columns], rows)}
"""


def aims(record: Record) -> str:
    """Where the embedded checkpoint stands against its aims, and what the slope of its pretraining says."""

    def show(value: float | None) -> str:
        return "–" if value is None else f"{value:.2f}"

    rows = [
        [
            row["measure"],
            row["aim"],
            show(row["after_first_run"]),
            "–" if row["value"] is None else with_interval(row["value"], row["interval"]),
            "–" if row["value"] is None else _verdict(row["reached"], row["surely_reached"]),
        ]
        for row in record["aims"]
    ]
    slopes = ""
    if "embedded" in record["slopes"]:
        first, *later = record["slopes"].values()
        needed = first["tokens_for_aim"]
        meets = f"; drawn on, it meets the aim at {needed / 1e6:.1f} M" if needed else ""
        ends = ", then ".join(map(_end_of, later))
        ends = (
            f" The later runs with a curve, on longer\ncontexts, ended with {ends}, tokens of the\n"
            "instruction stage counted."
            if later
            else ""
        )
        slopes = f"""
Autoencoding loss of the first pretraining run: {_end_of(first)}, and through its second half
a power law with the exponent {-first["exponent"]:.2f}{meets}.{ends}
The learning rate falls towards the end of a run, so the line is optimistic.
"""
    return f"""\
**Against its aims**: the embedded checkpoint, now and after the first of its pretraining runs, on held-out text
of {record["length"]} tokens, and its answers to all prompts ([aims.json](results/aims.json)):

{table(["", "aim", "after the first pretraining run", "now", "reached"], rows)}

Intervals hold 95%; those of shares count the sources whose own interval is above 0, and those where some
of it is. Answers are better by ROUGE-L where the references of a source have {SHORT_ANSWERS} words or more on average,
by token F1 elsewhere.
{slopes}"""


def layouts(record: Record) -> str:
    """Layouts and memory types at equal tokens."""
    rows = [
        [f"`{run['config']['memory_type']}`", run["config"]["encoder_layout"], *_end(run, "ae")]
        for run in record["runs"].values()
    ]
    tokens = next(iter(record["runs"].values()))["context_tokens"][-1]
    return f"""\
**What leaves the plateau**: the same base, 64-token spans to 16 slots, autoencoding only, {tokens / 1e3:.0f} k
context tokens each (`make comparison`; [curves](results/layouts.png)):

{table(["memory", "layout", "autoencoding loss", "with another text's slots", "accuracy"], rows)}
"""


def families(record: Record) -> str:
    """The recipe on bases of other families."""
    rows = [
        [name, f"{run['context_tokens'][-1] / 1e3:.0f} k", f"{run['ae_loss'][0]:.2f}", *_end(run, "ae")]
        for name, run in record["runs"].items()
    ]
    return f"""\
**On other families**: keys and values, uniform layouts and 64-token spans, as in the last row above, but with a
learning rate and batch of their own, on small bases that were trained from nothing, for minutes
(`python -m icae.evaluation.small_base`, `icae sweep evaluation/sweeps/families.yaml`;
[curves](results/families.png)):

{table(["base", "context tokens", "loss before", "autoencoding loss", "with another text's slots", "accuracy"], rows)}
"""


def ablations(record: Record) -> str:
    """The instruction stage after pretraining of several kinds."""
    rows = [[name, *_end(run, "response")] for name, run in record["runs"].items()]
    return f"""\
**What pretraining gives the instruction stage** (the paper's ablations at small scale: 64-token spans, 4x if nothing
else is said, equal tokens; `icae sweep evaluation/sweeps/ablations.yaml`, [curves](results/ablations.png)):

{table(["pretraining", "loss of the response", "with another text's slots", "accuracy"], rows)}
"""


def runs(record: Record) -> str:
    """Where training runs ended."""
    measured = dict.fromkeys(key for run in record["runs"].values() for key in run)
    columns = [key for key in measured if key not in ("config", "trained", "context_tokens")]
    rows = [
        [
            name,
            f"{run['context_tokens'][-1] / 1e3:,.0f} k",
            *(f"{run[key][-1]:.3g}" if key in run else "–" for key in columns),
        ]
        for name, run in record["runs"].items()
    ]
    return table(["at the end", "context tokens", *(column.replace("_", " ") for column in columns)], rows) + "\n"


def costs(record: Record) -> str:
    """What a training step costs, as ratios."""
    rows = [[name, f"{value:.2f}x"] for name, value in record["ratios"].items()]
    hardware = record["made_by"]["hardware"]
    dtype = record["arguments"].get("dtype", "the base as it is stored")
    return f"""\
**What training costs** (`icae bench train`, ratios within one run on {hardware["torch_threads"]} CPU threads,
{dtype}, {record["memory_batch"]["rows"]} rows of {record["arguments"]["span_length"]} tokens a step;
two copies: a plain loop with two copies of the base and all logits, one row at a time, as the official code trains):

{table(("", ""), rows)}
"""


def _kept(found: Record) -> list[str]:
    """What comes back of some text, under the heads `KEPT`."""
    measures = [f"{found['ae_loss']:.2f}", f"{found['ae_loss_other_text']:.1f}", f"{found['ae_accuracy']:.1%}"]
    written = [f"{found['exact_prefix']:.0%}", f"{found['bleu']:.2f}"] if "bleu" in found else ["–", "–"]
    return measures + written


def _end(run: Record, task: str) -> list[str]:
    """Where a run ended: loss, control and accuracy of a task."""
    loss, control, accuracy = (run[f"{task}_{name}"][-1] for name in ("loss", "loss_other_text", "accuracy"))
    return [f"{loss:.2f}", f"{control:.2f}", f"{accuracy:.1%}"]


def _end_of(run: Record) -> str:
    return f"{run['loss']:.2f} nats at {run['tokens'] / 1e6:.2f} M context tokens"


def _verdict(reached: bool, surely: bool | None) -> str:
    """`surely`: the whole interval reaches the aim; `None` where no interval is known."""
    return "no" if not reached else "yes, but not surely" if surely is False else "yes"


def _lengths(lengths: list[int]) -> str:
    return f"{', '.join(map(str, lengths[:-1]))} and {lengths[-1]} tokens" if lengths[1:] else f"{lengths[0]} tokens"


def _in_line(text: str) -> str:
    """A text from outside as part of a line: its letters mean nothing in Markdown or HTML."""
    escaped = "".join(f"&#{ord(letter)};" if letter in r"\`*_{}[]<>()#+-!|&~$:" else letter for letter in text)
    return " ".join(escaped.split())


def _texts(named: dict[str, str]) -> list[list[str]]:
    return [[name, _in_line(text) or "*nothing*"] for name, text in named.items()]
