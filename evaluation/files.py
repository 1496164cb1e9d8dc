"""Local files of rows."""

from collections.abc import Iterable
from pathlib import Path

from datasets import Dataset, IterableDataset, load_dataset
from datasets.exceptions import DatasetGenerationError


def read_rows(files: str | list[str], streaming: bool = False) -> Dataset | IterableDataset:
    """
    The rows of Parquet files, or of JSON files, as the first one's name says.

    Raises:
        `ValueError`: if they hold no rows, or if one is damaged.
    """
    first = files if isinstance(files, str) else files[0]
    kind = "parquet" if is_parquet(first) else "json"
    try:
        return load_dataset(kind, data_files=files, split="train", streaming=streaming)
    except (DatasetGenerationError, ValueError) as error:
        # An empty file fails within the library, by a batch size of no rows or because "no data" is its split.
        raise ValueError(
            f"Expected rows in {files!r}, got none, or a file that is not {kind} ({error.__cause__ or error})."
        ) from error


def is_parquet(file: str) -> bool:
    """Whether a file is read as Parquet, as its name says; it is JSON else."""
    return ".json" not in Path(file).name


def check_filled(rows: Dataset, columns: Iterable[str], file: str) -> None:
    """
    Raises:
        `ValueError`: if a row has nothing in one of the columns.
    """
    for column in columns:
        if column in rows.column_names and (missing := [n for n, value in enumerate(rows[column]) if value is None]):
            raise ValueError(
                f"Expected a value in each row of the column {column!r} of {file!r}, got none in {len(missing)}, "
                f"first in row {missing[0]}; leave these rows out."
            )
