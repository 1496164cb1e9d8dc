"""Files that grow while something is computed, so that an interrupted run goes on: JSON lines, and answers in them."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


Line = dict[str, Any]


def read_lines(path: Path) -> list[Line]:
    """The JSON lines of a file; none if there is no file yet. A last line cut short by an interruption is removed."""
    if not path.exists():
        return []
    complete, _, last = path.read_text().rpartition("\n")
    lines = [json.loads(line) for line in complete.splitlines()]
    if last:
        try:
            lines.append(json.loads(last))
        except json.JSONDecodeError:
            last = ""
        path.write_text("".join(f"{part}\n" for part in (complete, last) if part))
    return lines


def append_lines(path: Path, lines: Iterable[Line]) -> None:
    """Writes lines behind those that a file has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines))


def digest(path: str | Path) -> str:
    """What a file's content is recognised by."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def forget_other_weights(path: Path, made_from: Line) -> None:
    """
    Removes a file of answers if they are those of other weights of the same model (`model`), and says so. All else
    that differs is left for [`AnswerFile`] to refuse.
    """
    lines = read_lines(path)
    if lines and lines[0] != made_from and lines[0] | {"model": made_from.get("model")} == made_from:
        print(f"{path}: {len(lines) - 1} answers of other weights ({lines[0]['model']}) are made again")
        path.unlink()


class AnswerFile:
    """
    The answers of one system to rows of a data file.

    The first line of the file says what they were made from; each other line is one row: `row`, its number in the
    data file, `answer`, and what else is known of it.

    Args:
        path (`Path`): the file, which need not exist yet.
        made_from (`dict`, *optional*):
            What the answers are made from; by default what the file says. The digest of the data file is `data`, the
            system's name is `reader`.

    Raises:
        `ValueError`: the file holds answers that were made from something else, or none were made yet.
    """

    def __init__(self, path: Path, made_from: Line | None = None):
        lines = read_lines(path)
        if not lines and made_from is None:
            raise ValueError(f"Expected a file of answers, got {str(path)!r}, which is missing or empty.")
        if not lines:
            append_lines(path, [made_from or {}])
            lines = [made_from or {}]
        self.path = path
        self.made_from, *answers = lines
        if made_from is not None and made_from != self.made_from:
            raise ValueError(
                f"Expected in {str(path)!r} answers made from {made_from}, got answers made from {self.made_from}; "
                "move the file away, or write to another place."
            )
        self.rows: dict[int, Line] = {line["row"]: line for line in answers}

    @property
    def name(self) -> str:
        """The system's name."""
        return self.made_from["reader"]

    def add(self, lines: list[Line]) -> None:
        """Keeps answers to more rows."""
        append_lines(self.path, lines)
        self.rows |= {line["row"]: line for line in lines}
