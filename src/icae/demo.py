"""`icae demo`: what comes back from a memory, passage by passage."""

import difflib
import itertools
import json
import re
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from .evaluation.readers import TokenReader
from .modeling_icae import GREEDY, ICAEForConditionalGeneration, ICAEMemory
from .modeling_icae.chat_icae import encode_plain


COLUMN = 58  # characters
ANSWER_LENGTH = 24  # tokens


def run_demo(
    model: ICAEForConditionalGeneration,
    *,
    reload: Callable[[], ICAEForConditionalGeneration],
    max_passages: int | None = None,
    json_file: str | None = None,
) -> list[dict[str, Any]]:
    """
    Compresses the packaged passages, writes them out again and shows both with the differences marked; answers
    questions about them from the slots, beside the answers with the full context and with no context; then saves the
    memories, loads them into a second instance of the model and checks that they read the same.

    Args:
        model ([`ICAEForConditionalGeneration`]): the model.
        reload (`Callable`): makes the second instance.
        max_passages (`int`, *optional*): show only the first ones.
        json_file (`str`, *optional*): where to write the numbers.

    Raises:
        `ValueError`: if no passage is left to show, or the folder for the numbers is missing.
        `RuntimeError`: if a memory reads differently after saving and loading.
    """
    if max_passages is not None and max_passages < 1:
        raise ValueError(f"Expected at least one of the passages to show, got `max_passages` {max_passages}.")
    if json_file and not (place := Path(json_file).parent).is_dir():  # now, not after all of it
        raise ValueError(f"Expected a folder for the numbers, found no {str(place)!r}; make it first.")
    passages = json.loads(files("icae").joinpath("data/passages.json").read_text(encoding="utf-8"))[:max_passages]
    results, memories = [], []
    for passage in passages:
        ids = torch.tensor(tokenize(model, passage["text"]))[None]
        start = time.perf_counter()
        memory = model.compress(passage["text"])
        compressed = time.perf_counter()
        text = model.reconstruct(memory)[0]
        done = time.perf_counter()
        found = tokenize(model, text)
        matches = difflib.SequenceMatcher(None, ids[0].tolist(), found, autojunk=False)
        result = {
            "kind": passage["kind"],
            "tokens": int(memory.num_tokens),
            "slots": int(memory.num_slots),
            "memory_bytes": memory.nbytes,
            "full_cache_bytes": full_cache_bytes(model, ids),
            "compress_seconds": compressed - start,
            "reconstruct_seconds": done - compressed,
            "tokens_kept": sum(block.size for block in matches.get_matching_blocks()) / ids.shape[1],
            "original": passage["text"],
            "reconstruction": text,
            "answers": [answer(model, memory, passage["text"], question) for question in passage["questions"]],
        }
        show(result)
        results.append(result)
        memories.append(memory)

    print("Saving the memories, loading them into a second instance of the model, reading them again …")
    second = reload()
    with tempfile.TemporaryDirectory() as folder:
        for result, memory in zip(results, memories, strict=True):
            path = Path(folder) / "memory.safetensors"
            memory.save(path)
            if second.reconstruct(ICAEMemory.load(path))[0] != result["reconstruction"]:
                raise RuntimeError(f"The memory of the passage {result['kind']!r} reads differently after loading.")
    kept = sum(result["tokens_kept"] * result["tokens"] for result in results)
    tokens = sum(result["tokens"] for result in results)
    print(f"All {len(results)} read the same. {kept / tokens:.0%} of {tokens} tokens came back.")
    if json_file:
        Path(json_file).write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return results


def answer(model: ICAEForConditionalGeneration, memory: ICAEMemory, context: str, question: str) -> dict[str, str]:
    """A question with its answers: from the slots, and from the frozen base with the full and with no context."""
    row = {"context_ids": tokenize(model, context), "prompt_ids": model.encode_prompts([question])[0]}
    slots = model.generate(memory=memory, prompt=question, max_new_tokens=ANSWER_LENGTH, **GREEDY)
    full = TokenReader(model.language_model, model, lambda ids: ids)
    none = TokenReader(model.language_model, model, lambda ids: [])
    return {
        "question": question,
        "from the slots": model.tokenizer.decode(slots[0], skip_special_tokens=True),
        "full context": full.answers([row], ANSWER_LENGTH)[0],
        "no context": none.answers([row], ANSWER_LENGTH)[0],
    }


def tokenize(model: ICAEForConditionalGeneration, text: str) -> list[int]:
    """The token ids that `compress` sees."""
    return encode_plain(model.tokenizer, [text])[0]


@torch.no_grad()
def full_cache_bytes(model: ICAEForConditionalGeneration, ids: torch.Tensor) -> int:
    """Bytes of the key-value cache that the base needs for the whole text, measured."""
    cache = DynamicCache(config=model.language_model.config)
    model.language_model.base_model(input_ids=ids.to(model.device), past_key_values=cache, use_cache=True)
    return sum(states.nbytes for layer in cache.layers for states in (layer.keys, layer.values))


def show(result: dict[str, Any]) -> None:
    """Prints one passage beside its reconstruction."""
    ratio = result["full_cache_bytes"] / result["memory_bytes"]
    print(
        f"── {result['kind']} ── {result['tokens']} tokens -> {result['slots']} slots, "
        f"{result['memory_bytes']:,} of {result['full_cache_bytes']:,} bytes ({ratio:.1f}x smaller), "
        f"compressed in {result['compress_seconds']:.2f} s, written out in {result['reconstruct_seconds']:.1f} s, "
        f"{result['tokens_kept']:.0%} of the tokens came back"
    )
    columns = mark_differences(result["original"], result["reconstruction"], sys.stdout.isatty())
    for left, right in itertools.zip_longest(*[[title, *lines] for title, lines in columns.items()], fillvalue=""):
        print(f"{left}{' ' * (COLUMN - visible(left))} │ {right}")
    for answers in result["answers"]:
        print(*(f"{name + ':':16s}{text.strip()}" for name, text in answers.items()), sep="\n")
    print()


def mark_differences(original: str, reconstruction: str, color: bool) -> dict[str, list[str]]:
    """
    Both texts as lines of a column, with the words marked that the other one lacks: in colour, or in [brackets].
    """
    left, right = (re.findall(r"\n *|[^ \n]+", text) for text in (original, reconstruction))
    marks = ("\033[31m", "\033[0m"), ("\033[33m", "\033[0m")
    if not color:
        marks = ("[", "]"), ("[", "]")
    words: tuple[list[str], list[str]] = ([], [])
    for kind, i1, i2, j1, j2 in difflib.SequenceMatcher(None, left, right, autojunk=False).get_opcodes():
        for side, part, (opening, closing) in zip(words, (left[i1:i2], right[j1:j2]), marks, strict=True):
            equal = kind == "equal"
            side += [word if equal or word.isspace() else f"{opening}{word}{closing}" for word in part]
    return {"original": wrap(words[0]), "reconstruction": wrap(words[1])}


def wrap(words: list[str]) -> list[str]:
    """Lines of at most a column's width, if no word is wider. (`textwrap` would count colours as letters.)"""
    lines = [""]
    for word in words:
        if word.startswith("\n"):
            lines.append(word[1:])  # the indent of a new line
            continue
        longer = f"{lines[-1]} {word}" if lines[-1].strip() else f"{lines[-1]}{word}"
        if visible(longer) <= COLUMN:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def visible(text: str) -> int:
    """Letters that take up room in a terminal."""
    return len(re.sub(r"\033\[\d+m", "", text))
