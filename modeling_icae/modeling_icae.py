# Copyright 2026 The ICAE authors. Licensed under the Apache License, Version 2.0.
"""
The In-context Autoencoder (ICAE, arXiv 2307.06945): a LoRA-adapted language model turns a context into a few memory
slots; the same model, frozen, answers from the slots.

    encoder   [start] c1 c2 … cS  m1 … mK        adapter on    slots = keys and values (or last states) at m1 … mK
    decoder   [start] m1' … mK'  [AE] c1 … cS    adapter off   autoencoding: the context itself, then the end token
              [start] m1' … mK'  [LM] n1 … nN                  continuation: the text that follows
              <chat>  m1' … mK'  prompt </chat> r1 … rR        instruction: the response

Notation used for tensor shapes: B batch rows, S context tokens, K slots, D size of a slot, N spans of all rows,
T tokens of the decoder's text, H hidden size, V vocabulary.
"""

import copy
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
)
from transformers.utils import ModelOutput, logging

from .chat_icae import chat_pieces, encode_contexts, encode_prompt, encode_response, tokenize
from .configuration_icae import TASKS
from .memory_icae import ICAEMemory
from .pipeline_icae import ICAEContextGenerationPipeline  # importing it registers the pipeline task
from .pretrained_icae import ICAEPreTrainedModel, check_dtype


# The likeliest token at each step. The generation_config of some bases (Qwen2.5's) samples and makes repetitions less
# likely, and a text that repeats itself could not be written out.
GREEDY: dict[str, Any] = {
    **{"do_sample": False, "num_beams": 1, "num_return_sequences": 1},
    **{"repetition_penalty": 1.0, "no_repeat_ngram_size": 0},
}

MADE_HERE = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "past_key_values")


@dataclass
class ICAEOutput(ModelOutput):
    """
    Output of [`ICAEForConditionalGeneration.forward`].

    Args:
        loss (`torch.FloatTensor` of shape `(1,)`):
            Weighted sum of the task losses, in nats per target token.
        task_losses (`dict[str, torch.FloatTensor]`):
            Mean loss of each task that was computed, in nats per target token.
        token_losses (`dict[str, torch.FloatTensor]`):
            For each task, the loss at each target token, of shape `(rows, target_length)`; 0 at padding.
        token_masks (`dict[str, torch.BoolTensor]`):
            For each task, where `token_losses` has a target, of the same shape.
        token_correct (`dict[str, torch.BoolTensor]`):
            For each task, where the most likely token is the target (teacher forcing); empty in train mode.
        memory ([`ICAEMemory`]):
            The memory that the losses were read from.
    """

    loss: torch.Tensor = None  # type: ignore[assignment]  # ModelOutput wants defaults
    task_losses: dict[str, torch.Tensor] = None  # type: ignore[assignment]
    token_losses: dict[str, torch.Tensor] = None  # type: ignore[assignment]
    token_masks: dict[str, torch.Tensor] = None  # type: ignore[assignment]
    token_correct: dict[str, torch.Tensor] = None  # type: ignore[assignment]
    memory: ICAEMemory = None  # type: ignore[assignment]


@dataclass
class _Text:
    """What the decoder reads behind the memory, and what it should predict at each place."""

    embeds: torch.Tensor  # (B, T, H)
    mask: torch.Tensor  # (B, T) true = token
    labels: torch.Tensor  # (B, T)
    label_mask: torch.Tensor  # (B, T) true = target

    def __getitem__(self, rows: torch.Tensor) -> "_Text":
        return _Text(self.embeds[rows], self.mask[rows], self.labels[rows], self.label_mask[rows])


_LossAndGradient = tuple[torch.Tensor, Callable[[], torch.Tensor]]


class _FrozenHeadLoss(torch.autograd.Function):
    """A loss through a frozen head, chunk by chunk: the forward pass also makes the gradient of the hidden states, so
    that never more than `chunk_size * vocab_size` logits exist and no logits are kept. `loss_of` gives the losses of
    some logits and targets, and what makes the gradient of these logits."""

    @staticmethod
    def forward(ctx, hidden, targets, loss_of, head, chunk_size):
        losses, grads = [], []
        needs_grad = ctx.needs_input_grad[0]
        for states, part in zip(hidden.split(chunk_size), targets.split(chunk_size), strict=True):
            with torch.set_grad_enabled(needs_grad):
                states = states.detach().requires_grad_(needs_grad)
                logits = head(states)  # (n, V)
            loss, make_gradient = loss_of(logits.detach(), part)
            losses.append(loss)
            if needs_grad:
                grads.append(torch.autograd.grad(logits, states, make_gradient().to(logits.dtype))[0])
        if needs_grad:
            ctx.save_for_backward(torch.cat(grads))
        return torch.cat(losses)

    @staticmethod
    def backward(ctx, grad_losses):
        (grad_hidden,) = ctx.saved_tensors
        return (grad_hidden * grad_losses[:, None]).to(grad_hidden.dtype), None, None, None, None


def _chunk_cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> _LossAndGradient:
    """Of logits `(n, V)` and labels `(n,)`: the losses `(n,)`, and what makes their gradient `(n, V)`, in float32."""
    # In place, because on a CPU each new tensor of this size costs more than the arithmetic on it.
    scores = logits.to(torch.float32, copy=True)
    top, target = scores.amax(dim=-1, keepdim=True), scores.gather(1, labels[:, None])
    total = scores.sub_(top).exp_().sum(dim=-1, keepdim=True)
    losses = (total.log() + top - target)[:, 0]
    return losses, lambda: scores.div_(total).scatter_add_(1, labels[:, None], torch.full_like(target, -1.0))


def _chunk_divergence(logits: torch.Tensor, teacher: torch.Tensor) -> _LossAndGradient:
    """The same of the Kullback-Leibler divergence from a teacher's logits `(n, V)`."""
    scores, target = (one.log_softmax(dim=-1, dtype=torch.float32) for one in (logits, teacher))
    losses = F.kl_div(scores, target, reduction="none", log_target=True).sum(dim=-1)
    return losses, lambda: scores.exp_().sub_(target.exp_())


class _RepetitionPenalty(RepetitionPenaltyLogitsProcessor):
    """
    Of what prompt and answer say: `padding` columns of a row, of shape `(rows,)`, say nothing. (What `generate` makes
    itself takes the mask, which is of memory and prompt, for that of the prompt.)
    """

    def __init__(self, penalty: float, padding: torch.Tensor):
        super().__init__(penalty)
        self.padding = padding

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        is_padding = torch.arange(input_ids.shape[1], device=input_ids.device) < self.padding[:, None]
        return super().__call__(torch.where(is_padding, input_ids[:, -1:], input_ids), scores)  # type: ignore[arg-type]


class ICAEForConditionalGeneration(ICAEPreTrainedModel, GenerationMixin):
    r"""
    An In-context Autoencoder around a decoder-only language model.

    The base model is loaded once and stays frozen. A LoRA adapter inside it is on while a context is encoded and off
    while slots are read. Trained are the adapter, the memory embeddings (input embeddings of the slots) and the task
    embeddings `[AE]` and `[LM]`.

    Args:
        config ([`ICAEConfig`]):
            The configuration.
        base_model (`PreTrainedModel`, *optional*):
            The causal language model. By default a randomly initialised one is built from `config.text_config`; use
            [`~ICAEForConditionalGeneration.from_base`] or [`~ICAEForConditionalGeneration.from_pretrained`] instead.

    Example:

    ```python
    >>> from icae import EMBEDDED_CHECKPOINT, ICAEForConditionalGeneration, embedded_base

    >>> model = ICAEForConditionalGeneration.from_pretrained(EMBEDDED_CHECKPOINT, base_model=embedded_base())
    >>> memory = model.compress(long_text)
    >>> model.reconstruct(memory)
    >>> model.generate(memory=memory, prompt="Who is it about?", max_new_tokens=32)
    ```
    """

    # ----------------------------------------------------------------------------------------------- text to slots

    @torch.no_grad()
    def compress(
        self,
        context: str | list[Any] | torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        span_length: int | None = None,
        max_spans_per_batch: int = 32,
        window: int | None = None,
        progress: bool = False,
    ) -> ICAEMemory:
        """
        Compresses contexts into memory slots.

        Args:
            context (`str`, `list[str]`, `list[int]`, `list[list[int]]` or `torch.Tensor`):
                Texts or token ids (a tensor of shape `(batch_size, length)`), of any lengths. Names of control tokens
                in a text (`<|im_end|>`) stay text. A list in place of a text (`list[list[str]]`) or of its ids is
                several contexts in one row: each starts a span of its own, and all texts but the first get a blank
                line in front.
            attention_mask (`torch.Tensor` of shape `(batch_size, length)`, *optional*):
                1 where a token is, for a padded tensor of ids.
            span_length (`int`, *optional*):
                Tokens compressed at once, at most `config.span_length`, which is the default.
            max_spans_per_batch (`int`, *optional*, defaults to 32):
                Spans encoded at once. Bounds the memory of the pass; the result does not depend on it.
            window (`int`, *optional*):
                For documents that are longer than what the base has positions for: positions start again at 0 before
                a span would leave a window of so many (less than the base has, so that prompts have room). The
                windows then stand side by side, as after
                [`ICAEMemory.concat`]. Default: such documents are refused.
            progress (`bool`, *optional*, defaults to `False`):
                Whether to show a progress bar.

        Returns:
            [`ICAEMemory`] of one row per context.

        Raises:
            `ValueError`: if a context is empty, or too long for the base's positions, or if a mask comes with lists.
        """
        ids, parts = self._context_ids(context, attention_mask)
        return self._compress(ids, parts, span_length, max_spans_per_batch, window, progress)

    @torch.no_grad()
    def extend(
        self,
        memory: ICAEMemory,
        context: str | list[Any] | torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> ICAEMemory:
        """
        Adds text to a memory — a chat history, a log — without compressing anything again.

        The new text starts a new span. If the text before ended with a whole span, the result is that of compressing
        all of it at once.

        Args:
            memory ([`ICAEMemory`]):
                The memory so far. It is not changed.
            context, attention_mask, kwargs:
                The text that follows, one per row of the memory, as in
                [`~ICAEForConditionalGeneration.compress`].

        Returns:
            [`ICAEMemory`] with the spans of both.
        """
        self._check_memory(memory)
        ids, parts = self._context_ids(context, attention_mask)
        if len(ids) != len(memory):
            raise ValueError(f"Expected one text per row of the memory ({len(memory)}), got {len(ids)}.")
        memory = memory.to(ids.device)
        last_slots = memory.positions.gather(1, memory.num_slots[:, None] - 1)[:, 0]
        ends = memory.end - 1 if kwargs.get("window") is None else last_slots  # a window goes on where it is
        more = self._compress(ids, parts, **kwargs, offsets=ends.tolist())
        if memory.memory_type == "hidden_states":  # which `concat` moves behind the others
            more = replace(more, positions=more.positions - (memory.end - 1)[:, None])
        return ICAEMemory.concat([memory, more])

    def _compress(
        self, ids, parts, span_length=None, max_spans_per_batch: int = 32, window=None, progress=False, offsets=None
    ) -> ICAEMemory:
        """`ids` of shape `(B, S)`, padded on the right; `parts`, the lengths of the contexts of each row."""
        span_length = self.config.span_length if span_length is None else span_length
        if not isinstance(span_length, int) or not 1 <= span_length <= self.config.span_length:
            raise ValueError(
                f"Expected `span_length` between 1 and the model's {self.config.span_length} tokens, got "
                f"{span_length!r}."
            )
        if max_spans_per_batch < 1:
            raise ValueError(f"Expected `max_spans_per_batch` of at least 1, got {max_spans_per_batch}.")
        for index, lengths in enumerate(parts):
            if min(lengths, default=0) == 0:
                raise ValueError(f"Expected contexts of at least one token, got an empty one in row {index}.")
        rows = [
            [span for context in row[: sum(lengths)].split(lengths) for span in context.split(span_length)]
            for row, lengths in zip(ids, parts, strict=True)
        ]
        spans = [[(self.config.slots_for(len(span)), len(span)) for span in row] for row in rows]

        # Each span is shifted by what stands before it in its row, so that the slots of a row can be read together.
        # (The last states of "hidden_states" carry no position, so their spans are encoded at the start.)
        is_cache = self.config.memory_type == "key_values"
        sequential = self.config.encoder_layout == "sequential"
        shifts: list[int] = []
        for row, offset in zip(spans, offsets or [0] * len(spans), strict=True):
            taken = [tokens + slots if sequential and is_cache else tokens for slots, tokens in row]
            last = offset + sum(taken) if is_cache else max(tokens + slots * sequential for slots, tokens in row)
            self._check_positions(last if window is None else min(last, window), window=window)
            if window is not None and window < max(taken):
                raise ValueError(f"Expected a `window` of at least one span, {max(taken)} positions, got {window}.")
            for length in taken:
                if window is not None and offset + length > window:
                    offset = 0
                shifts.append(offset)
                offset += length

        flat = [span for row in rows for span in row]
        slots, positions = [], []
        firsts = range(0, len(flat), max_spans_per_batch)
        for first in logging.tqdm(firsts, desc="Compressing", disable=not progress):
            part = slice(first, first + max_spans_per_batch)
            encoded = self._encode(flat[part], torch.tensor(shifts[part], device=ids.device))
            slots.append(encoded[0])
            positions.append(encoded[1])
        counts = [sum(slots for slots, _ in row) for row in spans]
        # In training, weights are about to change, and with dropout slots are others every time.
        passing = self.training and (torch.is_grad_enabled() or self.config.lora_dropout > 0)
        return ICAEMemory(
            slots=pad_sequence(torch.cat(slots).split(counts), batch_first=True),  # (B, K, D)
            positions=pad_sequence(torch.cat(positions).split(counts), batch_first=True),  # (B, K)
            spans=spans,
            fingerprint="" if passing else self.fingerprint,
            memory_type=self.config.memory_type,
        )

    def _encode(self, spans: list[torch.Tensor], shifts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The slots of N spans and their positions, one span after the other: `(all slots, D)`, `(all slots,)`."""
        device = shifts.device
        lengths = torch.tensor([len(span) for span in spans], device=device)[:, None]  # (N, 1)
        counts = torch.tensor([self.config.slots_for(len(span)) for span in spans], device=device)[:, None]
        # [start] c1 … cS m1 … mK, padded on the left: a base with a sliding window counts padding between text and
        # slots, and would see less of the text.
        start = torch.tensor([self.config.start_token_id], device=device)
        rows = [torch.cat([start, F.pad(span, (0, self.config.slots_for(len(span))))]) for span in spans]
        ids = pad_sequence(rows, batch_first=True, padding_side="left")  # (N, 1 + S + K), 0 where a slot will stand
        place = torch.arange(-ids.shape[1], 0, device=device) + 1 + lengths + counts  # 0 at [start], S + 1 at m1
        slot_index = place - lengths  # 1 at m1

        # Uniform: slot j of K stands in the middle of the j-th of K equal parts of its span. (A slot holds the tokens
        # around its position best: at the ends of their parts, the first would have too many and the last too few.)
        uniform = self.config.encoder_layout == "uniform"
        part_ends = -(-slot_index * lengths // counts)
        part_starts = -(-(slot_index - 1) * lengths // counts) + 1
        slot_places = (part_starts + part_ends + 1) // 2 if uniform else place
        text = self._embed(ids)
        memory = self.memory_embeddings[(slot_index - 1).clamp(min=0)].to(text.dtype)
        embeds = torch.where((slot_index > 0)[..., None], memory, text)
        positions = torch.where(slot_index > 0, slot_places, place).clamp(min=0)

        is_cache = self.config.memory_type == "key_values"
        cache = DynamicCache()
        with self.adapter(True):
            hidden = self._run(embeds, place >= 0, positions + (shifts[:, None] if is_cache else 0), cache)
        last = slice(-int(counts.max()), None)
        if is_cache:
            slots = _pack([(layer.keys[:, :, last], layer.values[:, :, last]) for layer in cache.layers])
        else:
            slots = hidden[:, last]  # (N, 1 + S + K, H) -> (N, K, H)
        keep = (slot_index > 0)[:, last]
        ends = part_ends if uniform or not is_cache else place  # what comes next stands behind the text, or the slots
        return slots[keep], (ends + shifts[:, None])[:, last][keep]

    # ----------------------------------------------------------------------------------------------- slots to text

    def _open(self, memory: ICAEMemory, prefix: torch.Tensor, task: str) -> tuple[DynamicCache, torch.Tensor]:
        """
        Puts a memory behind `prefix` (token ids of shape `(P,)`) into a cache of the frozen model.

        Returns the cache and its mask of shape `(B, P + K)`. Rows of fewer slots are padded on the left, so that the
        text follows the slots without a gap.
        """
        memory = memory.to(self.memory_embeddings.device)  # one that was loaded lies on the CPU
        sequential = self.config.decoder_layout[task] == "sequential"
        positions = memory.positions
        if memory.memory_type == "hidden_states":
            if sequential:
                positions = torch.arange(1, positions.shape[1] + 1, device=positions.device).expand_as(positions)
            self._check_positions(int(positions.max()))
        prefix_positions = self._prefix_positions(len(prefix)).to(prefix.device)

        def behind_prefix(prefix: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
            """`(1, P, …)` and `(B, K, …)`, padded on the right -> `(B, P + K, …)`, padded on the left."""
            joined = torch.cat([prefix.expand(len(rows), *prefix.shape[1:]), rows], dim=1)
            if len({sum(slots for slots, _ in row) for row in memory.spans}) == 1:
                return joined
            padding = rows.shape[1] - memory.num_slots
            places = (torch.arange(joined.shape[1], device=joined.device) - padding[:, None]) % joined.shape[1]
            return joined[torch.arange(len(rows), device=joined.device)[:, None], places]

        slots = memory.slots.to(self.language_model.dtype)
        mask = behind_prefix(torch.ones_like(prefix, dtype=torch.bool)[None], memory.mask)
        cache = DynamicCache()
        with self.adapter(False):
            if memory.memory_type == "key_values":
                with torch.no_grad():
                    self._run(self._embed(prefix[None]), torch.ones_like(prefix)[None], prefix_positions[None], cache)
                shapes = [(x.shape[1], x.shape[3]) for layer in cache.layers for x in (layer.keys, layer.values)]
                states = behind_prefix(_pack([(layer.keys, layer.values) for layer in cache.layers]), slots)
                devices = [layer.keys.device for layer in cache.layers]  # with a `device_map`, several
                cache = DynamicCache()
                for index, (keys, values) in enumerate(_unpack(states, shapes)):
                    cache.update(keys.to(devices[index]), values.to(devices[index]), index)
            else:
                embeds = behind_prefix(self._embed(prefix[None]), slots)
                self._run(embeds, mask, behind_prefix(prefix_positions[None], positions), cache)
        return cache, mask

    def _prefix_positions(self, length: int) -> torch.Tensor:
        """They end at 0, before the first slot. Not all bases know negative ones: absolute position embeddings do not,
        nor do those that scale queries by the logarithm of their position (Ministral 3, Llama 4)."""
        config, positions = self.config.text_config, torch.arange(1 - length, 1)
        rope = getattr(config, "rope_parameters", None)
        logarithmic = "llama_4_scaling_beta" in (rope or ()) or getattr(config, "attn_temperature_tuning", False)
        return positions.clamp(min=0) if rope is None or logarithmic else positions

    def _run(self, embeds, mask, positions, cache: DynamicCache) -> torch.Tensor:
        """
        One pass of the base without its head; the last hidden state, of shape `(B, T, H)`.

        The mask is always given: without it, transformers takes each jump in the position ids for the start of
        another packed sequence and cuts the text off from its slots.
        """
        check_dtype(embeds.dtype)
        outputs = self.language_model.base_model(
            inputs_embeds=embeds,
            attention_mask=mask.to(torch.long),
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
        return outputs.last_hidden_state.to(embeds.device)  # with a `device_map`, it lies on the last one

    def _embed(self, ids: torch.Tensor) -> torch.Tensor:
        return self.get_input_embeddings()(ids)

    @torch.no_grad()
    def _check_logits(self) -> None:
        """Raises a `ValueError` if the base does more to its logits than is known of its family, or cannot read the
        prefix in front of slots where it stands."""
        if self.device.type == "meta":
            return
        base, ids = self.language_model, torch.arange(8, device=self.device)[None]
        positions = self._prefix_positions(8).to(self.device)[None]
        if not base.base_model(ids, position_ids=positions, use_cache=False).last_hidden_state.isfinite().all():
            raise ValueError(
                "Expected a base that reads text at negative positions, as prefixes stand in front of slots, got "
                f"{type(self.language_model).__name__}, whose states are not finite there."
            )
        expected = base(ids, use_cache=False).logits[0].float().cpu()
        found = self._logits(base.base_model(ids, use_cache=False).last_hidden_state[0]).float().cpu()
        if not torch.allclose(found, expected, rtol=0.05, atol=0.01 * expected.abs().max().item()):
            raise ValueError(
                "Expected a base whose logits are the product of its last hidden state and its output embeddings, got "
                f"{type(self.language_model).__name__}, which does more to them."
            )

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The base's logits for hidden states of shape `(n, H)`, with what some families do to them."""
        logits = self.get_output_embeddings()(hidden)
        config = self.config.text_config
        if (scale := getattr(config, "logit_scale", None)) is not None:  # Cohere
            logits = logits * scale
        if (scaling := getattr(config, "logits_scaling", None)) is not None:  # Granite
            logits = logits / scaling
        if (cap := getattr(config, "final_logit_softcapping", None)) is not None:  # Gemma 2
            logits = cap * torch.tanh(logits / cap)
        return logits.to(hidden.device)

    def forward(
        self,
        context_ids: torch.Tensor | None = None,
        context_mask: torch.Tensor | None = None,
        context_lengths: torch.Tensor | None = None,
        memory: ICAEMemory | None = None,
        continuation_ids: torch.Tensor | None = None,
        continuation_mask: torch.Tensor | None = None,
        prompt_ids: torch.Tensor | None = None,
        prompt_mask: torch.Tensor | None = None,
        response_ids: torch.Tensor | None = None,
        response_mask: torch.Tensor | None = None,
        context_index: torch.Tensor | None = None,
        rejected_rows: torch.Tensor | None = None,
        autoencoding_rows: torch.Tensor | None = None,
        autoencoding_weight: float | None = None,
        continuation_weight: float | None = None,
        instruction_weight: float = 1.0,
        distillation_weight: float = 0.0,
        span_length: int | None = None,
        **kwargs,
    ) -> ICAEOutput:
        r"""
        The training losses: contexts are compressed once and read back by every task that has a target. A task reads
        only the rows that have one.

        Args:
            context_ids (`torch.LongTensor` of shape `(batch_size, context_length)`):
                Tokens to compress, and the target of autoencoding.
            context_mask (`torch.Tensor` of shape `(batch_size, context_length)`, *optional*):
                1 where a token is. Padding may lie on either side.
            context_lengths (`torch.LongTensor` of shape `(batch_size, num_contexts)`, *optional*):
                Tokens of each context of a row, together as many as its mask has, 0 where a row has fewer contexts.
                Default: one context per row. A `ValueError` says so if they are others.
            memory ([`ICAEMemory`], *optional*):
                Read this memory instead of compressing `context_ids`; for example another text's, as a control.
            continuation_ids, continuation_mask (of shape `(batch_size, continuation_length)`, *optional*):
                Text that follows the context: the target of continuation (language modelling).
            prompt_ids, prompt_mask (of shape `(num_prompts, prompt_length)`, *optional*):
                What stands between memory and response, see [`~ICAEForConditionalGeneration.encode_prompts`].
            response_ids, response_mask (of shape `(num_prompts, response_length)`, *optional*):
                The target of the instruction task, with its end token.
            context_index (`torch.LongTensor` of shape `(num_prompts,)`, *optional*):
                Row of the context that each prompt is about, so that many prompts share one encoder pass. Default:
                one prompt per context.
            rejected_rows (`torch.BoolTensor` of shape `(num_prompts,)`, *optional*):
                Responses that are no part of the loss, to be compared with others by `token_losses`, which have a
                gradient. Default: none.
            autoencoding_rows (`torch.BoolTensor` of shape `(batch_size,)`, *optional*):
                Rows to autoencode. Default: all.
            autoencoding_weight (`float`, *optional*):
                Weight λ of autoencoding (paper, section 2.3). Default: 0.5 beside a continuation, 1 when there is no
                other target, 0 beside a response.
            continuation_weight (`float`, *optional*):
                Weight of continuation. Default: 1 - λ, or 1 beside a response.
            instruction_weight (`float`, *optional*, defaults to 1.0):
                Weight of the response.
            distillation_weight (`float`, *optional*, defaults to 0.0):
                Share of the instruction loss that comes from a teacher, the frozen base with the whole context: the
                Kullback-Leibler divergence of its next-token distribution from the one behind the slots. The rest is
                the cross entropy of the response.
            span_length (`int`, *optional*):
                Tokens compressed at once, at most and by default `config.span_length`.

        Returns:
            [`ICAEOutput`]
        """
        if (response_ids is None) != (prompt_ids is None):
            raise ValueError("Expected `prompt_ids` and `response_ids` together, got only one of them.")
        if context_ids is not None:
            context_ids, context_mask = _left_justify(context_ids, context_mask)
        if memory is None:
            if context_ids is None:
                raise ValueError(
                    "Expected `context_ids` or `memory`, got neither. An ICAE is no plain language model: for the "
                    "frozen base call `model.language_model`."
                )
            if context_lengths is None:
                parts = context_mask.sum(dim=1, keepdim=True).tolist()  # type: ignore[union-attr]
            else:
                parts = [[length for length in row if length] for row in context_lengths.tolist()]
                if (found := [sum(row) for row in parts]) != (tokens := context_mask.sum(dim=1).tolist()):  # type: ignore
                    raise ValueError(
                        f"Expected `context_lengths` of all tokens of each row, {tokens} as `context_mask` says, got "
                        f"{found} together."
                    )
            memory = self._compress(context_ids, parts, span_length)
        else:
            self._check_memory(memory)
        if autoencoding_weight is None:
            autoencoding_weight = 0.0 if response_ids is not None else 0.5 if continuation_ids is not None else 1.0
        if continuation_weight is None:
            continuation_weight = 1.0 if response_ids is not None else 1.0 - autoencoding_weight

        texts, weights = {}, {}
        if autoencoding_weight > 0:
            if context_ids is None or context_mask is None:
                raise ValueError("Expected `context_ids`, the target of autoencoding, beside `memory`; got None.")
            texts["autoencoding"] = self._autoencoding_text(context_ids, context_mask, autoencoding_rows)
            weights["autoencoding"] = autoencoding_weight
        if continuation_ids is not None:
            texts["continuation"] = self._continuation_text(*_left_justify(continuation_ids, continuation_mask))
            weights["continuation"] = continuation_weight
        if response_ids is not None:
            texts["instruction"] = self._instruction_text(prompt_ids, prompt_mask, response_ids, response_mask)
            weights["instruction"] = instruction_weight
        if not texts:
            raise ValueError("Expected at least one task, got `autoencoding_weight=0` and no other target.")

        task_losses, token_losses, token_correct = {}, {}, {}
        for task, text in texts.items():
            about = torch.arange(len(memory)) if context_index is None or task != "instruction" else context_index
            if len(text.mask) != len(about):
                raise ValueError(
                    f"Expected one row per context for the task {task!r}, got {len(text.mask)} rows for "
                    f"{len(about)} contexts; `context_index` says which context each prompt is about."
                )
            rows = text.label_mask.any(dim=1)
            if not rows.any():
                raise ValueError(f"Expected at least one target token for the task {task!r}, got none.")
            about = about.to(rows.device)[rows]
            hidden = self._read(memory[about], task, text[rows])
            targets = text.label_mask
            loss, hit = self._cross_entropy(hidden, text.labels[targets])
            if task == "instruction" and distillation_weight > 0:
                if context_ids is None or context_mask is None:
                    raise ValueError("Expected `context_ids`, which the teacher reads, beside `memory`; got None.")
                teacher = self._read_full_context(context_ids[about], context_mask[about], text[rows])
                loss = (1 - distillation_weight) * loss + distillation_weight * self._divergence(hidden, teacher)
            counted = loss
            if task == "instruction" and rejected_rows is not None:
                counted = loss[~rejected_rows.bool().to(rows.device)[targets.nonzero()[:, 0]]]
                if not len(counted):
                    raise ValueError("Expected responses beside the rejected ones, got none; they are the target.")
            task_losses[task] = counted.mean()
            token_losses[task] = loss.new_zeros(targets.shape).masked_scatter(targets, loss)
            if hit is not None:
                token_correct[task] = targets.masked_scatter(targets, hit)
        return ICAEOutput(
            loss=torch.stack([weights[task] * loss for task, loss in task_losses.items()]).sum(),
            task_losses=task_losses,
            token_losses=token_losses,
            token_masks={task: text.label_mask for task, text in texts.items()},
            token_correct=token_correct,
            memory=memory,
        )

    def _autoencoding_text(self, ids: torch.Tensor, mask: torch.Tensor, rows: torch.Tensor | None = None) -> _Text:
        """[AE] c1 … cS -> c1 … cS end"""
        lengths = mask.sum(dim=1, keepdim=True)
        places = torch.arange(ids.shape[1] + 1, device=ids.device)
        labels = F.pad(ids, (0, 1)).masked_fill(places == lengths, self.end_token_ids[0])
        text = self._task_text("autoencoding", ids, labels, places <= lengths)
        if rows is not None:
            text.label_mask = text.mask & rows[:, None]
        return text

    def _continuation_text(self, ids: torch.Tensor, mask: torch.Tensor) -> _Text:
        """[LM] n1 … nN-1 -> n1 … nN"""
        return self._task_text("continuation", ids[:, :-1], ids, mask)

    def _task_text(self, task: str, ids: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor) -> _Text:
        embeds = self._embed(ids)
        task_embeds = self.task_embeddings[TASKS.index(task)].to(embeds.dtype).expand(len(ids), 1, -1)
        embeds = torch.cat([task_embeds, embeds], dim=1)
        return _Text(embeds, mask, labels, mask)

    def _instruction_text(self, prompt_ids, prompt_mask, response_ids, response_mask) -> _Text:
        """prompt r1 … rR-1 -> r1 … rR (r1 is predicted at the last token of the prompt)"""
        prompt_ids, prompt_mask = _left_justify(prompt_ids, prompt_mask)
        response_ids, response_mask = _left_justify(response_ids, response_mask)
        without_prompt = response_mask.any(dim=1) & ~prompt_mask.any(dim=1)
        if without_prompt.any():
            row = int(without_prompt.nonzero()[0])
            raise ValueError(
                f"Expected a prompt of at least one token before a response, got none in row {row}: the first token "
                "of a response is predicted at the last one of its prompt."
            )
        is_response = torch.cat([torch.zeros_like(prompt_mask), response_mask], dim=1)
        mask = torch.cat([prompt_mask, response_mask], dim=1)
        is_response, _ = _left_justify(is_response, mask)
        ids, mask = _left_justify(torch.cat([prompt_ids, response_ids], dim=1), mask)
        return _Text(self._embed(ids[:, :-1]), mask[:, :-1], ids[:, 1:], is_response[:, 1:])

    def _read(self, memory: ICAEMemory, task: str, text: _Text) -> torch.Tensor:
        """Last hidden states at the targets of a text that is read behind a memory, of shape `(targets, H)`."""
        cache, memory_mask = self._open(memory, self._prefix(task), task)
        places = torch.arange(text.mask.shape[1], device=memory_mask.device)
        positions = self._text_start(memory, task)[:, None] + places
        self._check_positions(int(positions[text.mask].max()))
        hidden = self._run(text.embeds, torch.cat([memory_mask, text.mask], dim=1), positions, cache)
        return hidden[text.label_mask]  # (B, T, H) -> (targets, H)

    @torch.no_grad()
    def _read_full_context(self, context_ids: torch.Tensor, context_mask: torch.Tensor, text: _Text) -> torch.Tensor:
        """The same of the frozen base with the context itself in place of the memory."""
        prefix = self._prefix("instruction")
        lengths = text.mask.sum(dim=1)
        rows, starts = [], []
        for ids, is_token, embeds, length in zip(context_ids, context_mask, text.embeds, lengths, strict=True):
            before = self._embed(torch.cat([prefix, ids[is_token]]))
            rows.append(torch.cat([before, embeds[:length]]))
            starts.append(len(before))
        embeds = pad_sequence(rows, batch_first=True)  # (B, P + S + T, H)
        self._check_positions(embeds.shape[1])
        positions = torch.arange(embeds.shape[1], device=embeds.device).expand(len(rows), -1)
        mask = positions < torch.tensor([len(row) for row in rows], device=embeds.device)[:, None]
        with self.adapter(False):
            hidden = self._run(embeds, mask, positions, DynamicCache())
        parts = zip(hidden, starts, text.label_mask, lengths, strict=True)
        return torch.cat(
            [states[start : start + length][targets[:length]] for states, start, targets, length in parts]
        )

    def _divergence(self, hidden: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """Kullback-Leibler divergence of the next token's distribution from the teacher's, in nats per target."""

        def loss_of(logits: torch.Tensor, states: torch.Tensor) -> _LossAndGradient:
            return _chunk_divergence(logits, self._logits(states))

        return _FrozenHeadLoss.apply(hidden, teacher, loss_of, self._logits, self._loss_chunk_size)

    def _cross_entropy(self, hidden: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Nats per target, of shape `(targets,)`, and in eval mode whether each target is the most likely token."""
        losses = _FrozenHeadLoss.apply(hidden, labels, _chunk_cross_entropy, self._logits, self._loss_chunk_size)
        if self.training:
            return losses, None
        with torch.no_grad():
            chunks = hidden.split(self._loss_chunk_size)
            hits = [self._logits(states).argmax(dim=-1) for states in chunks]
        return losses, torch.cat(hits) == labels

    def _text_start(self, memory: ICAEMemory, task: str) -> torch.Tensor:
        """
        Position id of the first embedding behind a memory, of shape `(B,)`. In the uniform layout, autoencoding
        rewrites the text where it stood: its task embedding stands just before it.
        """
        sequential = self.config.decoder_layout[task] == "sequential"
        if memory.memory_type == "hidden_states" and sequential:
            start = memory.num_slots + 1
        elif task == "autoencoding" and not sequential:
            first_spans = [row[0] for row in memory.spans]  # whose first slot has the position where its part ends
            parts = torch.tensor([-(-tokens // slots) for slots, tokens in first_spans])
            start = memory.positions[:, 0] - parts.to(memory.positions.device)
        else:
            start = memory.end
        return start.to(self.memory_embeddings.device)

    @property
    def _loss_chunk_size(self) -> int:
        """Targets whose logits exist at once: few on a CPU, for its caches; on a GPU each chunk costs its launches."""
        return 128 if self.memory_embeddings.device.type == "cpu" else 1024

    # ---------------------------------------------------------------------------------------------------- generation

    @torch.no_grad()
    def generate(
        self,
        context: str | list[Any] | torch.Tensor | None = None,
        prompt: str | list[Any] | None = None,
        *,
        memory: ICAEMemory | None = None,
        task: str = "instruction",
        generation_config: GenerationConfig | None = None,
        **kwargs,
    ) -> Any:
        """
        Answers prompts from compressed contexts.

        Args:
            context (`str`, `list[str]`, token ids, *optional*):
                What to read, see [`~ICAEForConditionalGeneration.compress`].
            prompt (`str`, conversation, token ids, or a list of them, *optional*):
                What to ask, see [`~ICAEForConditionalGeneration.encode_prompts`]. One prompt per context, one prompt
                for all contexts, or many prompts for one context: the context is then compressed and its slots are
                opened only once.
            memory ([`ICAEMemory`], *optional*):
                A compressed context in place of `context`.
            task (`str`, *optional*, defaults to `"instruction"`):
                `"instruction"` answers the prompt, `"autoencoding"` writes the context out, `"continuation"` goes on.
            generation_config (`GenerationConfig`, *optional*) and kwargs:
                All that `GenerationMixin.generate` takes (`max_new_tokens`, `num_beams`, `do_sample`, `streamer`, …).
                `repetition_penalty` is of what prompt and answer say; it cannot see the context.

        Returns:
            `torch.LongTensor` of shape `(batch_size, new_tokens)`: the new tokens only; or a `GenerateOutput` when
            `return_dict_in_generate=True`.

        Raises:
            `ValueError`: if context and memory are both missing or both given, if a prompt is missing, if the memory
            is another model's or holds NaN, if an option needs a prompt that the task does not have, if token ids are
            not of the base's vocabulary, if prompts of several lengths have to be answered one by one (on bases with
            a sliding window) beside an option of all rows, or if there are too many tokens for the base's positions.
            (Without a length, answers have up to 20 tokens, transformers' default, or end where the positions do.)
        """
        if (context is None) == (memory is None):
            raise ValueError(
                "Expected either `context` or `memory`, got "
                f"{'neither' if context is None else 'both'}; a prompt alone is a question for `model.language_model`."
            )
        if task not in TASKS:
            raise ValueError(f"Expected `task` to be one of {TASKS}, got {task!r}.")
        if (prompt is None) == (task == "instruction"):
            raise ValueError(
                f"Expected {'a' if prompt is None else 'no'} `prompt` for the task {task!r}, got {prompt!r}; use "
                "`task='autoencoding'` or `reconstruct` to read a memory back without one."
            )
        if made_here := [name for name in MADE_HERE if name in kwargs]:
            raise ValueError(
                f"Expected no `{made_here[0]}`, which is made of memory and prompt, got one; for padded ids, "
                "`memory=model.compress(ids, attention_mask)`."
            )
        if memory is None:
            memory = self.compress(context)  # type: ignore[arg-type]  # one of the two is given
        self._check_memory(memory)
        if task == "autoencoding":
            self._check_text_is_whole(memory)

        options, generation_config = kwargs, copy.deepcopy(generation_config or self.generation_config)
        # What a given configuration leaves open is the model's, as it is in transformers' own generate.
        generation_config.update(**self.generation_config.to_dict(), defaults_only=True, allow_custom_entries=True)
        kwargs = generation_config.update(**kwargs)
        self._check_generation(generation_config, kwargs, task)
        if generation_config.stop_strings is not None or generation_config.token_healing:
            kwargs.setdefault("tokenizer", self.tokenizer)

        cache, memory_mask = self._open(memory, self._prefix(task), task)
        start = self._text_start(memory, task)
        if task == "instruction":
            prompts = self.encode_prompts(prompt)
            for one in prompts:
                self._check_ids(torch.tensor(one))
            ids, mask = _pad_left(prompts, self.end_token_ids[0], device=start.device)
            rows = max(len(memory), len(prompts))
            if {len(memory), len(prompts)} - {1, rows}:
                raise ValueError(
                    f"Expected one prompt per context, one prompt or one context, got {len(prompts)} prompts for "
                    f"{len(memory)} contexts."
                )
            memory_mask, start = memory_mask.expand(rows, -1), start.expand(rows)
            ids, mask = ids.expand(rows, -1), mask.expand(rows, -1)
            inputs = {"input_ids": ids}
        else:
            rows = len(memory)
            embeds = self.task_embeddings[TASKS.index(task)]
            embeds = embeds.to(self.language_model.dtype).expand(rows, 1, -1)
            mask = memory_mask.new_ones(rows, 1)
            # generate() counts the cached part as a part of the embeddings and cuts it off again.
            inputs = {"inputs_embeds": F.pad(embeds, (0, 0, cache.get_seq_length(), 0))}
        given = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0
        if not given and generation_config.min_length:  # which generate() counts from the start of these embeddings
            least = max(generation_config.min_new_tokens or 0, generation_config.min_length)
            generation_config.min_new_tokens, generation_config.min_length = least, 0
        positions = start[:, None] + (mask.cumsum(dim=1) - 1).clamp(min=0)
        last = int(positions.max())
        if generation_config.max_new_tokens is None:  # a default or an upper bound, which the base's positions are too
            room = max(1, self._num_positions - last)
            generation_config.max_new_tokens = min(_answer_length(generation_config, given), room)
            generation_config.max_length = None
        self._check_positions(last + generation_config.max_new_tokens - 1, task)
        columns = memory_mask.shape[1] + mask.shape[1] + generation_config.max_new_tokens
        if not mask.all() and self._leaves_window(columns):
            return self._generate_apart(memory, prompts, generation_config, options)

        # generate() repeats the text for beams and several sequences, but not a cache that was given.
        sequences = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
        if (penalty := generation_config.repetition_penalty) not in (None, 1):
            padding = (~mask).sum(dim=1).repeat_interleave(sequences)
            processors = [_RepetitionPenalty(penalty, padding), *(kwargs.get("logits_processor") or [])]
            kwargs["logits_processor"], generation_config.repetition_penalty = LogitsProcessorList(processors), 1.0
        cache.batch_repeat_interleave(rows // len(memory) * sequences)
        with self.adapter(False):
            output = self.language_model.generate(
                **inputs,
                attention_mask=torch.cat([memory_mask, mask], dim=1).to(torch.long),
                position_ids=positions,
                past_key_values=cache,
                generation_config=generation_config,
                **kwargs,
            )
        if isinstance(output, ModelOutput):
            output.sequences = output.sequences[:, given:]
            return output
        return output[:, given:]

    def _leaves_window(self, columns: int) -> bool:
        """Whether a base with a sliding window loses sight of its first columns, so that padding would matter."""
        config = self.config.text_config
        window = getattr(config, "sliding_window", None)
        layers = getattr(config, "layer_types", None) or ["sliding_attention"]
        if "local" in getattr(config, "attention_layers", ()):  # GPT-Neo's name for them
            window, layers = config.window_size, ["sliding_attention"]
        if window is None or "sliding_attention" not in layers:
            return False
        return columns > window

    def _generate_apart(
        self, memory: ICAEMemory, prompts: list[list[int]], generation_config, options
    ) -> torch.Tensor:
        """Row by row: the padding between slots and shorter prompts would use up the window of the base."""
        if generation_config.return_dict_in_generate:
            raise ValueError(
                "Expected prompts of one length beside `return_dict_in_generate=True`, because this base has a "
                "sliding window, got several lengths; ask them one by one."
            )
        by_row = ("negative_prompt_ids", "logits_processor")
        if given := [name for name in by_row if options.get(name) is not None and len(options[name])]:
            raise ValueError(
                f"Expected prompts of one length beside `{given[0]}`, which may differ by row, because this base has "
                "a sliding window, got several lengths; ask them one by one."
            )
        rows = max(len(memory), len(prompts))
        memories = [memory[index] for index in range(len(memory))] * (rows // len(memory))
        length = {"max_new_tokens": generation_config.max_new_tokens, "max_length": None}  # of all rows, as in a batch
        options = options | length | {"generation_config": generation_config}
        allowed = options.get("prefix_allowed_tokens_fn")
        answers = []
        for index, (one, prompt) in enumerate(zip(memories, prompts * (rows // len(prompts)), strict=True)):
            if allowed is not None:  # of this row, not of the first
                options["prefix_allowed_tokens_fn"] = lambda _, ids, row=index: allowed(row, ids)
            answers += self.generate(memory=one, prompt=prompt, **options)
        pad = generation_config.pad_token_id
        return pad_sequence(answers, batch_first=True, padding_value=self.end_token_ids[0] if pad is None else pad)

    def reconstruct(self, memory: ICAEMemory | str | list[str] | torch.Tensor, **kwargs) -> list[str]:
        """
        Writes the compressed contexts out again: the autoencoding task (paper, section 2.2.1), greedy by default,
        whatever the base's own generation_config says of sampling, beams and repetition; what a given one says counts.

        Args:
            memory ([`ICAEMemory`] or anything that [`~ICAEForConditionalGeneration.compress`] takes):
                What to read back.
            kwargs:
                Arguments of [`~ICAEForConditionalGeneration.generate`].

        Raises:
            `ValueError`: in the uniform layout, if the spans of a row do not follow each other in one text.
        """
        if not isinstance(memory, ICAEMemory):
            memory = self.compress(memory)
        given = kwargs.get("generation_config") or GenerationConfig()
        defaults = GREEDY | {"max_new_tokens": int(memory.num_tokens.max()) + 1}
        if kwargs.get("max_length", given.max_length) is not None:
            del defaults["max_new_tokens"]
        kwargs = {name: value for name, value in defaults.items() if getattr(given, name) is None} | kwargs
        output = self.generate(memory=memory, task="autoencoding", **kwargs)
        ids = output.sequences if isinstance(output, ModelOutput) else output
        return self.tokenizer.batch_decode(ids, skip_special_tokens=True)

    # ------------------------------------------------------------------------------------------------- text and checks

    def encode_prompts(self, prompts: Any) -> list[list[int]]:
        """Token ids of all that stands behind the memory up to the answer, one list per prompt.

        A prompt is a text, or a conversation: a list of messages that starts and ends with one of the user's. Token
        ids that this method made are handed through.

        Raises:
            `ValueError`: if a message has no text, a role of several words, or another field that the chat template
                reads; if it is not the user's that comes first, or the assistant's that comes last.
        """
        return [
            prompt if _is_list_of(prompt, int) else encode_prompt(self.tokenizer, prompt)
            for prompt in _as_prompts(prompts)
        ]

    def encode_responses(self, responses: list[str]) -> list[list[int]]:
        """Token ids of answers with the token that ends them, one list per answer."""
        return [encode_response(self.tokenizer, response, self.end_token_ids) for response in responses]

    def _prefix(self, task: str) -> torch.Tensor:
        """Token ids in front of the memory, of shape `(P,)`: the start token, or the chat template so far."""
        ids = []
        if task == "instruction":
            before = chat_pieces(self.tokenizer, [{"role": "user", "content": ""}])[0]
            (ids,) = tokenize(self.tokenizer, [before], control_tokens=True)
        if ids[:1] != [self.config.start_token_id]:
            ids = [self.config.start_token_id, *ids]
        return torch.tensor(ids, device=self.memory_embeddings.device)

    def _context_ids(self, context, attention_mask=None) -> tuple[torch.Tensor, list[list[int]]]:
        """Token ids of contexts, `(B, S)` with padding on the right, and the lengths of each row's contexts."""
        device = self.memory_embeddings.device
        tensors = isinstance(context, torch.Tensor) and isinstance(attention_mask, torch.Tensor)
        if attention_mask is not None and not tensors:
            raise ValueError(
                "Expected `attention_mask` as a tensor beside a tensor of ids, got "
                f"{type(attention_mask).__name__} and {type(context).__name__}; let the tokenizer return tensors "
                '(`return_tensors="pt"`), or give lists of ids without padding and no mask.'
            )
        if isinstance(context, torch.Tensor):
            if context.dim() != 2 or context.dtype not in (torch.int64, torch.int32):
                raise ValueError(
                    "Expected context ids of shape (batch, length) and dtype int64, got "
                    f"{tuple(context.shape)} and {context.dtype}."
                )
            ids, mask = _left_justify(
                context.to(device), None if attention_mask is None else attention_mask.to(device)
            )
            parts = mask.sum(dim=1, keepdim=True).tolist()
        else:
            if isinstance(context, str):
                context = [context]
            if not isinstance(context, list | tuple) or not context:
                raise ValueError(
                    "Expected a context as str, list of str, or token ids, got "
                    f"{'an empty list' if isinstance(context, list | tuple) else type(context).__name__}."
                )
            if isinstance(context[0], int):
                context = [context]
            tokens, parts = [], []
            for row in context:
                several = isinstance(row, list | tuple) and bool(row) and isinstance(row[0], list | tuple)
                contexts = encode_contexts(self.tokenizer, row) if _is_text(row) else row if several else [row]
                for part in contexts:
                    if not isinstance(part, list | tuple) or not all(type(token) is int for token in part):
                        raise ValueError(
                            "Expected a context as str or as a list of token ids, all of one kind, got "
                            f"{type(part).__name__} {str(part)[:40]!r}."
                        )
                tokens.append(torch.tensor([token for part in contexts for token in part], dtype=torch.long))
                parts.append([len(part) for part in contexts])
            ids = pad_sequence(tokens, batch_first=True).to(device)
        self._check_ids(ids)
        return ids, parts

    def _check_ids(self, ids: torch.Tensor) -> None:
        vocabulary = self.language_model.get_input_embeddings().num_embeddings
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
            raise ValueError(
                f"Expected token ids from 0 to {vocabulary - 1}, got {int(ids.min())} to {int(ids.max())}; tokenize "
                "with the tokenizer of the base."
            )

    def _check_generation(self, config: GenerationConfig, kwargs: dict[str, Any], task: str) -> None:
        other_cache = config.cache_implementation not in (None, "hybrid")  # transformers unsets "hybrid" itself
        if config.use_cache is False or config.prefill_chunk_size is not None or other_cache:
            raise ValueError(
                "Expected `use_cache=True`, no `prefill_chunk_size` and no `cache_implementation`, because the slots "
                f"live in the cache, got {config.use_cache}, {config.prefill_chunk_size} and "
                f"{config.cache_implementation}; leave all three out."
            )
        guesses = (config.prompt_lookup_num_tokens, config.assistant_early_exit, kwargs.get("assistant_model"))
        if any(guess is not None for guess in guesses) and task != "instruction":
            raise ValueError(
                f"Expected no `prompt_lookup_num_tokens`, `assistant_early_exit` or `assistant_model` for the task "
                f"{task!r}, got one: they guess from the tokens of a prompt, and this task has none."
            )
        if config.guidance_scale not in (None, 1) and task != "instruction":
            raise ValueError(
                f"Expected no `guidance_scale` for the task {task!r}, got {config.guidance_scale}: it compares with "
                "an answer that does not see the prompt, and this task has none."
            )

    def _check_memory(self, memory: ICAEMemory) -> None:
        if not isinstance(memory, ICAEMemory):
            found, advice = type(memory).__name__, "call `compress` first"
            if found == ICAEMemory.__name__:  # a repository's code beside the package
                found = f"one of {type(memory).__module__}, other code than this model's ({ICAEMemory.__module__})"
                advice = "load it with the class of what `compress` gives: `type(model.compress(…)).load(file)`"
            raise TypeError(f"Expected `memory` to be an ICAEMemory, got {found}; {advice}.")
        if memory.fingerprint == "" and self.training:
            return  # of this very step: the weights, and so the fingerprint, are about to change
        if memory.fingerprint != self.fingerprint:
            found = memory.fingerprint or "none: it was made in train mode"
            raise ValueError(
                f"Expected a memory of this model (fingerprint {self.fingerprint}), got one of another model or of "
                f"another state of its training (fingerprint {found}); compress the context again, after "
                "`model.eval()`."
            )
        memory.check_finite()

    def _check_text_is_whole(self, memory: ICAEMemory) -> None:
        """Raises a `ValueError` if a text that is rewritten where it stood has gaps, or two parts in one place."""
        if self.config.decoder_layout["autoencoding"] == "sequential":
            return
        found = (memory.end.to(self.device) - 1 - self._text_start(memory, "autoencoding")).tolist()
        for row, (positions, tokens) in enumerate(zip(found, memory.num_tokens.tolist(), strict=True)):
            if positions != tokens:
                raise ValueError(
                    f"Expected spans that follow each other in one text, to write it out, got {tokens} tokens in "
                    f"places of {positions} in row {row}: spans with others between them, in another order, or of "
                    "contexts or windows that were compressed apart; write them out one by one, with "
                    "`memory.select_spans([0])` and so on."
                )

    @property
    def _num_positions(self) -> int:
        return self.config.num_positions or sys.maxsize

    def _check_positions(self, last: int, task: str = "instruction", window: int | None = None) -> None:
        if last >= self._num_positions:
            what, advice = (
                "context, prompt and answer",
                "`compress(..., window=…)` (`--window`) takes longer documents",
            )
            if window is not None:
                what, advice = "a window", "give a smaller one, which leaves room for prompt and answer"
            elif task == "autoencoding":
                what, advice = "text to write out", "`memory.select_spans` gives a part of a memory"
            raise ValueError(
                f"Expected at most {self._num_positions - 1} tokens of {what}, which is what the base has positions "
                f"for, got {last}; {advice}."
            )


def _is_list_of(value: Any, kind: type) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(item, kind) for item in value)


def _is_text(context: Any) -> bool:
    """Whether a row of contexts is a text or a list of several."""
    return isinstance(context, str) or _is_list_of(context, str)


def _as_prompts(prompt: Any) -> list[Any]:
    def is_one(prompt) -> bool:
        return isinstance(prompt, str) or _is_list_of(prompt, dict) or _is_list_of(prompt, int)

    prompts = [prompt] if is_one(prompt) else prompt
    if not _is_list_of(prompts, object) or not all(is_one(one) for one in prompts):
        raise ValueError(
            "Expected a prompt as str, a list of at least one str, or conversations (lists of messages), got "
            f"{prompt!r}."
        )
    return list(prompts)


def _answer_length(config: GenerationConfig, prompt_length: int) -> int:
    """How many tokens to write at most without `max_new_tokens`; of `max_length`, the prompt is a part."""
    if config.max_length is None:
        return 20  # transformers' default
    if config.max_length <= prompt_length:
        raise ValueError(
            f"Expected a `max_length` above the {prompt_length} tokens of the prompt, got {config.max_length}; "
            "`max_new_tokens` counts the answer alone."
        )
    return config.max_length - prompt_length


def _left_justify(ids: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Moves the padding of each row to the right."""
    if mask is None:
        return ids, torch.ones_like(ids, dtype=torch.bool)
    if mask.shape != ids.shape:
        raise ValueError(
            f"Expected a mask of the same shape as its ids, {tuple(ids.shape)}, got a mask of shape "
            f"{tuple(mask.shape)}; it marks which of them are tokens."
        )
    order = mask.bool().logical_not().to(torch.int8).argsort(dim=1, stable=True)
    return ids.gather(1, order), mask.bool().gather(1, order)


def _pad_left(rows: list[list[int]], padding: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(len(row) for row in rows)
    ids = torch.tensor([[padding] * (width - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in rows], device=device)
    return ids, mask


def _pack(layers: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """Keys and values of all layers, each `(B, heads, K, head size)`, as one `(B, K, D)` where the first are."""
    device = layers[0][0].device
    return torch.cat([states.transpose(1, 2).flatten(2).to(device) for layer in layers for states in layer], dim=-1)


def _unpack(slots: torch.Tensor, shapes: list[tuple[int, int]]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The inverse of `_pack`: keys and values of each layer, of the given `(heads, head size)`."""
    parts = slots.split([heads * size for heads, size in shapes], dim=-1)
    states = [part.unflatten(-1, shape).transpose(1, 2) for part, shape in zip(parts, shapes, strict=True)]
    return zip(states[::2], states[1::2], strict=True)


__all__ = ["ICAEContextGenerationPipeline", "ICAEForConditionalGeneration", "ICAEOutput"]
