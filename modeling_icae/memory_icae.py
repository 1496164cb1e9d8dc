# Copyright 2026 The ICAE authors. Licensed under the Apache License, Version 2.0.
"""The memory that an ICAE makes of a context: a batch of rows of slots that can be kept, cut, joined and asked."""

import hashlib
import json
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import reduce

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.nn.utils.rnn import pad_sequence


FORMAT = "icae-memory-1"


@dataclass(eq=False)
class ICAEMemory:
    """
    Compressed contexts: `batch_size` rows of memory slots. Made by [`ICAEForConditionalGeneration.compress`].

    Args:
        slots (`torch.Tensor` of shape `(batch_size, max_num_slots, slot_size)`):
            The memory slots, padded on the right. For `"hidden_states"` a slot is one vector of the size of an input
            embedding; for `"key_values"` it holds the keys and values of all layers, flattened.
        positions (`torch.LongTensor` of shape `(batch_size, max_num_slots)`):
            Position id of each slot: where in the context its text stood.
        spans (`list[list[tuple[int, int]]]`):
            For each row, the number of slots and of context tokens of each of its spans.
        fingerprint (`str`):
            Digest of the model that made the slots. Another model refuses them.
        memory_type (`str`):
            `"key_values"` or `"hidden_states"`, as in [`ICAEConfig`].
    """

    slots: torch.Tensor
    positions: torch.Tensor
    spans: list[list[tuple[int, int]]]
    fingerprint: str
    memory_type: str

    def __post_init__(self):
        if self.slots.dim() != 3 or self.positions.shape != self.slots.shape[:2]:
            raise ValueError(
                "Expected `slots` of shape (batch, slots, slot size) and `positions` of shape (batch, slots), got "
                f"{tuple(self.slots.shape)} and {tuple(self.positions.shape)}."
            )
        if len(self.spans) != len(self.slots) or max(self._row_slots(), default=0) != self.slots.shape[1]:
            raise ValueError(
                f"Expected `spans` to describe {len(self.slots)} rows of up to {self.slots.shape[1]} slots, got "
                f"{len(self.spans)} rows with {self._row_slots()} slots."
            )

    def _row_slots(self) -> list[int]:
        return [sum(slots for slots, _ in row) for row in self.spans]

    def __len__(self) -> int:
        return len(self.spans)

    @property
    def num_slots(self) -> torch.Tensor:
        """Slots of each row, of shape `(batch_size,)`."""
        return torch.tensor(self._row_slots(), device=self.slots.device)

    @property
    def num_tokens(self) -> torch.Tensor:
        """Context tokens behind each row, of shape `(batch_size,)`."""
        return torch.tensor([sum(tokens for _, tokens in row) for row in self.spans], device=self.slots.device)

    @property
    def mask(self) -> torch.Tensor:
        """True where a slot is, False where a row is padded; of shape `(batch_size, max_num_slots)`."""
        return torch.arange(self.slots.shape[1], device=self.slots.device) < self.num_slots[:, None]

    @property
    def end(self) -> torch.Tensor:
        """First position id behind each row, of shape `(batch_size,)`."""
        return self.positions.masked_fill(~self.mask, 0).amax(dim=1) + 1

    @property
    def nbytes(self) -> int:
        """Bytes of the slots, padding not counted."""
        return sum(self._row_slots()) * self.slots.shape[2] * self.slots.element_size()

    def rows(self) -> list["ICAEMemory"]:
        """One memory per row, without padding."""
        return [self[index] for index in range(len(self))]

    def __getitem__(self, index: int | slice | Iterable[int]) -> "ICAEMemory":
        """The rows at `index` (numbers, a slice, or a mask of booleans, one per row), in that order."""
        if not isinstance(index, slice | Iterable):
            index = [operator.index(index)]
        index = _chosen(index, len(self), "row")
        spans = [self.spans[row] for row in index]
        width = max(sum(slots for slots, _ in row) for row in spans)
        return replace(self, slots=self.slots[index, :width], positions=self.positions[index, :width], spans=spans)

    def select_spans(self, index: slice | Iterable[int]) -> "ICAEMemory":
        """
        Only the spans at `index` of every row (numbers, a slice, or a mask of booleans, one per span), for example
        `slice(0, 2)` for the first two.
        """
        index = index if isinstance(index, slice) else list(index)
        parts = []
        for row in self.rows():
            chosen = _chosen(index, len(row.spans[0]), "span")
            ends = torch.tensor([slots for slots, _ in row.spans[0]]).cumsum(0).tolist()
            keep = [slot for span in chosen for slot in range(ends[span] - row.spans[0][span][0], ends[span])]
            spans = [[row.spans[0][span] for span in chosen]]
            parts.append(replace(row, slots=row.slots[:, keep], positions=row.positions[:, keep], spans=spans))
        return ICAEMemory.stack(parts)

    @classmethod
    def stack(cls, memories: Sequence["ICAEMemory"]) -> "ICAEMemory":
        """All rows of several memories as one batch."""
        _check_same_model(memories)
        rows = [row for memory in memories for row in memory.rows()]
        dtype = reduce(torch.promote_types, (memory.slots.dtype for memory in memories))  # nothing is rounded
        return replace(
            rows[0],
            slots=pad_sequence([row.slots[0].to(dtype) for row in rows], batch_first=True),
            positions=pad_sequence([row.positions[0] for row in rows], batch_first=True),
            spans=[row.spans[0] for row in rows],
        )

    @classmethod
    def concat(cls, memories: Sequence["ICAEMemory"]) -> "ICAEMemory":
        """
        Row by row, the slots of the first memory followed by those of the next.

        `"hidden_states"` slots are numbered on from the end of the memory before. `"key_values"` slots keep the
        positions they were encoded at, so contexts that were compressed apart stand side by side, like the windows of
        Parallel Context Windows (arXiv 2212.10947).
        """
        _check_same_model(memories)
        if len({len(memory) for memory in memories}) != 1:
            raise ValueError(
                f"Expected memories with the same number of rows, got {[len(memory) for memory in memories]}; "
                "`ICAEMemory.stack` batches rows instead."
            )
        joined = []
        device = memories[0].slots.device  # one that was loaded lies on the CPU
        for parts in zip(*(memory.to(device).rows() for memory in memories), strict=True):
            shifts = [0] * len(parts)
            if parts[0].memory_type == "hidden_states":
                ends = torch.tensor([0] + [int(part.end) - 1 for part in parts[:-1]])
                shifts = ends.cumsum(0).tolist()
            joined.append(
                replace(
                    parts[0],
                    slots=torch.cat([part.slots for part in parts], dim=1),
                    positions=torch.cat([part.positions + by for part, by in zip(parts, shifts, strict=True)], dim=1),
                    spans=[[span for part in parts for span in part.spans[0]]],
                )
            )
        return cls.stack(joined)

    def to(self, *args, **kwargs) -> "ICAEMemory":
        """
        The same memory on another device or in another floating dtype, with the arguments of `torch.Tensor.to`.

        Raises:
            `ValueError`: if the dtype is one of whole numbers.
        """
        slots = self.slots.to(*args, **kwargs)
        if not slots.is_floating_point():
            raise ValueError(f"Expected a floating dtype for memory slots, got {slots.dtype}.")
        return replace(self, slots=slots, positions=self.positions.to(slots.device))

    def check_finite(self) -> None:
        """Raises a `ValueError` when a slot holds NaN or infinity."""
        bad = ~torch.isfinite(self.slots.float()).all(dim=-1) & self.mask
        if bad.any():
            row, slot = bad.nonzero()[0].tolist()
            raise ValueError(
                f"Expected finite memory slots, got NaN or infinity in {int(bad.sum())} slots (first: row {row}, slot "
                f"{slot}); compress the context again, in bfloat16 or float32."
            )

    def save(self, path) -> None:
        """Writes the memory to one safetensors file."""
        tensors = {"slots": self.slots.detach().cpu().contiguous(), "positions": self.positions.cpu().contiguous()}
        content = {"spans": self.spans, "fingerprint": self.fingerprint, "memory_type": self.memory_type}
        metadata = {"format": FORMAT, "content": json.dumps(content), "digest": _digest(tensors, content)}
        save_file(tensors, path, metadata=metadata)

    @classmethod
    def load(cls, path) -> "ICAEMemory":
        """
        Reads a memory that [`~ICAEMemory.save`] wrote.

        Raises:
            `ValueError`: if the file is truncated, was changed, holds NaN or is no ICAE memory.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}
            if metadata.get("format") != FORMAT:
                raise ValueError(f"the format is {metadata.get('format')!r}")
            content = json.loads(metadata["content"])
            content["spans"] = [[(slots, tokens) for slots, tokens in row] for row in content["spans"]]
            if metadata["digest"] != _digest(tensors, content):
                raise ValueError("its content does not match its digest")
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"Expected an ICAE memory file of format {FORMAT!r}, got {str(path)!r}, which is truncated, was "
                f"changed or is not an ICAE memory file ({error}); compress the context again and save it with "
                "`ICAEMemory.save`."
            ) from error
        memory = cls(**tensors, **content)
        memory.check_finite()
        return memory


def _chosen(index: slice | Iterable, count: int, what: str) -> list[int]:
    """Which of `count` rows or spans are chosen: numbers, a slice, or a mask of booleans."""
    if isinstance(index, slice):
        chosen = list(range(count))[index]
    else:
        chosen = torch.as_tensor(index if isinstance(index, torch.Tensor) else list(index)).reshape(-1).tolist()
        if chosen and all(isinstance(one, bool) for one in chosen):
            if len(chosen) != count:
                raise ValueError(f"Expected a mask of {count} booleans, one per {what}, got {len(chosen)}.")
            chosen = [number for number, is_chosen in enumerate(chosen) if is_chosen]
        chosen = [range(count)[operator.index(one)] for one in chosen]
    if not chosen:
        raise ValueError(f"Expected at least one {what} of the {count}, got none.")
    return chosen


def _check_same_model(memories: Sequence[ICAEMemory]) -> None:
    if not memories:
        raise ValueError("Expected at least one memory to join, got an empty list.")
    fingerprints = sorted({memory.fingerprint for memory in memories})
    if len(fingerprints) > 1:
        raise ValueError(
            f"Expected memories of one model, got memories of {len(fingerprints)} models ({', '.join(fingerprints)}); "
            "compress all contexts with the same checkpoint."
        )


def _digest(tensors: dict[str, torch.Tensor], content: dict) -> str:
    digest = hashlib.sha256(json.dumps(content).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


__all__ = ["ICAEMemory"]
