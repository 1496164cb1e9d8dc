"""Held-out documents, cut into windows of tokens; what the commands about plain text have in common."""

import argparse
import hashlib
from collections.abc import Sequence
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from icae.cli import whole_number
from icae.evaluation.files import check_filled, read_rows
from icae.modeling_icae.chat_icae import encode_plain


Window = dict[str, Any]
Item = TypeVar("Item")


def add_document_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that say which text is read."""
    parser.add_argument("--data", help="Parquet or JSON file of documents (columns `text` and, if known, `source`)")
    parser.add_argument("--without", nargs="+", metavar="SOURCE", default=[], help="sources to leave out")


def add_window_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that say how text is cut."""
    parser.add_argument("--lengths", type=whole_number(1), nargs="+", default=[128, 256, 512], help="context tokens")
    parser.add_argument("--target-length", type=whole_number(1), default=128, help="tokens of the continuation")
    parser.add_argument("--per-source", type=whole_number(1), default=8, help="windows of each source")
    parser.add_argument("--batch-size", type=whole_number(1), default=4, help="windows read at once")


def load_documents(arguments: argparse.Namespace) -> tuple[Dataset, dict[str, Any]]:
    """
    The documents of `--data`, with the columns `text` and `source` (where there is none, `kind`, or one source for
    all), and what a record says about them. With `--quick`, the passages that the package brings are the default.

    Raises:
        `ValueError`: if there is no file, no column `text` or no source left.
    """
    if arguments.data is None and not arguments.quick:
        raise ValueError(
            "Expected `--data`, a Parquet or JSON file of documents with the column `text`, got none; only `--quick` "
            "goes without, on the passages that the package brings."
        )
    with as_file(files("icae") / "data" / "passages.json") as passages:
        file = Path(arguments.data or passages)
        content = file.read_bytes()
        documents = read_rows(str(file))
    if "text" not in documents.column_names:
        raise ValueError(f"Expected a column 'text' with documents in {file.name!r}, got {documents.column_names}.")
    if "source" not in documents.column_names:
        sources = documents["kind"] if "kind" in documents.column_names else ["all"] * len(documents)
        documents = documents.add_column("source", list(sources))
    check_filled(documents, ("text", "source"), file.name)
    known = sorted(set(documents["source"]))
    if unknown := set(arguments.without) - set(known):
        raise ValueError(f"Expected `--without` to name sources among {known}, got {sorted(unknown)}.")
    documents = documents.filter(lambda source: source not in arguments.without, input_columns=["source"])
    if not len(documents):
        raise ValueError(f"Expected at least one source besides {known}, which `--without` leaves out.")
    about = {"file": file.name, "sha256": hashlib.sha256(content).hexdigest(), "documents": len(documents)}
    return documents.select_columns(["text", "source"]), about


def cut_windows(
    documents: Dataset, tokenizer: PreTrainedTokenizerBase, length: int, per_source: int, seed: int
) -> list[Window]:
    """
    Windows of exactly `length` tokens that do not overlap, `per_source` of each source (fewer if it has no more),
    drawn from all of its documents, those of a source together: dicts of `ids` and `source`.

    Raises:
        `ValueError`: if there are fewer than two, as many as the control with another text needs.
    """
    found: dict[str, list[list[int]]] = {}
    for row in documents:
        (ids,) = encode_plain(tokenizer, [row["text"]])
        windows = [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]
        found.setdefault(row["source"], []).extend(windows)
    rng = np.random.default_rng(seed)
    chosen = {source: rng.permutation(len(windows))[:per_source] for source, windows in sorted(found.items())}
    cut = [{"ids": found[source][index], "source": source} for source, indices in chosen.items() for index in indices]
    if len(cut) < 2:
        raise ValueError(
            f"Expected documents with at least two windows of {length} tokens, got {len(cut)}; ask for shorter "
            "contexts or give more text."
        )
    return cut


def split_window(window: Window, length: int, target_length: int) -> tuple[list[int], list[int]]:
    """
    The context of a window and what follows it. The targets are the same tokens at every context length, so that
    lengths can be compared; shorter contexts are the ends of longer ones.
    """
    ids = window["ids"]
    return ids[-target_length - length : -target_length], ids[-target_length:]


def batches(items: Sequence[Item], size: int) -> list[list[Item]]:
    """
    The items in batches of nearly equal size, at least `size` if there are as many: no batch of a single item, which
    would have no other text to read as a control.

    Example:

    ```python
    >>> batches([1, 2, 3, 4, 5], 2)
    [[1, 2, 3], [4, 5]]
    ```

    Raises:
        `ValueError`: if `size` is below 2.
    """
    if size < 2:
        raise ValueError(f"Expected `--batch-size` of at least 2, because the control reads another row, got {size}.")
    parts = np.array_split(np.arange(len(items)), max(1, len(items) // size))
    return [[items[index] for index in part] for part in parts if len(part)]
