"""Rows out of files: jsonl, json, csv (each also .gz), parquet, and Python sources."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from pesc.data.conversation import BadRow
from pesc.data.functions import read_functions
from pesc.data.sources import list_local, matches, select_paths
from pesc.errors import DataError, SourceError

ROW_SUFFIXES = (".jsonl", ".jsonl.gz", ".ndjson", ".json", ".json.gz", ".csv", ".csv.gz", ".parquet")
_CSV_FIELD_LIMIT = 1 << 30


def find_row_files(root: Path, globs: Sequence[str], suffixes: Sequence[str], what: str) -> list[str]:
    """Relative paths of the row files that the globs select, sorted.

    Files of other kinds (read-me, licence) are passed over.  Raises DataError when a glob selects no row file.
    """
    paths = [path.relative_to(root).as_posix() for path in list_local(root)]
    try:
        chosen = select_paths(paths, globs, what)
    except SourceError as error:
        raise DataError(str(error)) from None
    chosen = [path for path in chosen if path.lower().endswith(tuple(suffixes))]
    for glob in globs:
        if not any(matches(path, (glob,)) for path in chosen):
            raise DataError(f"{what}: {glob!r} selects no row files ({', '.join(suffixes)}). Its files are: {', '.join(paths[:8])}.")
    return chosen


def read_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """(number, row) of each row; a row that cannot be read is a BadRow.

    The number is the line of a jsonl file or a Python function, else the position from 1.  Raises DataError for a file that is
    broken as a whole.
    """
    name = path.name.lower()
    try:
        if name.endswith(".py"):
            yield from read_functions(path)
        elif name.endswith(".parquet"):
            yield from _read_parquet(path)
        else:
            with _open_text(path) as stream:
                yield from _reader_of(name)(stream, path)
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"{path.name} cannot be read: {error}. Fetch the file again.") from None


def _reader_of(name: str) -> Any:
    name = name.removesuffix(".gz")
    if name.endswith(".csv"):
        return _read_csv
    return _read_json if name.endswith(".json") else _read_jsonl


def _open_text(path: Path) -> IO[str]:
    if path.name.lower().endswith(".gz"):
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    return path.open("r", encoding="utf-8-sig", newline="")


def _read_jsonl(stream: IO[str], _path: Path) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(stream, start=1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except ValueError as error:
            yield number, BadRow(f"is not valid JSON ({error})")


def _read_json(stream: IO[str], path: Path) -> Iterator[tuple[int, Any]]:
    """An array of rows; a `.json` that holds one object a line, as some hub sets do, is read as jsonl."""
    text = stream.read()
    try:
        rows = json.loads(text)
    except ValueError as error:
        if text.lstrip().startswith("{"):
            yield from _read_jsonl(iter(text.splitlines()), path)  # type: ignore[arg-type]
            return
        raise DataError(f"{path.name} is not valid JSON: {error}. Fetch the file again.") from None
    if isinstance(rows, dict):
        rows = [rows]
    if not isinstance(rows, list):
        raise DataError(f"{path.name} must hold a JSON array of rows, not a {type(rows).__name__}. Check `files`.")
    yield from enumerate(rows, start=1)


def _read_csv(stream: IO[str], _path: Path) -> Iterator[tuple[int, Any]]:
    csv.field_size_limit(_CSV_FIELD_LIMIT)
    reader = csv.DictReader(stream)
    for number, row in enumerate(reader, start=1):
        if None in row or None in row.values():
            yield number, BadRow(f"does not have the {len(reader.fieldnames or ())} columns of the header")
        else:
            yield number, row


def _read_parquet(path: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        for batch in pq.ParquetFile(path).iter_batches(batch_size=4096):
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except pa.ArrowException as error:
        raise DataError(f"{path.name} is not a readable Parquet file: {error}. Fetch the file again.") from None
