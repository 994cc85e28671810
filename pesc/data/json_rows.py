"""JSON rows: one a line, the elements of an array, or objects one after the other; never more than one row in memory."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pesc.data.conversation import BadRow
from pesc.data.streams import MAX_ROW_BYTES, Layout, TextBytes, cut_pieces, find_cuts
from pesc.errors import DataError

MAX_NESTING = 200
"""Deeper rows are refused: how deep Python's parser can go depends on the machine and on who calls it."""
TOO_LONG = f"is longer than {MAX_ROW_BYTES >> 20} MiB"
_SPACE = b" \t\r\n"
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
_BRACKET = re.compile(r"[\[\]{}]")


def decode_row(data: bytes | None) -> Any:
    """The JSON value of one row's bytes, or a BadRow that says why there is none."""
    if data is None:
        return BadRow(TOO_LONG)
    try:
        text = data.decode("utf-8")
        if text.count("{") + text.count("[") > MAX_NESTING and _nesting(text) > MAX_NESTING:
            return BadRow(f"is nested more than {MAX_NESTING} deep")
        return json.loads(text)
    except UnicodeDecodeError as error:
        return BadRow(f"is not valid UTF-8 (byte 0x{data[error.start]:02x} at position {error.start})")
    except RecursionError:
        return BadRow(f"is nested more than {MAX_NESTING} deep")
    except ValueError as error:
        return BadRow(f"is not valid JSON ({error})")


def _nesting(text: str) -> int:
    depth = deepest = 0
    for bracket in _BRACKET.findall(_STRING.sub("", text)):
        depth += 1 if bracket in "[{" else -1
        deepest = max(deepest, depth)
    return deepest


def layout_of(path: Path) -> Layout:
    """How a JSON file holds its rows.  `.jsonl` and `.ndjson`: lines.  `.json`: seen from its beginning.

    A `.json` whose first line is a whole object holds one a line, as some hub sets do.  Raises DataError for a `.json` that holds
    neither an array nor objects.
    """
    if ".json" not in path.suffixes[-2:]:
        return "lines"
    head = b""
    for block in TextBytes(path):
        head = (head + block).lstrip(_SPACE)
        if b"\n" in head or head[:1] not in b"{" or len(head) > MAX_ROW_BYTES:
            break
    if head[:1] == b"[":
        return "array"
    if head[:1] != b"{":
        held = "is empty" if not head else "holds neither a JSON array of rows nor JSON objects"
        raise DataError(f"{path.name} {held}. Check `files`, or fetch the file again.")
    return "objects" if isinstance(decode_row(head.split(b"\n", 1)[0]), BadRow) else "lines"


def read_json(path: Path, layout: Layout, start: int = 0, stop: int | None = None, first: int = 1) -> Iterator[tuple[int, Any]]:
    """(number, row) of the rows in a byte range, counted from `first`: the line, or the place in the file.

    A range begins behind a separator, or at 0.  Data that breaks off gives one BadRow in the place of the row that it breaks.
    """
    text = TextBytes(path, start, stop)
    pieces = cut_pieces(find_cuts(iter(text), layout, inside=start > 0 and layout == "array"), layout)
    reader = _read_array(pieces, text, first) if layout == "array" else _read_sequence(pieces, text, first, layout == "lines")
    yield from reader


def _read_sequence(pieces: Iterator[Any], text: TextBytes, number: int, lines: bool) -> Iterator[tuple[int, Any]]:
    for data, end in pieces:
        if end == "rest" and text.broken:
            yield number, broken_row(text)
            return
        if data is not None and lines and data.startswith(codecs.BOM_UTF8):  # of a file that was appended to another
            data = data[3:]
        if data is None or data.strip(_SPACE):
            yield number, decode_row(data)
            number += 1
        elif lines:
            number += 1


def _read_array(pieces: Iterator[Any], text: TextBytes, number: int) -> Iterator[tuple[int, Any]]:
    bracket, closed = text.start == 0, False
    for data, end in pieces:
        if data is not None:
            data = (data.lstrip(_SPACE).removeprefix(b"[") if bracket else data).strip(_SPACE)
        bracket = False
        if end == "rest":
            yield from _read_tail(data, text, number, closed)
            return
        closed = end == "close"
        if end == "separator" or data is None or data:
            yield number, decode_row(data)
            number += 1


def _read_tail(data: bytes | None, text: TextBytes, number: int, closed: bool) -> Iterator[tuple[int, Any]]:
    """What follows the last comma or the closing bracket of an array."""
    if text.broken:
        yield number, broken_row(text)
    elif closed:
        if data is None or data:
            yield number, BadRow("is behind the end of the array: what follows is not read")
    elif text.stop is None:
        yield number, BadRow("breaks off: the file ends inside of the array, and rows after this one are lost")


def broken_row(text: TextBytes) -> BadRow:
    """The row in which a damaged file ends."""
    return BadRow(f"breaks off: {text.broken}; rows after this one are lost")
