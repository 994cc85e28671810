"""Reads a benchmark's items from plain files, instead of from the hub.

lm-eval calls `load_rows` through a task's `custom_dataset`; nothing is cached on disk and no network is used.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pesc.errors import EvaluationError

if TYPE_CHECKING:
    from datasets import DatasetDict

SUBSET_COLUMNS = ("subject", "subset", "category", "type")


def load_rows(*, files: Mapping[str, str], subset: str | None = None, siblings: Sequence[str] = (), **_metadata: Any) -> DatasetDict:
    """The splits of one task.

    files: split -> path.  subset: the stock task's data set name; kept are the rows that carry it in a column named subject, subset,
    category or type (spaces, hyphens and underscores count as equal), and all rows of a file that tells no subsets apart.
    siblings: the data set names of the whole benchmark; a column with one of them does tell subsets apart.
    Raises EvaluationError for a file that cannot be read or has no rows, or none of this subset.
    """
    from datasets import Dataset, DatasetDict

    splits = {}
    for split, path in files.items():
        rows = select_subset(read_rows(Path(path)), subset, siblings, f"{Path(path).name} ({split})")
        if not rows:
            raise EvaluationError(f"Benchmark file {Path(path).name} ({split}) has no rows; check evaluate.benchmarks.*.files.")
        splits[split] = Dataset.from_list(rows)
    return DatasetDict(splits)


def select_subset(
    rows: list[dict[str, Any]], subset: str | None, siblings: Sequence[str] = (), file: str = "the file"
) -> list[dict[str, Any]]:
    """Rows of one subset, by the first column that knows the subset; all of them where no column knows it or one of its siblings.

    Raises EvaluationError when a column tells the subsets apart and has no row of this one.
    """
    if subset is None:
        return rows
    wanted, known = _plain(subset), {_plain(name) for name in siblings}
    for column in SUBSET_COLUMNS:
        chosen = [row for row in rows if column in row and _plain(row[column]) == wanted]
        if chosen:
            return chosen
    for column in SUBSET_COLUMNS:
        there = {_plain(row[column]) for row in rows if column in row}
        if there & known:
            raise EvaluationError(
                f"Benchmark file {file} has no row of {subset} in its column {column} ({len(there & known)} of {len(known)} subsets are "
                "there); give the whole file, or name the tasks that it has."
            )
    return rows


def _plain(value: Any) -> str:
    return str(value).lower().replace(" ", "_").replace("-", "_").replace("&", "and")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a .jsonl, .json (a list), .csv or .parquet file, each also with .gz.  Raises EvaluationError naming file and line."""
    kind = path.name.removesuffix(".gz").rpartition(".")[2].lower()
    if kind == "parquet":
        import pyarrow.parquet

        return pyarrow.parquet.read_table(path).to_pylist()
    if kind not in {"jsonl", "json", "csv"}:
        raise EvaluationError(f"Benchmark file {path.name} is of an unknown kind; use .jsonl, .json, .csv or .parquet (also .gz).")
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if path.name.endswith(".gz") else raw).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError, EOFError) as error:
        raise EvaluationError(f"Benchmark file {path.name} cannot be read: {type(error).__name__}; fetch the source again.") from None
    if kind == "csv":
        return list(csv.DictReader(io.StringIO(text)))
    return _json_rows(text, path.name)


def _json_rows(text: str, name: str) -> list[dict[str, Any]]:
    if text.lstrip().startswith("["):
        rows = json.loads(text)
    else:
        rows = []
        for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: U+2028 may stand inside a JSON string
            try:
                rows += [json.loads(line)] if line.strip() else []
            except json.JSONDecodeError as error:
                raise EvaluationError(f"Benchmark file {name}, line {number} is not JSON ({error.msg}); fetch the source again.") from None
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise EvaluationError(f"Benchmark file {name}, row {number} is {type(row).__name__}, not a map of fields.")
    return rows
