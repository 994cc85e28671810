"""Rows out of files: JSON and JSON lines, CSV and TSV (each also .gz, .bz2, .xz, .zst), Parquet, Arrow, and Python sources.

A row that cannot be read is one BadRow in its place, and the rows around it are read; a file that cannot be read at all is a DataError.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pesc.data.conversation import BadRow
from pesc.data.functions import read_functions
from pesc.data.json_rows import TOO_LONG, broken_row, layout_of, read_json
from pesc.data.sources import list_local, matches, select_paths
from pesc.data.streams import COMPRESSIONS, MAX_ROW_BYTES, TextBytes, cut_pieces, find_cuts
from pesc.data.table_rows import read_arrow, read_parquet
from pesc.errors import DataError, SourceError

_TEXT_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
_ARROW_SUFFIXES = (".arrow", ".feather")
ROW_SUFFIXES = (*_TEXT_SUFFIXES, *(kind + packed for kind in _TEXT_SUFFIXES for packed in COMPRESSIONS), ".parquet", *_ARROW_SUFFIXES)
BOOKKEEPING = frozenset({"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"})
"""What `datasets` writes beside its rows."""


def find_row_files(root: Path, globs: Sequence[str], suffixes: Sequence[str], what: str) -> list[str]:
    """Relative paths of the row files that the globs select, sorted.

    Files of other kinds (read-me, licence, bookkeeping) are passed over.  Raises DataError when a glob selects no row file.
    """
    paths = [path.relative_to(root).as_posix() for path in list_local(root)]
    try:
        chosen = select_paths(paths, globs, what)
    except SourceError as error:
        raise DataError(str(error)) from None
    chosen = [path for path in chosen if path.lower().endswith(tuple(suffixes)) and path.rpartition("/")[2] not in BOOKKEEPING]
    for glob in globs:
        if not any(matches(path, (glob,)) for path in chosen):
            raise DataError(f"{what}: {glob!r} selects no row files ({', '.join(suffixes)}). Its files are: {', '.join(paths[:8])}.")
    return chosen


def kind_of(path: Path) -> str:
    """How the rows of a file lie: python, parquet, arrow, csv, or a layout of JSON (lines, array, objects).

    Raises DataError for a `.json` that holds no rows.
    """
    name = path.name.lower()
    for packed in COMPRESSIONS:
        name = name.removesuffix(packed)
    if name.endswith(".py"):
        return "python"
    if name.endswith(".parquet"):
        return "parquet"
    if name.endswith(_ARROW_SUFFIXES):
        return "arrow"
    return "csv" if name.endswith((".csv", ".tsv")) else layout_of(path)


def read_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """(number, row) of each row; a row that cannot be read is a BadRow.

    The number is the line of JSON lines or of a Python function, else the position from 1.  Where data breaks off (a truncated archive,
    an array without its end), the rows before are given, and the break is one BadRow.  Raises DataError for a file that is broken as a
    whole: no archive, no Parquet footer, no JSON at all.
    """
    yield from read_part(path, kind_of(path))


def read_part(path: Path, kind: str, start: int = 0, stop: int | None = None, first: int = 1) -> Iterator[tuple[int, Any]]:
    """`read_rows` of a part of a file, its rows numbered from `first`.

    start, stop: bytes of JSON (`start` behind a separator), row groups of Parquet, record batches of Arrow; a CSV or Python file has no
    parts.
    """
    if kind == "python":
        yield from read_functions(path)
    elif kind == "parquet":
        yield from read_parquet(path, start, stop, first)
    elif kind == "arrow":
        yield from read_arrow(path, start, stop, first)
    elif kind == "csv":
        yield from _read_csv(path)
    else:
        yield from read_json(path, kind, start, stop, first)  # type: ignore[arg-type]


class _CsvLines:
    """Lines of a CSV file as the `csv` module wants them.

    problem: what is wrong with a line since it was last reset.  partial: whether the last line has no line feed.
    """

    def __init__(self, text: TextBytes) -> None:
        self.problem: str | None = None
        self.partial = False
        self._pieces = cut_pieces(find_cuts(iter(text), "lines"), "lines")

    def __iter__(self) -> Iterator[str]:
        for data, end in self._pieces:
            if data is None:
                self.problem = TOO_LONG
                yield ""
                continue
            self.partial = end == "rest" and bool(data)
            line = data.decode("utf-8", "surrogateescape") + ("\n" if end == "separator" else "")
            yield from re.split(r"(?<=\r)(?=[^\n])", line) if "\r" in line else (line,)


def _read_csv(path: Path) -> Iterator[tuple[int, Any]]:
    csv.field_size_limit(MAX_ROW_BYTES)
    text = TextBytes(path)
    lines = _CsvLines(text)
    reader = csv.reader(lines, strict=True, delimiter="\t" if ".tsv" in path.name.lower() else ",")
    header = _header(reader, path)
    number, held = 1, None
    while True:
        problem: str | None = None
        try:
            cells = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            cells, problem = [""], f"is not valid CSV ({error})"
        problem, lines.problem = lines.problem or problem, None
        if not cells and not problem:
            continue
        if held is not None:
            yield number, held
            number += 1
        held = BadRow(problem) if problem else _csv_row(header, cells)
    if held is not None and not (text.broken and (lines.partial or isinstance(held, BadRow))):
        yield number, held
        number += 1
    if text.broken:
        yield number, broken_row(text)


def _header(reader: Any, path: Path) -> list[str]:
    try:
        header = next(reader, [])
    except csv.Error as error:
        raise DataError(f"{path.name}: the header is not valid CSV ({error}). Fetch the file again.") from None
    if twice := sorted({name for name in header if header.count(name) > 1}):
        raise DataError(f"{path.name}: the header names the column {twice[0]!r} twice. Rename one of them.")
    return header


def _csv_row(header: list[str], cells: list[str]) -> Any:
    if len(cells) != len(header):
        return BadRow(f"has {len(cells)} cells, but the header has {len(header)} columns")
    for cell in cells:
        if not cell.isascii() and any("\udc80" <= char <= "\udcff" for char in cell):
            return BadRow("is not valid UTF-8")
    return dict(zip(header, cells, strict=True))
