"""
What answering costs, from slots and from the whole context: `icae bench generate` (paper, table 7).

For each batch size and context length, the same prompt is answered

- `full context`: by the frozen base with the context in its prompt;
- `full context, kept`: the same from the context's key-value cache, computed once and kept (prefix caching, the rival
  of kept slots);
- for each compression ratio, from slots: `compress` makes them, `cached` answers from them, `load` reads them from a
  file.

Steps take turns within one run; each is measured several times and the median is taken. All sides use the same base,
dtype and attention (sdpa), write the same number of tokens and stop nowhere earlier. What an answer costs does not
depend on what a model was trained on, so ratios other than the checkpoint's are measured with untrained ICAEs.

Peak memory is that of one answer above the loaded model, each variant in a process of its own.
"""

import copy
import itertools
import json
import math
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache, StoppingCriteria, StoppingCriteriaList

from icae.cli import load_model, whole_number
from icae.evaluation.arguments import Parts, evaluation_parser, finish, identity, parse
from icae.evaluation.timing import in_own_process, medians_in_turn, peak_bytes_of
from icae.modeling_icae import ICAEForConditionalGeneration, ICAEMemory


QUESTION = "What is it about?"
QUICK = {"contexts": [256], "new_tokens": 8, "repeats": 1, "memory": False}
Step = Callable[[], dict[str, float]]


class Clock(StoppingCriteria):
    """Notes when each token is there."""

    def __init__(self):
        self.start, self.times = time.perf_counter(), []

    def __call__(self, input_ids, scores, **kwargs):
        _wait()
        self.times.append(time.perf_counter() - self.start)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def answering(
    generate: Callable[..., Any], new_tokens: int, prepare: Callable[[], dict[str, Any]] | None = None
) -> Step:
    """
    A step that answers, and returns the seconds to the first token, of all, and the tokens per second behind it. What
    `prepare` makes for it is not timed.
    """

    def run() -> dict[str, float]:
        prepared = prepare() if prepare else {}
        clock = Clock()
        options = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}
        rows = len(generate(**prepared, **options, stopping_criteria=StoppingCriteriaList([clock])))
        first, total = clock.times[0], clock.times[-1]
        speed = rows * (new_tokens - 1) / (total - first) if new_tokens > 1 else math.nan
        return {"first_token": first, "total": total, "tokens_per_second": speed}

    return run


def once(work: Callable[[], Any]) -> Step:
    """A step that does some work once and returns its seconds."""

    def run() -> dict[str, float]:
        _wait()
        start = time.perf_counter()
        work()
        _wait()
        return {"seconds": time.perf_counter() - start}

    return run


class FullContext:
    """Answers of the base with the context in its prompt, from the start or from its cache that was kept."""

    def __init__(self, base, model: ICAEForConditionalGeneration, context: torch.Tensor):
        self.base = base
        before = model._prefix("instruction").to(context.device).expand(len(context), -1)
        prompt = torch.tensor(model.encode_prompts([QUESTION]), device=context.device).expand(len(context), -1)
        self.context = torch.cat([before, context], dim=1)
        self.ids = torch.cat([self.context, prompt], dim=1)

    def generate(self, **options):
        return self.base.generate(self.ids, attention_mask=torch.ones_like(self.ids), **options)

    @torch.no_grad()
    def prefill(self) -> DynamicCache:
        cache = DynamicCache(config=self.base.config)
        self.base.base_model(self.context, past_key_values=cache, use_cache=True)
        return cache


def load_memory(file: Path, device: torch.device) -> ICAEMemory:
    """A memory from its file, where it is read."""
    return ICAEMemory.load(file).to(device)


def cache_bytes(generate: Callable[..., Any]) -> int:
    """Bytes of keys and values when the first token is there."""
    cache = generate(max_new_tokens=1, return_dict_in_generate=True, do_sample=False).past_key_values
    return sum(states.nbytes for layer in cache.layers for states in (layer.keys, layer.values))


# ---------------------------------------------------------------------------------------------------------- one cell


def measure(base, models: dict[str, ICAEForConditionalGeneration], batch: int, length: int, arguments) -> dict:
    """All variants at one batch size and context length."""
    context = random_ids(base, batch, length, arguments.seed)
    model = next(iter(models.values()))
    full = FullContext(base, model, context)
    limit, needed = model._num_positions, full.ids.shape[1] + arguments.new_tokens
    if needed > limit:
        raise ValueError(
            f"Expected `--contexts` of at most {length + limit - needed} tokens, which with prompt and answer is what "
            f"the base has positions for, got {length}."
        )
    kept = full.prefill()
    steps: dict[str, Step] = {
        "full context": answering(full.generate, arguments.new_tokens),
        "prefill": once(full.prefill),
        "full context, kept": answering(
            full.generate, arguments.new_tokens, lambda: {"past_key_values": copy.deepcopy(kept)}
        ),
    }
    bytes_of = {"full context": cache_bytes(full.generate)}
    slots = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, model in models.items():
            memory = model.compress(context)
            file = Path(folder) / f"{name}.safetensors"
            memory.save(file)
            slots[name] = int(memory.num_slots[0])
            generate = partial(model.generate, memory=memory, prompt=QUESTION)
            bytes_of[name] = cache_bytes(generate)
            steps |= {
                f"{name} compress": once(partial(model.compress, context)),
                f"{name} load": once(partial(load_memory, file, context.device)),
                f"{name} cached": answering(generate, arguments.new_tokens),
            }
        seconds = medians_in_turn(steps, arguments.repeats)
    peak = {}
    if arguments.memory:
        peak = {"full context": memory_of("full", None, batch, length, arguments)}
        for name, model in models.items():
            ratio = None if model.name_or_path else name
            for kind in ("icae", "cached"):
                peak[f"{name} {kind}"] = memory_of(kind, ratio, batch, length, arguments)
    return {
        "batch": batch,
        "context_tokens": length,
        "slots": slots,
        "seconds": seconds,
        "cache_bytes": bytes_of,
        "peak_bytes": peak,
        "ratios": {name: compare(name, seconds, bytes_of, peak) for name in models},
    }


def compare(name: str, seconds: dict, bytes_of: dict, peak: dict) -> dict[str, float | None]:
    """What slots of one ratio cost against the full context; above 1 is faster."""
    full, kept = seconds["full context"], seconds["full context, kept"]
    compress, load = (seconds[f"{name} {step}"]["seconds"] for step in ("compress", "load"))
    cached = seconds[f"{name} cached"]
    found = {
        "first token from cached slots, times faster": full["first_token"] / cached["first_token"],
        "load and first token, times faster": full["first_token"] / (load + cached["first_token"]),
        "compress and first token, times faster": full["first_token"] / (compress + cached["first_token"]),
        "answer from cached slots, times faster": full["total"] / cached["total"],
        "compress and answer once, times faster": full["total"] / (compress + cached["total"]),
        "tokens per second": cached["tokens_per_second"] / full["tokens_per_second"],
        "answer against the kept full cache, times faster": kept["total"] / cached["total"],
        "bytes of keys and values": bytes_of[name] / bytes_of["full context"],
        "pays from so many prompts": break_even(compress, full["total"] - cached["total"]),
        "pays against the kept full cache from so many prompts": break_even(
            compress - seconds["prefill"]["seconds"], kept["total"] - cached["total"]
        ),
    }
    if peak:
        found["peak memory, compress and answer"] = peak[f"{name} icae"] / peak["full context"]
        found["peak memory, cached slots"] = peak[f"{name} cached"] / peak["full context"]
    return found


def break_even(spent: float, saved_per_prompt: float) -> int | None:
    """From how many prompts on a context it pays to have spent so many seconds on it once; None: never."""
    return max(1, math.ceil(spent / saved_per_prompt)) if saved_per_prompt > 0 else None


def random_ids(base, batch: int, length: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, base.config.vocab_size, (batch, length), generator=generator).to(base.device)


def _wait() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


# ------------------------------------------------------------------------------------------------------------ models


def load_icaes(arguments) -> dict[str, ICAEForConditionalGeneration]:
    """The checkpoint, or untrained ICAEs of the same form at each of the ratios given, by name."""
    model = load_model(arguments.model, arguments.base, arguments.dtype, attn_implementation="sdpa")
    if not arguments.ratios:
        length = model.config.span_length
        return {f"{length / model.config.max_slots_per_span:g}x": model}
    models = {}
    for ratio in arguments.ratios:
        config = copy.deepcopy(model.config)
        config.compression_ratio, config.num_memory_slots = ratio, None
        torch.manual_seed(arguments.seed)
        untrained = ICAEForConditionalGeneration.from_base(
            model.language_model.name_or_path,
            config,
            tokenizer=model.tokenizer,
            dtype=model.language_model.dtype,
            attn_implementation="sdpa",
        ).eval()
        untrained._make_trainable(False)
        models[f"{ratio:g}x"] = untrained.to(model.device)
    return models


def load_plain(model: ICAEForConditionalGeneration):
    """
    The base as a user would load it, without an adapter inside; frozen as an ICAE's is, since torch multiplies frozen
    weights in another way on CPUs.
    """
    base = AutoModelForCausalLM.from_pretrained(
        model.language_model.name_or_path, dtype=model.language_model.dtype, attn_implementation="sdpa"
    )
    return base.requires_grad_(False).eval().to(model.device)


def memory_of(kind: str, ratio: str | None, batch: int, length: int, arguments) -> int:
    """Peak bytes of one answer, in a process of its own."""
    words = ["--memory-of", kind, "--batches", str(batch), "--contexts", str(length)]
    words += ["--new-tokens", str(arguments.new_tokens), "--dtype", arguments.dtype]
    for option in ("model", "base"):
        if value := getattr(arguments, option):
            words += [f"--{option}", value]
    if ratio is not None:
        words += ["--ratios", ratio.removesuffix("x")]
    what = f"the peak memory of {kind!r} at {batch} x {length:,} tokens"
    way_out = "`--no-memory` leaves peaks out"
    return in_own_process("icae.evaluation.bench_generate", words, what=what, way_out=way_out)["peak_bytes"]


def measure_memory(arguments) -> None:
    """
    What the process of [`memory_of`] does. A short answer first, so that nothing but this one is counted; cached slots
    are counted with it.
    """
    (model,) = load_icaes(arguments).values()
    base = load_plain(model) if arguments.memory_of == "full" else model.language_model
    options = {"max_new_tokens": arguments.new_tokens, "min_new_tokens": arguments.new_tokens, "do_sample": False}

    def prepare(length: int) -> Callable[[], Any]:
        context = random_ids(base, arguments.batches[0], length, arguments.seed)
        if arguments.memory_of == "full":
            return lambda: FullContext(base, model, context).generate(**options)
        if arguments.memory_of == "icae":
            return lambda: model.generate(context, QUESTION, **options)
        model.compress(context).save(slots)
        return lambda: model.generate(memory=ICAEMemory.load(slots), prompt=QUESTION, **options)

    with tempfile.TemporaryDirectory() as folder:
        slots = Path(folder) / "slots.safetensors"
        prepare(16)()
        print(json.dumps({"peak_bytes": peak_bytes_of(prepare(arguments.contexts[0]))}))


def main(argv: list[str] | None = None) -> None:
    parser = evaluation_parser("bench generate", "What answering costs, from slots and from the whole context.")
    parser.add_argument("--batches", type=whole_number(1), nargs="+", default=[1], help="rows answered at once")
    parser.add_argument("--contexts", type=whole_number(1), nargs="+", default=[512, 2048], help="context tokens")
    parser.add_argument("--ratios", type=float, nargs="+", help="tokens per slot (default: the checkpoint's)")
    parser.add_argument("--new-tokens", type=whole_number(1), default=64, help="length of an answer")
    parser.add_argument("--repeats", type=whole_number(1), default=3)
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="leave peak memory out")
    parser.add_argument("--memory-of", choices=["full", "icae", "cached"], help="(internal) one peak")
    arguments = parse(parser, argv, QUICK)
    if arguments.memory_of:
        measure_memory(arguments)
        return
    models = load_icaes(arguments)
    base = load_plain(next(iter(models.values())))
    cells = []
    parts = Parts(arguments)
    weights = [identity(model) for model in models.values()]
    for batch, length in itertools.product(arguments.batches, arguments.contexts):
        cell = parts(
            lambda: measure(base, models, batch, length, arguments),  # noqa: B023
            batch=batch,
            context=length,
            weights=weights,
        )
        cells.append(cell)
        for name, ratios in cell["ratios"].items():
            print(f"{batch} x {length:,} tokens, {name}")
            for what, value in ratios.items():
                print(f"  {'never' if value is None else f'{value:.2f}':>7s}  {what}")
    record = {
        "what": "cost of an answer from slots and from the full context; ratios are within this run",
        "attention": "sdpa",
        "cells": cells,
    }
    finish(parser, argv, arguments, parts, record)


if __name__ == "__main__":
    main()
