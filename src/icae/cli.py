"""The command `icae`: use a model, train it, measure it, publish it; see `icae --help`."""

import argparse
import re
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.metadata import requires
from io import BytesIO, TextIOWrapper
from pathlib import Path

import yaml
from safetensors import SafetensorError, safe_open

from icae.dtypes import DTYPES, resolve_dtype


# Commands with parsers of their own.
OWN_PARSERS = {
    ("pretrain",): "icae.trainers.pretrain",
    ("sft",): "icae.trainers.sft",
    ("write-responses",): "icae.trainers.write_responses",
    ("write-preferences",): "icae.trainers.write_preferences",
    ("write-quotations",): "icae.trainers.write_quotations",
    ("average",): "icae.trainers.average",
    ("push",): "icae.hub_upload.command",
    ("sweep",): "icae.evaluation.sweep",
    ("card",): "icae.model_cards.card",
    ("convert",): "icae.hub_upload.convert",
    ("evaluate", "reconstruction"): "icae.evaluation.reconstruction",
    ("evaluate", "continuation"): "icae.evaluation.continuation",
    ("evaluate", "answers"): "icae.evaluation.answers",
    ("evaluate", "judge"): "icae.evaluation.judge",
    ("evaluate", "probes"): "icae.evaluation.probes",
    ("evaluate", "aims"): "icae.evaluation.aims",
    ("report",): "icae.evaluation.report",
    ("bench", "train"): "icae.evaluation.bench_train",
    ("bench", "generate"): "icae.evaluation.bench_generate",
}


def main(argv: list[str] | None = None) -> int:
    """Runs one subcommand. Returns 0, or 2 after an error that the user can mend."""
    argv = sys.argv[1:] if argv is None else argv
    if isinstance(sys.stdout, TextIOWrapper) and not sys.stdout.isatty():
        sys.stdout.reconfigure(encoding="utf-8")  # as files are read: a locale may lack letters
    for words, module in OWN_PARSERS.items():
        if tuple(argv[: len(words)]) == words:
            return _run(lambda: import_module(module).main(argv[len(words) :]))  # noqa: B023
    arguments = _parser().parse_args(argv)
    return _run(lambda: arguments.run(arguments))


def _run(command) -> int:
    try:
        command()
    except (ValueError, TypeError, ImportError, OSError, SafetensorError, yaml.YAMLError) as error:
        print(f"icae: {error}{_how_to_install(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    return 0


def _how_to_install(error: Exception) -> str:
    """Advice for a package that is missing because only some commands need it."""
    missing = (getattr(error, "name", None) or "").partition(".")[0]
    for requirement in requires("icae") or ():
        found = re.match(r"""([\w-]+).*extra == ["'](\w+)["']""", requirement)
        if isinstance(error, ModuleNotFoundError) and found and found[1].replace("-", "_") == missing:
            return f"; this command needs more than the others: `pip install 'icae[{found[2]}]'`"
    return ""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="icae", description="Compressed, reusable memories of long contexts.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    compress = commands.add_parser("compress", help="turn a text into a memory file")
    compress.add_argument("text", help="text file, or - for standard input")
    compress.add_argument("-o", "--output", required=True, help="memory file to write (safetensors)")
    compress.set_defaults(run=_compress)

    reconstruct = commands.add_parser(
        "reconstruct", help="write the text of a memory (or of a text, compressed first)"
    )
    reconstruct.add_argument("memory", help="memory file, text file, or - for a text on standard input")
    reconstruct.set_defaults(run=_reconstruct)

    ask = commands.add_parser("ask", help="answer prompts about texts or a memory, interactively without --prompt")
    ask.add_argument("--context", nargs="+", metavar="FILE", help="text files, or - for standard input")
    ask.add_argument("--memory", metavar="FILE", help="memory file, instead of texts")
    ask.add_argument("--prompt", nargs="+", metavar="TEXT", help="what to ask")
    ask.add_argument(
        "--max-new-tokens", type=whole_number(1), default=128, help="most tokens of an answer (default: 128)"
    )
    ask.set_defaults(run=_ask)

    demo = commands.add_parser("demo", help="compress passages of several kinds and show what comes back")
    demo.add_argument("--max-passages", type=int, help="show only the first ones")
    demo.add_argument("--json", help="also write the results to this file")
    demo.set_defaults(run=_demo)

    for command in (compress, ask):
        command.add_argument(
            "--window",
            type=int,
            metavar="TOKENS",
            help="for texts that are longer than the base has positions for: positions start again after so many",
        )
    for command in (compress, reconstruct, ask, demo):
        command.add_argument("--model", help="folder or Hub id of an ICAE (default: the embedded checkpoint)")
        command.add_argument("--base", help="folder or Hub id of its base, if not where the ICAE says")
        add_dtype_argument(command)

    # Listed here for --help only; `main` hands them on.
    commands.add_parser("pretrain", help="pretrain from a YAML file: icae pretrain --config FILE")
    commands.add_parser("sft", help="tune on triples from a YAML file: icae sft --config FILE")
    commands.add_parser("write-responses", help="responses of the frozen base with the whole context, to tune on")
    commands.add_parser("write-preferences", help="pairs of a model's own better and worse answers, to tune on")
    commands.add_parser("write-quotations", help="prompts whose responses stand in the context, to tune on")
    commands.add_parser("average", help="mean of the weights of checkpoints of one training")
    commands.add_parser("sweep", help="short training runs side by side, from a YAML file: icae sweep FILE")
    commands.add_parser("report", help="one page of all results, with plots")
    commands.add_parser("push", help="put a checkpoint on the Hub: icae push CHECKPOINT ORG/NAME")
    commands.add_parser("card", help="write the model card of a saved ICAE: icae card FOLDER")
    commands.add_parser("convert", help="official ICAE releases into this layout: icae convert FILE --base BASE")
    for name, text in (
        ("evaluate", "what slots keep: icae evaluate reconstruction | continuation | answers | judge | probes | aims"),
        ("bench", "what training and answering cost: icae bench train | generate"),
    ):
        kinds = [words[1] for words in OWN_PARSERS if words[0] == name]
        commands.add_parser(name, help=text).add_argument("what", choices=kinds)
    return parser


def add_dtype_argument(parser: argparse.ArgumentParser) -> None:
    """`--dtype`, by default what this machine is fast in."""
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="dtype of the base (default: auto; float32 on processors that only imitate bfloat16)",
    )


def whole_number(least: int) -> Callable[[str], int]:
    """For `type` of an argument: whole numbers of at least so much."""

    def read(word: str) -> int:
        if not re.fullmatch(r"[+-]?\d+", word) or int(word) < least:
            raise argparse.ArgumentTypeError(f"expected a whole number of at least {least}, got {word!r}")
        return int(word)

    return read


def load_model(model: str | None, base: str | None, dtype: str, **options):
    """The model that the common options name, on the accelerator if there is one."""
    import torch

    from icae import EMBEDDED_CHECKPOINT, ICAEConfig, ICAEForConditionalGeneration
    from icae.embedded import EMBEDDED_BASE_FINGERPRINT, embedded_base

    model = model or EMBEDDED_CHECKPOINT
    if model is None:
        raise ValueError(
            "Expected `--model`, the folder or Hub id of an ICAE: this installation has no embedded checkpoint, which "
            "only a source checkout carries."
        )
    try:
        config = ICAEConfig.from_pretrained(model)
    except OSError as error:  # which may not say what was looked for
        raise OSError(f"Expected the folder or Hub id of an ICAE, got {str(model)!r}: {error}") from error
    # Not by its name: others are trained on the weights that the Hub has under it.
    if base is None and config.base_model_fingerprint == EMBEDDED_BASE_FINGERPRINT:
        base = embedded_base()
    loaded = ICAEForConditionalGeneration.from_pretrained(
        model, base_model=base, dtype=resolve_dtype(dtype), **options
    )
    return loaded.to(torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu")


def _read_text(name: str) -> str:
    try:
        # Not as `sys.stdin` reads it, which is in the locale's encoding.
        file = BytesIO(sys.stdin.buffer.read()) if name == "-" else open(name, "rb")
        with TextIOWrapper(file, encoding="utf-8-sig") as text:
            return text.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"Expected a text file in UTF-8, got {name!r} ({error}).") from error


def _compress(arguments: argparse.Namespace) -> None:
    text = _read_text(arguments.text)
    if not (folder := Path(arguments.output).parent).is_dir():
        raise ValueError(f"Expected a folder for the memory file, found no {str(folder)!r}; make it first.")
    if Path(arguments.output).resolve() == Path(arguments.text).resolve():
        raise ValueError(f"Expected another file for the memory than the text's, got {arguments.output!r} for both.")
    model = load_model(arguments.model, arguments.base, arguments.dtype)
    memory = model.compress(text, window=arguments.window, progress=True)
    memory.save(arguments.output)
    print(
        f"{int(memory.num_tokens)} tokens -> {int(memory.num_slots)} slots, {memory.nbytes:,} bytes: "
        f"{arguments.output}",
        file=sys.stderr,
    )


def _reconstruct(arguments: argparse.Namespace) -> None:
    from icae import ICAEMemory

    source = ICAEMemory.load(arguments.memory) if _is_memory(arguments.memory) else _read_text(arguments.memory)
    print(load_model(arguments.model, arguments.base, arguments.dtype).reconstruct(source)[0])


def _ask(arguments: argparse.Namespace) -> None:
    from transformers import TextStreamer

    from icae import ICAEMemory

    if (arguments.context is None) == (arguments.memory is None):
        raise ValueError("Expected either `--context` or `--memory`, got neither or both.")
    if arguments.memory and arguments.window is not None:
        raise ValueError("Expected `--window` with `--context`, which is compressed now, got it with `--memory`.")
    if arguments.context and "-" in arguments.context and arguments.prompt is None:
        raise ValueError("Expected `--prompt` beside a context from standard input, which prompts would come from.")
    texts = [_read_text(name) for name in arguments.context or ()]
    model = load_model(arguments.model, arguments.base, arguments.dtype)
    if arguments.memory:
        memory = ICAEMemory.load(arguments.memory)
    else:
        memory = model.compress([texts], window=arguments.window, progress=True)
    print(f"{int(memory.num_tokens)} tokens in {int(memory.num_slots)} slots", file=sys.stderr)
    streamer = TextStreamer(model.tokenizer, skip_prompt=True, skip_special_tokens=True)
    for prompt in model.encode_prompts(arguments.prompt) if arguments.prompt else _typed_prompts(model):
        # Not `max_new_tokens`, of which the base may have too few positions left.
        length = {"max_length": len(prompt) + arguments.max_new_tokens, "max_new_tokens": None}
        model.generate(memory=memory, prompt=prompt, **length, do_sample=False, streamer=streamer)


def _typed_prompts(model) -> Iterator[list[int]]:
    """What is typed line by line, until an empty line or the end, as token ids."""
    while True:
        try:
            prompt = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        except UnicodeDecodeError as error:
            raise ValueError(f"Expected prompts in {sys.stdin.encoding}, got other bytes ({error}).") from error
        if not prompt:
            return
        yield from model.encode_prompts([prompt])


def _is_memory(name: str) -> bool:
    """Whether a file is in safetensors format; its name decides for files that are damaged."""
    if name == "-":
        return False
    if name.endswith(".safetensors"):
        return True
    try:
        with safe_open(name, framework="pt"):
            return True
    except FileNotFoundError:
        raise
    except Exception:  # the library has no common base class for its errors
        return False


def _demo(arguments: argparse.Namespace) -> None:
    from icae.demo import run_demo

    model = load_model(arguments.model, arguments.base, arguments.dtype)
    run_demo(
        model,
        max_passages=arguments.max_passages,
        json_file=arguments.json,
        reload=lambda: load_model(arguments.model, arguments.base, arguments.dtype),
    )


if __name__ == "__main__":
    sys.exit(main())
