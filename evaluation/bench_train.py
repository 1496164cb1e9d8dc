"""
What a training step costs: `icae bench train`.

Four things are timed in turn, several times, and compared within one run:

- `icae`: an autoencoding step (forward, backward, AdamW) of this package at the batch given;
- `products`: nothing but the matrix products of that step, shape by shape, dtype by dtype;
- `two_copies`: the step as the official code does it (getao/icae, v2) — an encoder and a decoder copy of the base, all
  hidden states kept, logits for every token of both, gradient checkpointing in the decoder, one row at a time;
- `compress` against one plain forward pass of the base over the same tokens.

All of it on the CPU. Peak memory is measured first, with one row, each variant in processes of its own (the median of
them), above what the loaded libraries take; this needs Linux.
"""

import argparse
import json
import statistics
from collections import Counter
from collections.abc import Callable

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from icae.cli import add_dtype_argument, whole_number
from icae.configuration_icae import ICAEConfig
from icae.dtypes import resolve_dtype
from icae.embedded import embedded_base
from icae.evaluation.arguments import command_line
from icae.evaluation.record import write_record
from icae.evaluation.timing import forget_peak, in_own_process, medians_in_turn, peak_bytes, timed
from icae.modeling_icae import ICAEForConditionalGeneration
from icae.trainers import cpu_attention  # noqa: F401  # registers the name "grouped"


PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.bmm.default, torch.ops.aten.addmm.default)


class ProductRecorder(TorchDispatchMode):
    """Counts the matrix products of a block by their operands' shapes, strides and dtypes."""

    def __init__(self):
        super().__init__()
        self.seen: Counter = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in PRODUCTS:
            operands = args[-2:]
            layout = tuple((tuple(x.shape), tuple(x.stride()), x.dtype) for x in operands)
            self.seen[func is PRODUCTS[1], layout] += 1
        return func(*args, **(kwargs or {}))


def replay(seen: Counter) -> Callable[[], None]:
    """A function that does the recorded products and nothing else."""
    work = []
    for (batched, layout), count in seen.items():
        operands = [torch.empty_strided(shape, stride, dtype=dtype).normal_() for shape, stride, dtype in layout]
        product = torch.bmm if batched else torch.mm
        work.append((product, operands, product(*operands), count))

    def run() -> None:
        for product, (left, right), out, count in work:
            for _ in range(count):
                product(left, right, out=out)

    return run


def icae_step(arguments) -> tuple[Callable[[], None], ICAEForConditionalGeneration]:
    """One training step of this package."""
    config = ICAEConfig(span_length=arguments.span_length, memory_type=arguments.memory_type)
    options = {"dtype": resolve_dtype(arguments.dtype, cpu=True), "attn_implementation": "grouped"}
    model = ICAEForConditionalGeneration.from_base(arguments.base, config, **options)
    model.train()
    optimizer = torch.optim.AdamW(model.trainable_parameters().values(), lr=1e-4, fused=True)
    ids = random_ids(arguments, model.config.text_config.vocab_size)

    def step() -> None:
        model(context_ids=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, model


def two_copies_step(arguments) -> Callable[[], None]:
    """The same step on two copies of the base, with all logits and hidden states, row by row."""
    dtype = resolve_dtype(arguments.dtype, cpu=True)
    encoder = AutoModelForCausalLM.from_pretrained(arguments.base, dtype=dtype)
    decoder = AutoModelForCausalLM.from_pretrained(arguments.base, dtype=dtype).requires_grad_(False)
    decoder.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    decoder.train()
    config = ICAEConfig(span_length=arguments.span_length)
    encoder = get_peft_model(
        encoder,
        LoraConfig(r=config.lora_r, lora_alpha=config.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    embed = decoder.get_input_embeddings()
    num_slots = config.max_slots_per_span
    special = torch.nn.Embedding(num_slots + 1, embed.embedding_dim)
    trained = [*(p for p in encoder.parameters() if p.requires_grad), *special.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    ids = random_ids(arguments, decoder.config.vocab_size)

    def step() -> None:
        for row in ids:
            text = embed(row[None])
            memory = special.weight[None, :num_slots].to(text.dtype)
            encoded = encoder(inputs_embeds=torch.cat([text, memory], dim=1), output_hidden_states=True)
            slots = encoded.hidden_states[-1][:, -num_slots:]
            mark = special.weight[None, num_slots:].to(text.dtype)
            decoded = decoder(inputs_embeds=torch.cat([slots, mark, text], dim=1), output_hidden_states=True)
            (F.cross_entropy(decoded.logits[0, num_slots:-1], row) / len(ids)).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def random_ids(arguments, vocabulary: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(arguments.seed)
    return torch.randint(5, vocabulary, (arguments.batch_size, arguments.span_length), generator=generator)


def measure_memory(arguments) -> None:
    """Runs in a process of its own: prints the peak of a step — the second, when the optimizer has its state — above
    the libraries' footprint."""
    libraries = peak_bytes()
    step = icae_step(arguments)[0] if arguments.memory_of == "icae" else two_copies_step(arguments)
    step()
    forget_peak()  # which so far is that of loading files
    step()
    print(json.dumps({"peak_bytes": peak_bytes() - libraries, "libraries_bytes": libraries}))


def memory_of(variant: str, arguments, batch_size: int) -> dict[str, int]:
    """
    What [`measure_memory`] finds in a process of its own.

    Raises:
        `ValueError`: if that process does not end well.
    """
    words = ["--memory-of", variant, "--base", arguments.base, "--span-length", str(arguments.span_length)]
    words += ["--batch-size", str(batch_size), "--memory-type", arguments.memory_type, "--dtype", arguments.dtype]
    return in_own_process(
        "icae.evaluation.bench_train",
        words,
        what=f"the peak memory of {variant!r}",
        way_out="give a smaller `--batch-size` or `--span-length`, and run this on Linux",
    )


def median_memory_of(variant: str, arguments) -> dict[str, int]:
    """With one row, which differs by some percent from process to process."""
    found = [memory_of(variant, arguments, 1) for _ in range(arguments.repeats)]
    return {name: round(statistics.median(one[name] for one in found)) for name in found[0]}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="icae bench train", description="What a training step costs.")
    parser.add_argument("--base", help="folder or Hub id of the base (default: the embedded one)")
    parser.add_argument("--memory-type", default="key_values", choices=["key_values", "hidden_states"])
    parser.add_argument("--span-length", type=whole_number(1), default=64, help="context tokens per row")
    parser.add_argument("--batch-size", type=whole_number(1), default=32, help="rows per step")
    add_dtype_argument(parser)
    parser.add_argument("--repeats", type=whole_number(1), default=5)
    parser.add_argument("--seed", type=whole_number(0), default=0)
    parser.add_argument("--output", default="results/bench_train.json")
    parser.add_argument("--memory-of", choices=["icae", "two_copies"], help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    arguments.base = arguments.base or embedded_base()
    dtype = resolve_dtype(arguments.dtype, cpu=True)
    arguments.dtype = str(dtype).removeprefix("torch.")
    if arguments.memory_of:
        measure_memory(arguments)
        return

    one_row = {variant: median_memory_of(variant, arguments) for variant in ("icae", "two_copies")}
    batch = memory_of("icae", arguments, arguments.batch_size)
    torch.manual_seed(arguments.seed)
    step, model = icae_step(arguments)
    with ProductRecorder() as recorder:
        step()
    ids = random_ids(arguments, model.config.text_config.vocab_size)
    plain = AutoModelForCausalLM.from_pretrained(arguments.base, dtype=dtype).eval()  # as a user would load it
    reader = ICAEForConditionalGeneration.from_base(arguments.base, model.config, dtype=dtype).eval()
    reader._make_trainable(False)

    @torch.no_grad()
    def forward(ids: torch.Tensor) -> None:
        plain.base_model(input_ids=ids)

    one_context = ids.reshape(1, -1)

    steps = {
        "icae": step,
        "products": replay(recorder.seen),
        "two_copies": two_copies_step(arguments),
        "compress": lambda: reader.compress(ids) and None,
        "forward": lambda: forward(ids),
        "compress_one_context": lambda: reader.compress(one_context) and None,
        "forward_one_context": lambda: forward(one_context),
    }
    medians = medians_in_turn({name: timed(step) for name, step in steps.items()}, arguments.repeats)
    seconds = {name: measured["seconds"] for name, measured in medians.items()}
    ratios = {
        "speed against two copies, row by row (at least 3)": seconds["two_copies"] / seconds["icae"],
        "time against its matrix products alone (at most 1.6)": seconds["icae"] / seconds["products"],
        "compress against one plain forward pass (at most 1.5)": seconds["compress"] / seconds["forward"],
        "the same, all rows joined to one context": seconds["compress_one_context"] / seconds["forward_one_context"],
        "peak memory against two copies, one row (at most 0.7)": one_row["icae"]["peak_bytes"]
        / one_row["two_copies"]["peak_bytes"],
    }
    tokens = arguments.batch_size * arguments.span_length
    write_record(
        arguments.output,
        {
            "what": "cost of a training step; ratios are within this run",
            "ratios": ratios,
            "seconds": seconds,
            "context_tokens_per_step": tokens,
            "context_tokens_per_second": {name: tokens / seconds[name] for name in ("icae", "two_copies")},
            "memory_one_row": one_row,
            "memory_batch": batch | {"rows": arguments.batch_size},
            "arguments": {key: value for key, value in vars(arguments).items() if key not in ("base", "memory_of")},
        },
        command=command_line(parser, argv),
    )
    for name, value in ratios.items():
        print(f"{value:6.2f}  {name}")
    print(f"{tokens / seconds['icae']:6.0f}  context tokens per second; written to {arguments.output}")


if __name__ == "__main__":
    main()
