"""What answers can be from: the slots of an ICAE, or tokens in the prompt of a plain language model.

All read rows — dicts of `context_ids`, `prompt_ids` and `response_ids` — in one of two forms:

    instruction    <chat> context prompt </chat> response      the context as slots, as tokens, or as a part of them
    continuation   [start] context response                    the response is the text that follows, without a prompt

Besides a part of the context, tokens can be a summary of it or what a search finds in it, in as many tokens as there
are slots.

Answers are greedy. A repetition penalty makes only those tokens less likely that stand in the answer itself, for
slots hide the context from it; tokens of context and prompt are left alone in all readers.
"""

import re
from collections.abc import Callable, Sequence
from itertools import groupby, takewhile
from typing import Any, Protocol

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, LogitsProcessor, RepetitionPenaltyLogitsProcessor

from icae.modeling_icae import GREEDY, ICAEForConditionalGeneration, ICAEMemory
from icae.modeling_icae.chat_icae import encode_plain


Row = dict[str, Any]

SUMMARIZE = "Summarize the text above in at most {words} words."
WORDS_PER_TOKEN = 0.75  # of English prose


class Reader(Protocol):
    """What [`SlotReader`] and [`TokenReader`] have in common."""

    def nats(self, rows: list[Row]) -> list[torch.Tensor]:
        """For each row, the loss at each token of the response, in nats."""

    def losses(self, rows: list[Row]) -> list[float]:
        """For each row, the mean loss of the response, in nats per token."""

    def answers(self, rows: list[Row], max_new_tokens: int) -> list[str]:
        """For each row, what is answered greedily."""


class SlotReader:
    """
    Answers from the memories of an ICAE.

    Args:
        model ([`ICAEForConditionalGeneration`]): the ICAE.
        task (`str`, *optional*, defaults to `"instruction"`): or `"continuation"`.
        other_text (`bool`, *optional*, defaults to `False`):
            Read the memory of the next other context instead of the row's own, one of the same `source` if the batch
            has any: the control. Batches need two different contexts.
        repetition_penalty (`float`, *optional*, defaults to 1.0): of answers; 1 is none.
    """

    def __init__(
        self,
        model: ICAEForConditionalGeneration,
        task: str = "instruction",
        other_text: bool = False,
        repetition_penalty: float = 1.0,
    ):
        self.model, self.task, self.other_text = model, task, other_text
        self.repetition_penalty = repetition_penalty
        self._latest: tuple[list[Row], ICAEMemory] | None = None

    def memories(self, rows: list[Row]) -> ICAEMemory:
        """The memory that each row is answered from. Losses and answers of the same list of rows share it."""
        if self._latest is None or self._latest[0] is not rows:
            self._latest = rows, self._compress(rows)
        return self._latest[1]

    @torch.no_grad()
    def _compress(self, rows: list[Row]) -> ICAEMemory:
        """Neighbours with the same context share its encoder pass."""
        groups = [list(group) for _, group in groupby(rows, lambda row: row["context_ids"])]
        memory = self.model.compress([group[0]["context_ids"] for group in groups])
        if self.other_text:
            memory = memory[next_of_same_source([(one.get("source"), one["context_ids"]) for one, *_ in groups])]
        return memory[[index for index, group in enumerate(groups) for _ in group]]

    @torch.no_grad()
    def nats(self, rows: list[Row]) -> list[torch.Tensor]:
        memory = self.memories(rows)
        names = {"response": "response_ids", "prompt": "prompt_ids"}
        if self.task == "continuation":
            names = {"continuation": "response_ids"}
        batch: dict[str, torch.Tensor] = {}
        for name, column in names.items():
            ids = pad_sequence([torch.tensor(row[column]) for row in rows], batch_first=True, padding_value=-1)
            ids = ids.to(memory.slots.device)
            batch |= {f"{name}_ids": ids.clamp(min=0), f"{name}_mask": ids >= 0}
        output = self.model(memory=memory, autoencoding_weight=0.0, **batch)
        losses, mask = output.token_losses[self.task], output.token_masks[self.task]
        return [row[targets] for row, targets in zip(losses, mask, strict=True)]

    def losses(self, rows: list[Row]) -> list[float]:
        return [nats.mean().item() for nats in self.nats(rows)]

    def answers(self, rows: list[Row], max_new_tokens: int) -> list[str]:
        memory, prompts = self.memories(rows), [row["prompt_ids"] for row in rows]
        parts = [list(range(len(rows)))]
        if self.repetition_penalty != 1 and getattr(self.model.config.text_config, "sliding_window", None):
            # `generate` may answer such a batch row by row, whose prompts then have no columns of padding to ignore.
            parts = [[row] for row in parts[0]]
        answers = []
        for part in parts:
            asked = [prompts[row] for row in part]
            output = self.model.generate(
                memory=memory[part],
                prompt=asked,
                max_new_tokens=max_new_tokens,
                **GREEDY,
                logits_processor=penalty_behind(max(map(len, asked)), self.repetition_penalty),
            )
            answers += self.model.tokenizer.batch_decode(output, skip_special_tokens=True)
        return answers


class TokenReader:
    """
    Answers of a plain language model that has (a part of) the context in its prompt, in the same format.

    Args:
        language_model (`PreTrainedModel`): the model.
        model ([`ICAEForConditionalGeneration`]): the ICAE, whose tokenizer and prefixes are used.
        part (`Callable`): the token ids that are read of the token ids of a context.
        task (`str`, *optional*, defaults to `"instruction"`): or `"continuation"`.
        repetition_penalty (`float`, *optional*, defaults to 1.0): of answers; 1 is none.
    """

    def __init__(
        self,
        language_model,
        model: ICAEForConditionalGeneration,
        part: Callable[[list[int]], list[int]],
        task: str = "instruction",
        repetition_penalty: float = 1.0,
    ):
        self.language_model, self.model, self.part = language_model, model, part
        self.repetition_penalty = repetition_penalty
        self.prefix = model._prefix(task).tolist()

    def contexts(self, rows: list[Row]) -> list[list[int]]:
        """The token ids that are read in place of each row's context."""
        return [self.part(row["context_ids"]) for row in rows]

    @torch.no_grad()
    def nats(self, rows: list[Row]) -> list[torch.Tensor]:
        nats = []
        pairs = zip(self.contexts(rows), rows, strict=True)
        for context, group in groupby(pairs, lambda pair: pair[0]):
            nats += self._nats_behind([*self.prefix, *context], [row for _, row in group])
        return nats

    def _nats_behind(self, before: list[int], rows: list[Row]) -> list[torch.Tensor]:
        """The context is read once; what stands behind it in each row goes on from its cache."""
        device = self.language_model.device
        *seen, last = before  # the first token behind the context is predicted at its last one
        cache = DynamicCache(config=self.language_model.config)
        if seen:
            self.language_model.base_model(torch.tensor([seen], device=device), past_key_values=cache, use_cache=True)
        cache.batch_repeat_interleave(len(rows))
        inputs = [torch.tensor([last, *row["prompt_ids"], *row["response_ids"][:-1]]) for row in rows]
        ids = pad_sequence(inputs, batch_first=True).to(device)
        lengths = torch.tensor([len(row) for row in inputs])
        mask = torch.arange(len(seen) + ids.shape[1]) < (len(seen) + lengths)[:, None]
        starts = [len(ids) - len(row["response_ids"]) for ids, row in zip(inputs, rows, strict=True)]
        logits = self.language_model(
            ids,
            attention_mask=mask.long().to(device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=ids.shape[1] - min(starts),
        ).logits
        nats = []
        for row, row_logits, start in zip(rows, logits, starts, strict=True):
            response = torch.tensor(row["response_ids"], device=device)
            scores = row_logits[start - min(starts) :][: len(response)].float()
            nats.append(torch.nn.functional.cross_entropy(scores, response, reduction="none"))
        return nats

    def losses(self, rows: list[Row]) -> list[float]:
        return [nats.mean().item() for nats in self.nats(rows)]

    def inputs(self, rows: list[Row]) -> list[list[int]]:
        """Prefix, context and prompt of each row."""
        return [
            [*self.prefix, *context, *row["prompt_ids"]]
            for context, row in zip(self.contexts(rows), rows, strict=True)
        ]

    def answer_ids(self, rows: list[Row], max_new_tokens: int) -> list[list[int]]:
        """For each row, the token ids that are answered greedily, without the one that ends them."""
        inputs = [torch.tensor(ids) for ids in self.inputs(rows)]
        ids = pad_sequence(inputs, batch_first=True, padding_value=-1, padding_side="left")
        ids = ids.to(self.language_model.device)
        end = self.model.end_token_ids
        output = self.language_model.generate(
            input_ids=ids.clamp(min=0),
            attention_mask=(ids >= 0).long(),
            max_new_tokens=max_new_tokens,
            **GREEDY,
            eos_token_id=end,
            pad_token_id=end[0],
            logits_processor=penalty_behind(ids.shape[1], self.repetition_penalty),
        )
        answers = output[:, ids.shape[1] :].tolist()
        return [list(takewhile(lambda token: token not in end, answer)) for answer in answers]

    def answers(self, rows: list[Row], max_new_tokens: int) -> list[str]:
        return self.model.tokenizer.batch_decode(self.answer_ids(rows, max_new_tokens), skip_special_tokens=True)


class SummaryReader(TokenReader):
    """
    Answers from a summary of the context that the language model wrote itself, before it knew the prompt, cut to as
    many tokens as there are slots.
    """

    def __init__(self, language_model, model: ICAEForConditionalGeneration, repetition_penalty: float = 1.0):
        super().__init__(language_model, model, lambda ids: ids, repetition_penalty=repetition_penalty)
        self.writer = TokenReader(language_model, model, lambda ids: ids)
        self.summaries: dict[tuple[int, ...], list[int]] = {}

    def contexts(self, rows: list[Row]) -> list[list[int]]:
        keys = [tuple(row["context_ids"]) for row in rows]
        if new := [key for key in dict.fromkeys(keys) if key not in self.summaries]:
            budgets = [number_of_slots(self.model, list(key)) for key in new]
            prompts = self.model.encode_prompts(
                [SUMMARIZE.format(words=max(1, int(budget * WORDS_PER_TOKEN))) for budget in budgets]
            )
            tasks = [{"context_ids": list(key), "prompt_ids": ids} for key, ids in zip(new, prompts, strict=True)]
            summaries = self.writer.answer_ids(tasks, max(budgets))
            for key, budget, summary in zip(new, budgets, summaries, strict=True):
                self.summaries[key] = summary[:budget]
        return [self.summaries[key] for key in keys]


class RetrievalReader(TokenReader):
    """
    Answers from the sentences of the context that fit the prompt best (BM25+, Lv and Zhai 2011), in their order in
    the text and in as many tokens as there are slots; the last one found is cut to what is left of them.

    Rows also need the texts `context` and `prompt`.
    """

    def __init__(self, language_model, model: ICAEForConditionalGeneration, repetition_penalty: float = 1.0):
        super().__init__(language_model, model, lambda ids: ids, repetition_penalty=repetition_penalty)

    def contexts(self, rows: list[Row]) -> list[list[int]]:
        return [self.retrieve(row) for row in rows]

    def retrieve(self, row: Row) -> list[int]:
        """The token ids of what is found for one row."""
        from rank_bm25 import BM25Plus  # the demo does without

        context = row["context"] if isinstance(row["context"], str) else "\n\n".join(row["context"])
        sentences = split_sentences(context)
        scores = BM25Plus([_words(sentence) for sentence in sentences]).get_scores(_words(row["prompt"]))
        sentence_ids = encode_plain(self.model.tokenizer, sentences)
        left = number_of_slots(self.model, row["context_ids"])
        chosen: dict[int, list[int]] = {}
        for index in sorted(range(len(sentences)), key=lambda index: -scores[index]):
            chosen[index] = sentence_ids[index][:left]
            left -= len(chosen[index])
        return [token for index in sorted(chosen) for token in chosen[index]]


def penalty_behind(columns: int, repetition_penalty: float) -> list[LogitsProcessor]:
    """A repetition penalty of what stands behind the columns that `generate` is given; nothing if it is 1."""
    if repetition_penalty == 1:
        return []
    return [RepetitionPenaltyLogitsProcessor(repetition_penalty, prompt_ignore_length=columns)]


def next_of_same_source(texts: Sequence[tuple[str | None, list[int]]]) -> list[int]:
    """
    For each source and text of a batch the next other text of its source, or the next of any where its source has no
    other: whose memory the control reads, so that it is of another text but not of another language or kind.

    Raises:
        `ValueError`: if all texts are the same.
    """
    rows, found = len(texts), []
    for row, (source, text) in enumerate(texts):
        behind = ((row + step) % rows for step in range(1, rows))
        others = [one for one in behind if texts[one][1] != text]
        if not others:
            raise ValueError(
                "Expected two different texts in each batch of the control, got one; raise `--batch-size`."
            )
        found.append(next((one for one in others if texts[one][0] == source), others[0]))
    return found


def split_sentences(text: str) -> list[str]:
    """The sentences and lines of a text, each with the blanks in front of it, so that together they are the text."""
    return re.split(r"(?<=[.!?])(?=\s+\S)|(?=\n)", text)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower()) or [""]  # a length of zero has no score


def number_of_slots(model: ICAEForConditionalGeneration, ids: list[int]) -> int:
    """Slots that a context becomes."""
    return sum(model.config.slots_for(len(span)) for span in torch.tensor(ids).split(model.config.span_length))
