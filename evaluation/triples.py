"""Files of triples: a context, a prompt about it, and the response."""

from pathlib import Path

from datasets import Dataset, Value

from icae.evaluation.files import check_filled, is_parquet, read_rows


COLUMNS = ("context", "prompt", "response")
TEXT = (Value("string"), Value("large_string"))  # as pandas 3 writes it
PWC_NAMES = {"input": "context", "answer": "response"}  # `sggetao/PwC`


def check_output(data: str, output: str) -> None:
    """
    Checks where rows are written to, before hours of work.

    Raises:
        `ValueError`: if they would take the place of what they are made from, or be read as JSON, which they are not.
    """
    if Path(data).resolve() == Path(output).resolve():
        raise ValueError(f"Expected an `--output` besides `--data`, got {output!r} for both; give another file.")
    if not is_parquet(output):
        raise ValueError(f"Expected an `--output` that is not named like JSON, got {output!r}; rows are Parquet.")


def load_triples(file: str, responses: bool = True) -> Dataset:
    """
    The rows of a Parquet file, with the columns `context`, `prompt` and, unless it can do without `responses`,
    `response`.

    Raises:
        `ValueError`: if it has neither these columns nor PwC's, or if a row has nothing in one of them.
    """
    dataset = read_rows(file)
    if "context" not in dataset.column_names:
        dataset = dataset.rename_columns({old: new for old, new in PWC_NAMES.items() if old in dataset.column_names})
    needed = COLUMNS if responses else COLUMNS[:2]
    if not {*needed} <= {*dataset.column_names}:
        expected = (
            "`context`, `prompt` and `response`, or `input`, `prompt` and `answer`"
            if responses
            else "`context` and `prompt`, or `input` and `prompt`"
        )
        raise ValueError(f"Expected the columns {expected}, got {dataset.column_names}.")
    check_filled(dataset, needed, file)
    return dataset
