"""
From (context, prompt, response) triples to samples of the instruction stage.

Which samples train reconstruction and continuation instead depends on the seed and the row's place in the data set
only, not on processes. (Of a streamed data set it is the place in a worker's part.)
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features, List, concatenate_datasets, interleave_datasets
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from icae.configuration_icae import ICAEConfig
from icae.evaluation.triples import PWC_NAMES
from icae.modeling_icae import ICAEForConditionalGeneration
from icae.modeling_icae.chat_icae import encode_contexts, encode_prompt, encode_response

from .pretraining_data import (
    FEATURES,
    IDS,
    AnyDataset,
    code_digest,
    cut_document,
    pad_samples,
    prepare_pretraining_dataset,
    processes,
)


logger = logging.get_logger(__name__)

SAMPLE_FEATURES = Features(
    {
        **FEATURES,
        "context_lengths": IDS,
        "prompt_ids": List(IDS),
        "response_ids": List(IDS),
        "rejected_ids": List(IDS),
    }
)
SHORT_SHARE = 0.1  # of the samples that train reconstruction: cut short at a random length


def prepare_sft_dataset(
    dataset: AnyDataset,
    model: ICAEForConditionalGeneration,
    *,
    max_prompts: int = 1,
    pretraining_share: float = 0.0,
    documents: AnyDataset | None = None,
    max_spans: int = 2,
    continuation_length: int = 32,
    shuffled_share: float = 0.0,
    max_context_length: int | None = None,
    seed: int = 0,
    num_proc: int | None = None,
) -> AnyDataset:
    """
    Turns a data set of triples, in memory or streamed, into one with the columns `context_ids`, `context_lengths`,
    `continuation_ids`, `prompt_ids`, `response_ids`, `rejected_ids` (each of the last three a list of lists, one per
    prompt) and `length` (tokens of the context).

    Columns of triples are `context`, `prompt`, `response` or PwC's `input`, `prompt`, `answer`; or `context` and
    `messages`, a conversation about the context whose last message, the assistant's, is the response, and whose first
    one is the user's: a template puts a system's in front of the context, where no row can have one of its own. A
    context may be a list of texts, each of which is compressed apart.

    A column `rejected` holds responses that the ones beside them are preferred to, for preference tuning; rows may
    have none. Beside prompts, responses of either kind may also be token ids, such as a model wrote: they are taken as
    they are, and end only if they end with an end token.

    Args:
        dataset (`Dataset` or `IterableDataset`): the triples.
        model ([`ICAEForConditionalGeneration`]): gives tokenizer, chat template and span length.
        max_prompts (`int`, *optional*, defaults to 1):
            Neighbouring rows with the same context become one sample of up to so many prompts, which share the
            context's encoder pass. Shuffle the samples, not the rows; a warning counts contexts that come again apart.
        pretraining_share (`float`, *optional*, defaults to 0.0):
            Share of samples that train reconstruction and continuation. They come beside the rows whose contexts they
            are cut from, or from `documents`.
        documents (`Dataset` or `IterableDataset`, *optional*):
            Rows of `text`, as in pretraining, streamed if the triples are. With them, these samples are cut from
            texts of all kinds, not from the contexts of the triples: what no triple is about is not forgotten either.
            As many are drawn as the share says, the same in each epoch; if the documents are fewer, they repeat.
        max_spans (`int`, *optional*, defaults to 2): such a sample has 1 to `max_spans` whole spans.
        continuation_length (`int`, *optional*, defaults to 32): tokens of the continuation of such a sample.
        shuffled_share (`float`, *optional*, defaults to 0.0):
            Share of `documents` whose words are shuffled, see [`prepare_pretraining_dataset`].
        max_context_length (`int`, *optional*):
            Rows with more context tokens are left out, as are those that the base has no positions for. A warning
            counts them, unless they are streamed.
        seed (`int`, *optional*, defaults to 0): of the choice of these samples.
        num_proc (`int`, *optional*): processes that tokenise data sets in memory.

    Raises:
        `ValueError`: if columns are missing or of two kinds, a text is empty or none, a conversation is of another
            form, no row is left, `documents` come without a share for them, in another form than the triples, or
            without a token, or a `shuffled_share` comes without documents.
    """
    if documents is not None and not pretraining_share:
        raise ValueError("Expected a `pretraining_share` above 0 with `documents`, got 0; say how many to mix in.")
    if shuffled_share and documents is None:
        raise ValueError(
            f"Expected `documents` with a `shuffled_share` of {shuffled_share}, got none: words of contexts, which "
            "prompts are about, are not shuffled; give documents, or leave the share at 0."
        )
    if documents is not None and type(documents) is not type(dataset):
        raise ValueError(
            f"Expected `documents` in the form of the triples, {type(dataset).__name__}, got "
            f"{type(documents).__name__}; stream both or none."
        )
    # A streamed data set may not know its columns.
    columns: list[str] = dataset.column_names or list(next(iter(dataset), ()))
    if not columns or (isinstance(dataset, Dataset) and not len(dataset)):
        raise ValueError("Expected triples, got none; see what was selected of the data.")
    if set(columns) >= {"input", "prompt", "answer"}:
        if both := sorted({*PWC_NAMES.values()} & {*columns}):
            raise ValueError(f"Expected PwC's columns or this package's, got both ({columns}); remove {both}.")
        dataset = dataset.rename_columns(PWC_NAMES)
        columns = [PWC_NAMES.get(name, name) for name in columns]
    if not set(columns) >= {"context", "prompt", "response"} and not set(columns) >= {"context", "messages"}:
        raise ValueError(
            "Expected the columns `context`, `prompt`, `response`, or `input`, `prompt`, `answer`, or `context`, "
            f"`messages`, got {columns}; rename them."
        )
    if {"response", "messages"} <= set(columns):
        raise ValueError(f"Expected either `prompt`, `response` or `messages`, got {columns}; remove one of them.")

    if isinstance(dataset, Dataset) and max_prompts > 1:
        hashes = [hash(str(context)) for context in dataset["context"]]  # texts would fill the memory
        apart = sum(1 for _ in groupby(hashes)) - len(set(hashes))
        if apart:
            logger.warning(
                f"{apart} times a context comes again after rows about others: only neighbours share its encoder pass,"
                f" up to `max_prompts` ({max_prompts}). Sort rows by context; training shuffles the samples."
            )

    # Not the model itself in what follows: `datasets` pickles what a function refers to. Nor functions in functions:
    # they cannot be pickled for spawned workers that read a stream.
    tokenizer, config = model.tokenizer, model.config
    positions = config.num_positions
    mixed_in = pretraining_share / (1 - pretraining_share)  # samples per sample with prompts
    encode = partial(
        _encode_row,
        tokenizer=tokenizer,
        end_token_ids=model.end_token_ids,
        vocab_size=config.text_config.vocab_size,
        code=code_digest(),
    )
    fits = partial(
        _fits,
        config=config,
        prefix_length=len(model._prefix("instruction")),
        max_context_length=max_context_length,
        positions=positions,
    )
    cut = partial(
        cut_document,
        span_length=config.span_length,
        max_spans=max_spans,
        short_share=SHORT_SHARE,
        continuation_length=continuation_length,
    )
    cuts_per_sample = 0 if documents is not None else mixed_in
    mix = partial(_mix, max_prompts=max_prompts, cut=cut, cuts_per_sample=cuts_per_sample, seed=seed)

    encoded = dataset.map(encode, with_indices=True, remove_columns=columns, **processes(dataset, num_proc))
    fitting = encoded.filter(fits, input_columns=["context_lengths", "prompt_ids", "response_ids", "rejected_ids"])
    if isinstance(encoded, Dataset) and len(fitting) < len(encoded):
        left_out = (
            f"{len(encoded) - len(fitting)} of {len(encoded)} rows, which are longer than "
            f"`max_context_length` ({max_context_length}) or than what the base has positions for ({positions})"
        )
        if not len(fitting):
            raise ValueError(f"Expected rows to train on, got none but {left_out}; raise it, or shorten contexts.")
        logger.warning(f"Left out {left_out}.")
    samples = fitting.map(mix, batched=True, with_indices=True, batch_size=64, features=SAMPLE_FEATURES)
    if documents is None:
        return samples
    cuts = partial(
        prepare_pretraining_dataset,
        tokenizer=tokenizer,
        span_length=config.span_length,
        max_spans=max_spans,
        short_share=SHORT_SHARE,
        continuation_length=continuation_length,
        shuffled_share=shuffled_share,
        seed=seed,
        num_proc=num_proc,
    )
    if isinstance(samples, Dataset):
        number = max(1, round(mixed_in * len(samples)))
        found = cuts(documents.shuffle(seed=seed).take(min(number, len(documents)))).shuffle(seed=seed)
        if not len(found):
            raise ValueError("Expected `documents` of at least one token, got none; filter the rows.")
        drawn = found.select(np.arange(number) % len(found))
        return concatenate_datasets([samples, drawn.map(_without_prompts, features=SAMPLE_FEATURES)])
    shuffled = documents.shuffle(seed=seed, buffer_size=1_000)
    endless = cuts(shuffled).map(_without_prompts, features=SAMPLE_FEATURES).repeat(None)
    shares = [1 - pretraining_share, pretraining_share]
    return interleave_datasets([samples, endless], probabilities=shares, seed=seed)


def _encode_row(
    row: dict[str, Any],
    index: int,
    *,
    tokenizer: PreTrainedTokenizerBase,
    end_token_ids: list[int],
    vocab_size: int,
    code: str,
) -> dict[str, Any]:
    """The token ids of one triple. `code` is the [`code_digest`]."""
    try:
        prompt, response = _prompt_and_response(row)
        contexts = encode_contexts(tokenizer, row["context"] or "")
        prompt_ids = encode_prompt(tokenizer, prompt)
        response_ids, rejected_ids = (
            encode_response(tokenizer, text, end_token_ids)
            if isinstance(text, str)
            else _checked_ids(text, vocab_size)
            for text in (response, _rejected(row) or [])
        )
    except ValueError as error:
        raise ValueError(f"Row {index}: {error}") from error
    if not all(contexts) or not response:
        name = "response" if all(contexts) else "context"
        raise ValueError(f"Expected a {name} of at least one letter, got none in row {index}; filter the rows.")
    return {
        "context_ids": [token for ids in contexts for token in ids],
        "context_lengths": [len(ids) for ids in contexts],
        "continuation_ids": [],
        "prompt_ids": [prompt_ids],
        "response_ids": [response_ids],
        "rejected_ids": [rejected_ids],
    }


def _checked_ids(ids: list[int], vocab_size: int) -> list[int]:
    if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
        raise ValueError(f"Expected token ids from 0 to {vocab_size - 1} in a response, got {ids}.")
    return ids


def _fits(
    lengths: list[int],
    prompts: list[list[int]],
    responses: list[list[int]],
    rejected: list[list[int]],
    *,
    config: ICAEConfig,
    prefix_length: int,
    max_context_length: int | None,
    positions: int | None,
) -> bool:
    behind = len(prompts[0]) + max(len(responses[0]), len(rejected[0]))
    total = positions_taken(config, prefix_length, lengths) + behind
    return sum(lengths) <= (max_context_length or total) and total <= (positions or total)


def _gather(batch: dict[str, list], indices: list[int], max_prompts: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Neighbours with the same context as one sample, with the place of the first of them."""
    rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
    for _, same in groupby(zip(indices, rows, strict=True), lambda pair: _context_of(pair[1])):
        neighbours = list(same)
        for first in range(0, len(neighbours), max_prompts):
            gathered = neighbours[first : first + max_prompts]
            place, sample = gathered[0]
            names = ("prompt_ids", "response_ids", "rejected_ids")
            lists = {name: [row[name][0] for _, row in gathered] for name in names}
            yield place, sample | lists


def _mix(
    batch: dict[str, list],
    indices: list[int],
    *,
    max_prompts: int,
    cut: Callable[..., list[tuple[list[int], list[int]]]],
    cuts_per_sample: float,
    seed: int,
) -> dict[str, list]:
    """Samples with prompts and, beside them, so many cuts of their contexts without any."""
    rows = []
    for index, row in _gather(batch, indices, max_prompts):
        rows.append(row | {"length": len(row["context_ids"])})
        rng = np.random.default_rng([seed, index])
        for _ in range(int(cuts_per_sample + rng.random())):
            cuts = cut(row["context_ids"], rng)
            context, continuation = cuts[rng.integers(len(cuts))]
            rows.append(_without_prompts({"context_ids": context, "continuation_ids": continuation}))
    return {name: [row[name] for row in rows] for name in rows[0]}


def positions_taken(config: ICAEConfig, prefix_length: int, lengths: list[int]) -> int:
    """How many positions of the base contexts of so many tokens take before a prompt can follow."""
    total = prefix_length + sum(lengths)
    if config.memory_type == "key_values" and config.encoder_layout == "sequential":  # slots have some of their own
        starts = ((length, start) for length in lengths for start in range(0, length, config.span_length))
        total += sum(config.slots_for(min(config.span_length, length - start)) for length, start in starts)
    return total


def _without_prompts(sample: dict[str, Any]) -> dict[str, Any]:
    """A sample of reconstruction and continuation alone."""
    length = len(sample["context_ids"])
    nothing: dict[str, list] = {"prompt_ids": [], "response_ids": [], "rejected_ids": []}
    return sample | nothing | {"context_lengths": [length], "length": length}


def _context_of(row: dict[str, Any]) -> tuple[list[int], list[int]]:
    return row["context_ids"], row["context_lengths"]


def _prompt_and_response(row: dict[str, Any]) -> tuple[str | list[dict[str, Any]], str | list[int]]:
    if "messages" not in row:
        prompt, response = row["prompt"], row["response"]
    else:
        messages = row["messages"] or []
        roles = [message["role"] for message in messages]
        if len(messages) < 2 or roles[-1] != "assistant":
            raise ValueError(f"Expected `messages` that end with the assistant's, got the roles {roles}.")
        prompt, response = messages[:-1], messages[-1]["content"]
    if isinstance(response, list) and [type(message) for message in response] == [dict]:  # as TRL's completions
        if response[0]["role"] != "assistant":
            raise ValueError(f"Expected a response of the assistant's, got one of the role {response[0]['role']!r}.")
        response = response[0]["content"]
    as_ids = "messages" not in row and _are_token_ids(response)
    if not isinstance(prompt, str | list) or not (as_ids or isinstance(response, str | None)):
        raise ValueError(f"Expected a prompt and one response as texts, got {prompt!r} and {response!r}.")
    return prompt, response or ""


def _rejected(row: dict[str, Any]) -> str | list[int] | None:
    rejected = row.get("rejected")
    if rejected is None or (rejected and (isinstance(rejected, str) or _are_token_ids(rejected))):
        return rejected
    raise ValueError(
        f"Expected a rejected response of at least one letter, as a text or token ids, or none, got {rejected!r}; "
        "filter the rows."
    )


def _are_token_ids(response: Any) -> bool:
    return isinstance(response, list) and all(type(token) is int for token in response)


@dataclass
class DataCollatorForICAESFT:
    """
    Pads the ids of samples from [`prepare_sft_dataset`] on the right. Prompts and responses have a row each;
    `context_index` says which row of the contexts they are about. A rejected response stands in the row behind the one
    preferred to it, and `rejected_rows` says so; `reference_margins` has a number for each such pair, if
    [`ICAESFTTrainer`] has computed them.

    Example:

    ```python
    >>> collator = DataCollatorForICAESFT()
    >>> sample = dict(context_ids=[7, 8], context_lengths=[2], continuation_ids=[])
    >>> collator([sample | dict(prompt_ids=[[4], [3, 6]], response_ids=[[5, 2], [8, 2]])])
    {'context_ids': tensor([[7, 8]]), 'context_mask': tensor([[True, True]]),
     'prompt_ids': tensor([[4, 0], [3, 6]]), 'prompt_mask': tensor([[True, False], [True, True]]),
     'response_ids': tensor([[5, 2], [8, 2]]), 'response_mask': tensor([[True, True], [True, True]]),
     'context_index': tensor([0, 0]),
     'context_lengths': tensor([[2]]), 'autoencoding_rows': tensor([False])}
    ```

    What no sample of a batch has is left out.
    """

    def __call__(self, samples: list[dict]) -> dict[str, Any]:
        batch = pad_samples(samples, ("context", "continuation"))
        asked = []
        for index, sample in enumerate(samples):
            rejected = sample.get("rejected_ids") or [[]] * len(sample["prompt_ids"])
            for prompt, response, other in zip(sample["prompt_ids"], sample["response_ids"], rejected, strict=True):
                row = {"prompt_ids": prompt, "index": index}
                asked.append(row | {"response_ids": response, "is_rejected": False})
                if other:
                    asked.append(row | {"response_ids": other, "is_rejected": True})
        if asked:
            batch |= pad_samples(asked, ("prompt", "response"))
            batch["context_index"] = torch.tensor([row["index"] for row in asked])
        if any(row["is_rejected"] for row in asked):
            batch["rejected_rows"] = torch.tensor([row["is_rejected"] for row in asked])
            margins = [margin for sample in samples for margin in sample.get("reference_margins", ())]
            if margins:  # else they are what is asked for
                batch["reference_margins"] = torch.tensor(margins)
        lengths = [torch.tensor(sample["context_lengths"]) for sample in samples]
        batch["context_lengths"] = pad_sequence(lengths, batch_first=True)
        batch["autoencoding_rows"] = torch.tensor([not sample["response_ids"] for sample in samples])
        return batch
