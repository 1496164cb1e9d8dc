"""
From documents to pretraining samples.

A document is cut, from its first token to its last, into contexts of whole spans; each context comes with the tokens
that follow it, and every token is in exactly one context. The cuts depend on the seed and the document's place in the
data set only — not on processes or what was read before. (Of a streamed data set it is the place in a worker's part.)
"""

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from datasets import Dataset, Features, IterableDataset, List, Value
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from icae.modeling_icae import chat_icae
from icae.modeling_icae.chat_icae import encode_plain


AnyDataset = TypeVar("AnyDataset", Dataset, IterableDataset)
IDS = List(Value("int64"))
# Of the samples: without, the type of a column of empty lists would stay open.
FEATURES = Features({"context_ids": IDS, "continuation_ids": IDS, "length": Value("int64")})


def cut_document(
    ids: list[int],
    rng: np.random.Generator,
    *,
    span_length: int,
    max_spans: int,
    short_share: float,
    continuation_length: int,
) -> list[tuple[list[int], list[int]]]:
    """
    Cuts one document into `(context, continuation)` pairs.

    Example:

    ```python
    >>> rng = np.random.default_rng(0)
    >>> cut_document([1, 2, 3, 4, 5, 6, 7], rng, span_length=4, max_spans=1, short_share=0, continuation_length=2)
    [([1, 2, 3, 4], [5, 6]), ([5, 6, 7], [])]
    ```
    """
    samples, start = [], 0
    while start < len(ids):
        length = int(rng.integers(1, max_spans + 1)) * span_length
        if rng.random() < short_share:
            length = int(rng.integers(1, length + 1))
        end = min(start + length, len(ids))
        samples.append((ids[start:end], ids[end : end + continuation_length]))
        start = end
    return samples


def shuffle_words(text: str, rng: np.random.Generator) -> str:
    r"""
    Shuffles the words of a text, with the white space behind them. No character is lost or added: where the last word
    has no space behind it, it may come to stand against another.

    Example:

    ```python
    >>> shuffle_words("The keeper had not spoken to anyone.\n", np.random.default_rng(0))
    'had spoken not anyone.\nto The keeper '
    ```
    """
    words = re.findall(r"\s*\S+\s*|\s+", text)
    return "".join(words[place] for place in rng.permutation(len(words)))


def prepare_pretraining_dataset(
    dataset: AnyDataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    span_length: int,
    max_spans: int = 2,
    short_share: float = 0.1,
    continuation_length: int = 32,
    shuffled_share: float = 0.0,
    seed: int = 0,
    text_column: str = "text",
    num_proc: int | None = None,
) -> AnyDataset:
    """
    Turns a data set of documents, in memory or streamed, into one with the columns `context_ids`, `continuation_ids`
    and `length` (tokens of the context).

    Names of control tokens in a document stay text. Contexts without a continuation (the ends of documents) are kept;
    they train autoencoding only. So do all of `shuffled_share` of the documents: their words are shuffled first (see
    [`shuffle_words`]), so that they cannot be guessed from each other. `num_proc` processes share the work on a data
    set in memory; the samples do not depend on it.

    Raises:
        `ValueError`: if there are no rows, `text_column` is missing, or a document is no text.
    """
    columns = dataset.column_names or list(next(iter(dataset), ()))  # a streamed data set may not know its columns
    if not columns or (isinstance(dataset, Dataset) and not len(dataset)):
        raise ValueError("Expected documents, got none; see what was selected of the data.")
    if text_column not in columns:
        raise ValueError(f"Expected a column {text_column!r} with documents, got {columns}; rename one of them to it.")

    cut = partial(  # not a function in this one: it could not be pickled for spawned workers that read a stream
        _cut_batch,
        tokenizer=tokenizer,
        text_column=text_column,
        shuffled_share=shuffled_share,
        continuation_length=continuation_length,
        seed=seed,
        code=code_digest(),
        cut=partial(cut_document, span_length=span_length, max_spans=max_spans, short_share=short_share),
    )
    how = {"batched": True, "with_indices": True, "batch_size": 64, "remove_columns": columns, "features": FEATURES}
    return dataset.map(cut, **how | processes(dataset, num_proc))


def _cut_batch(
    batch: dict[str, list],
    indices: list[int],
    *,
    tokenizer: PreTrainedTokenizerBase,
    text_column: str,
    shuffled_share: float,
    continuation_length: int,
    seed: int,
    code: str,
    cut: Callable[..., list[tuple[list[int], list[int]]]],
) -> dict[str, list]:
    """Contexts and continuations of documents, some with their words shuffled. `code` is the [`code_digest`]."""
    for index, text in zip(indices, batch[text_column], strict=True):
        if not isinstance(text, str):
            raise ValueError(f"Expected documents that are text, got {text!r} in row {index}; filter the rows.")
    rngs = [np.random.default_rng([seed, index]) for index in indices]
    shuffled = [shuffled_share > 0 and rng.random() < shuffled_share for rng in rngs]
    texts = [
        shuffle_words(text, rng) if shuffle else text
        for text, rng, shuffle in zip(batch[text_column], rngs, shuffled, strict=True)
    ]
    samples = []
    for ids, rng, shuffle in zip(encode_plain(tokenizer, texts), rngs, shuffled, strict=True):
        samples += cut(ids, rng, continuation_length=0 if shuffle else continuation_length)
    return {
        "context_ids": [context for context, _ in samples],
        "continuation_ids": [continuation for _, continuation in samples],
        "length": [len(context) for context, _ in samples],
    }


@cache
def code_digest() -> str:
    """
    Digest of the code that makes samples. `datasets` keeps them by the names of functions and by what these are given:
    without it, the samples of another version would come back.
    """
    names = ("pretraining_data.py", "sft_data.py")
    files = [Path(chat_icae.__file__), *(Path(__file__).with_name(name) for name in names)]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def processes(dataset: AnyDataset, num_proc: int | None) -> dict[str, int]:
    """How many processes may map a data set; a streamed one is mapped where it is read."""
    return {"num_proc": num_proc} if num_proc and isinstance(dataset, Dataset) else {}


@dataclass
class DataCollatorForICAEPretraining:
    """
    Pads contexts and continuations on the right.

    Example:

    ```python
    >>> collator = DataCollatorForICAEPretraining()
    >>> collator([dict(context_ids=[7, 8, 9], continuation_ids=[5]), dict(context_ids=[4, 3], continuation_ids=[])])
    {'context_ids': tensor([[7, 8, 9], [4, 3, 0]]),
     'context_mask': tensor([[True, True, True], [True, True, False]]),
     'continuation_ids': tensor([[5], [0]]),
     'continuation_mask': tensor([[True], [False]])}
    ```

    A batch without any continuation has no `continuation_ids`.
    """

    def __call__(self, samples: list[dict]) -> dict[str, torch.Tensor]:
        return pad_samples(samples, ("context", "continuation"))


def pad_samples(samples: list[dict], names: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Ids and masks of what samples hold under `{name}_ids`, padded on the right, without what no sample has."""
    batch = {}
    for name in names:
        rows = [torch.as_tensor(sample[f"{name}_ids"], dtype=torch.long) for sample in samples]
        lengths = torch.tensor([len(row) for row in rows])
        if lengths.max() > 0:
            batch[f"{name}_ids"] = pad_sequence(rows, batch_first=True)
            batch[f"{name}_mask"] = torch.arange(int(lengths.max())) < lengths[:, None]
    return batch
