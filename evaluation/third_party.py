"""
Other tools as readers, each in an environment of its own, so that its versions may differ: `icae evaluate answers
--llmlingua PYTHON --kvpress PYTHON`, with the interpreters of environments made like

    python -m venv runs/llmlingua && runs/llmlingua/bin/pip install llmlingua
    python -m venv runs/kvpress && runs/kvpress/bin/pip install kvpress

Both use the same base, know the context but not the prompt, as slots do, and leave as many tokens, or as many
positions of keys and values, as there are slots.
"""

import json
import subprocess
import weakref
from pathlib import Path
from typing import Any

import torch

from icae.evaluation.readers import Row, TokenReader, number_of_slots
from icae.modeling_icae import ICAEForConditionalGeneration
from icae.modeling_icae.chat_icae import encode_plain


TOOLS = Path(__file__).parent / "tools"


def tool_version(python: str, package: str) -> str:
    """
    The version of a package in an environment.

    Raises:
        `ValueError`: there is no such interpreter, or it has no such package.
    """
    command = [python, "-c", f"from importlib.metadata import version; print(version('{package}'))"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise ValueError(
            f"Expected the Python interpreter of an environment with {package}, got {python!r}, which does not run or "
            f"has none; `{python} -m pip install {package}`."
        ) from error
    return done.stdout.strip()


class Tool:
    """A script in another environment, which gives one JSON line for each that it gets."""

    def __init__(self, python: str, script: Path, *arguments: str):
        self.script = script
        self.process = subprocess.Popen(
            [python, str(script), *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        weakref.finalize(self, _end, self.process)

    def __call__(self, **row: Any) -> dict[str, Any]:
        """What the script makes of a row."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            print(json.dumps(row), file=self.process.stdin, flush=True)
        except BrokenPipeError:
            pass  # it has ended, which the missing reply shows
        if reply := self.process.stdout.readline():
            return json.loads(reply)
        raise ValueError(f"Expected a reply of {self.script.name}, got none; its own message stands above.")


def _end(process: subprocess.Popen) -> None:
    process.communicate()  # closes its input, at which it ends


class LLMLinguaReader(TokenReader):
    """Answers from what LLMLingua leaves of the context, cut to as many tokens as there are slots."""

    def __init__(
        self, language_model, model: ICAEForConditionalGeneration, python: str, repetition_penalty: float = 1.0
    ):
        super().__init__(language_model, model, lambda ids: ids, repetition_penalty=repetition_penalty)
        self.tool = Tool(python, TOOLS / "run_llmlingua.py", language_model.name_or_path)
        self.compressed: dict[tuple[int, ...], list[int]] = {}

    def contexts(self, rows: list[Row]) -> list[list[int]]:
        return [self._compress(row["context_ids"]) for row in rows]

    def _compress(self, ids: list[int]) -> list[int]:
        if tuple(ids) not in self.compressed:
            budget = number_of_slots(self.model, ids)
            text = self.tool(context=self.model.tokenizer.decode(ids), budget=budget)["text"]
            self.compressed[tuple(ids)] = encode_plain(self.model.tokenizer, [text])[0][:budget]
        return self.compressed[tuple(ids)]


class KVPressReader:
    """Answers from a part of the context's keys and values: as many positions as there are slots, in each layer."""

    def __init__(self, language_model, model: ICAEForConditionalGeneration, python: str):
        self.model, self.prefix = model, model._prefix("instruction").tolist()
        dtype = str(language_model.dtype).removeprefix("torch.")
        self.tool = Tool(python, TOOLS / "run_kvpress.py", language_model.name_or_path, dtype)

    def _read(self, row: Row, **what: Any) -> dict[str, Any]:
        keep = len(self.prefix) + number_of_slots(self.model, row["context_ids"])
        return self.tool(context=[*self.prefix, *row["context_ids"]], keep=keep, prompt=row["prompt_ids"], **what)

    def nats(self, rows: list[Row]) -> list[torch.Tensor]:
        return [torch.tensor(self._read(row, response=row["response_ids"])["nats"]) for row in rows]

    def losses(self, rows: list[Row]) -> list[float]:
        return [nats.mean().item() for nats in self.nats(rows)]

    def answers(self, rows: list[Row], max_new_tokens: int) -> list[str]:
        return [self._read(row, max_new_tokens=max_new_tokens)["answer"] for row in rows]
