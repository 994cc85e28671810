"""Row files cut into shards, for workers that read side by side.

Shards depend on the files alone: the same files give the same shards, whoever reads them and however many there are.  Reading the
shards in order gives what `read_rows` gives of the files in order, with the same row numbers.  A file that cannot be entered in the
middle (CSV, compressed text, UTF-16, Python) is one shard.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pesc.data.rows import kind_of, read_part
from pesc.data.streams import SEPARATOR_BYTES, Layout, TextBytes, compression_of, find_cuts, has_wide_mark, line_feeds
from pesc.data.table_rows import batch_sizes, group_sizes

TARGET_BYTES = 32 << 20


@dataclass(frozen=True, slots=True)
class Shard:
    """Rows of one file that one worker reads.

    start, stop: bytes of JSON, row groups of Parquet, record batches of Arrow; stop None: to the end of the file.
    """

    path: Path
    file: str
    """The file's path relative to the root, as the ledger names it."""
    part: int
    """Place among the shards of its file, from 0."""
    kind: str
    start: int = 0
    stop: int | None = None
    first: int = 1
    """Number of its first row: the line of JSON lines, else the position in the file, from 1."""


def plan_shards(root: Path, files: Sequence[str], target_bytes: int = TARGET_BYTES) -> list[Shard]:
    """The shards of some files (relative to `root`), sorted by file and part.

    target_bytes: a shard ends with the first row that brings it to this size (of a table: in memory).  Raises DataError for a file
    that cannot be read at all, naming it.
    """
    shards: list[Shard] = []
    for file in sorted(set(files)):
        path = root / file
        kind = kind_of(path)
        starts = [(0, 1), *_starts(path, kind, max(1, target_bytes))]
        stops = [start for start, _ in starts[1:]]
        for part, ((start, first), stop) in enumerate(zip(starts, [*stops, None], strict=True)):
            shards.append(Shard(path, file, part, kind, start, stop, first))
    return shards


def read_shard(shard: Shard) -> Iterator[tuple[int, Any]]:
    """(number, row or BadRow) of each row of a shard; see `read_rows`."""
    return read_part(shard.path, shard.kind, shard.start, shard.stop, shard.first)


def _starts(path: Path, kind: str, target: int) -> Iterator[tuple[int, int]]:
    """(start, number of the first row) of every shard of a file but the first."""
    if kind in ("python", "csv"):
        return
    if kind in ("parquet", "arrow"):
        yield from _table_starts(group_sizes(path) if kind == "parquet" else batch_sizes(path), target)
    elif not compression_of(path) and path.stat().st_size > target and not has_wide_mark(path):
        yield from _json_starts(path, kind, target)  # type: ignore[arg-type]


def _table_starts(sizes: list[tuple[int, int]], target: int) -> Iterator[tuple[int, int]]:
    first, held = 1, 0
    for index, (rows, size) in enumerate(sizes[:-1], start=1):
        first, held = first + rows, held + size
        if held >= target:
            yield index, first
            held = 0


def _json_starts(path: Path, layout: Layout, target: int) -> Iterator[tuple[int, int]]:
    """Found in one pass over the bytes: places behind a separator, and the rows before them."""
    with path.open("rb") as stream:
        offset = len(codecs.BOM_UTF8) if stream.read(3) == codecs.BOM_UTF8 else 0
    size, rows, goal = path.stat().st_size, 0, target
    for block, places in _blocks(path, layout):
        if places is None and goal > offset + len(block):  # counting is faster than finding
            rows, offset = rows + block.count(b"\n"), offset + len(block)
            continue
        starts = offset + SEPARATOR_BYTES[layout] + (line_feeds(block) if places is None else places)
        index = int(starts.searchsorted(goal))
        while index < len(starts):
            start, index = int(starts[index]), index + 1
            if start < size:
                yield start, rows + index + 1
            goal = start + target
            index += int(starts[index:].searchsorted(goal))
        rows, offset = rows + len(starts), offset + len(block)


def _blocks(path: Path, layout: Layout) -> Iterator[tuple[bytes, Any]]:
    """The blocks of a file, and where elements end in each; of lines they are not looked for yet."""
    text = TextBytes(path)
    if layout == "lines":
        yield from ((block, None) for block in text)
        return
    for block, places, closed in find_cuts(iter(text), layout):
        yield block, places
        if closed is not None:
            return
