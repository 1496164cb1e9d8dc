"""What answers can be from: the slots of an ICAE, or tokens in the prompt of a plain language model."""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from icae.modeling_icae import ICAEForConditionalGeneration


class SlotReader:
    """Answers from the memories of an ICAE."""

    def __init__(self, model: ICAEForConditionalGeneration):
        self.model = model

    def losses(self, rows: list[dict[str, Any]]) -> list[float]:
        ids = {
            name: pad_sequence([torch.tensor(row[f"{name}_ids"]) for row in rows], batch_first=True, padding_value=-1)
            for name in ("context", "prompt", "response")
        }
        batch = {f"{name}_ids": tensor.clamp(min=0) for name, tensor in ids.items()}
        batch |= {f"{name}_mask": tensor >= 0 for name, tensor in ids.items()}
        output = self.model(**batch)
        losses, mask = output.token_losses["instruction"], output.token_masks["instruction"]
        return (losses.sum(dim=1) / mask.sum(dim=1)).tolist()

    def answers(self, rows: list[dict[str, Any]], max_new_tokens: int) -> list[str]:
        contexts, prompts = [row["context_ids"] for row in rows], [row["prompt_ids"] for row in rows]
        output = self.model.generate(contexts, prompts, max_new_tokens=max_new_tokens, do_sample=False)
        return self.model.tokenizer.batch_decode(output, skip_special_tokens=True)


class TokenReader:
    """Answers of a plain language model that has (a part of) the context in its prompt, in the same chat format."""

    def __init__(self, language_model, model: ICAEForConditionalGeneration, part: Callable[[list[int]], list[int]]):
        self.language_model, self.model, self.part = language_model, model, part
        self.prefix = model._prefix("instruction").tolist()

    def _inputs(self, rows: list[dict[str, Any]]) -> list[list[int]]:
        return [[*self.prefix, *self.part(row["context_ids"]), *row["prompt_ids"]] for row in rows]

    def losses(self, rows: list[dict[str, Any]]) -> list[float]:
        losses = []
        for row, ids in zip(rows, self._inputs(rows), strict=True):
            response = torch.tensor(row["response_ids"])
            logits = self.language_model(
                torch.tensor([ids + row["response_ids"]]), logits_to_keep=len(response) + 1
            ).logits[0, :-1]
            losses.append(torch.nn.functional.cross_entropy(logits.float(), response).item())
        return losses

    def answers(self, rows: list[dict[str, Any]], max_new_tokens: int) -> list[str]:
        inputs = [torch.tensor(ids) for ids in self._inputs(rows)]
        ids = pad_sequence(inputs, batch_first=True, padding_value=-1, padding_side="left")
        end = self.model.end_token_ids
        output = self.language_model.generate(
            input_ids=ids.clamp(min=0),
            attention_mask=(ids >= 0).long(),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=end,
            pad_token_id=end[0],
        )
        return self.model.tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
