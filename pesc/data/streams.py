"""The bytes of a text file: decompressed, in UTF-8, without a byte order mark, in blocks, and the rows they are cut into.

A row is what lies between two line feeds, or one element of a JSON array, or one of several JSON objects in a row.  Where it ends is
found on the bytes alone, before anything is parsed: a row with broken content does not hide the rows behind it, and a range of rows
can be read without those before it.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import lzma
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from pesc.errors import DataError

COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
MAX_ROW_BYTES = 64 << 20
"""A longer row is not held in memory, and not a row of instructions."""
BLOCK_BYTES = 1 << 20
_ZSTD_BLOCK = 1 << 16
"""pyarrow gives nothing of the read in which a damaged file breaks off, so reads are small."""
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
Layout = Literal["lines", "array", "objects"]


def compression_of(path: Path) -> str:
    """The suffix that says how a file is compressed; empty for none."""
    suffix = path.suffix.lower()
    return suffix if suffix in COMPRESSIONS else ""


def has_wide_mark(path: Path) -> bool:
    """Whether a plain file begins with the byte order mark of UTF-16 or UTF-32, so that it cannot be read from the middle."""
    with path.open("rb") as stream:
        head = stream.read(4)
    return any(head.startswith(mark) for mark, _ in _MARKS)


class TextBytes:
    """Iterates over blocks of UTF-8 bytes, in order.

    start, stop: a byte range of a plain UTF-8 file (stop None: to its end).  `broken` says, once the blocks are used up, why the data
    ends too soon; None when it does not.  Raises DataError naming the file when not even its first byte can be read.
    """

    def __init__(self, path: Path, start: int = 0, stop: int | None = None) -> None:
        self.path, self.start, self.stop = path, start, stop
        self.broken: str | None = None

    def __iter__(self) -> Iterator[bytes]:
        self.broken = None
        try:
            with _open(self.path) as stream:
                blocks = self._read(stream)
                yield from blocks if self.start else self._decoded(blocks)
        except OSError as error:
            raise _unreadable(self.path, error) from None

    def _read(self, stream: Any) -> Iterator[bytes]:
        if self.start:
            stream.seek(self.start)
        read = getattr(stream, "read1", None) or stream.read
        size = _ZSTD_BLOCK if compression_of(self.path) == ".zst" else BLOCK_BYTES
        left, some = (None if self.stop is None else self.stop - self.start), False
        while left is None or left > 0:
            try:
                block = read(size if left is None else min(size, left))
            except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
                if not some or (isinstance(error, OSError) and error.errno):  # a disk that fails is no property of the data
                    raise _unreadable(self.path, error) from None
                self.broken = f"the compressed data is damaged or cut off ({error})"
                return
            if not block:
                return
            some, left = True, None if left is None else left - len(block)
            yield bytes(block)

    def _decoded(self, blocks: Iterator[bytes]) -> Iterator[bytes]:
        """The blocks without a byte order mark; UTF-16 and UTF-32 become UTF-8."""
        head = b""
        for block in blocks:
            head += block
            if len(head) >= 4:
                break
        wide = next((name for mark, name in _MARKS if head.startswith(mark)), None)
        if wide is None:
            yield head.removeprefix(codecs.BOM_UTF8)
            yield from blocks
            return
        decoder = codecs.getincrementaldecoder(wide)("strict")
        try:
            yield decoder.decode(head).encode("utf-8")
            for block in blocks:
                yield decoder.decode(block).encode("utf-8")
            decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            self.broken = f"it is not valid {wide.upper()} ({error.reason})"


def _open(path: Path) -> Any:
    suffix = compression_of(path)
    if suffix == ".zst":
        import pyarrow as pa

        return pa.CompressedInputStream(pa.OSFile(str(path)), "zstd")
    opener: Any = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}.get(suffix)
    return opener(path, "rb") if opener else path.open("rb", buffering=0)


def _unreadable(path: Path, error: Exception) -> DataError:
    return DataError(f"{path.name} cannot be read: {error}. Fetch the file again.")


class Cuts(NamedTuple):
    """Where rows end in one block: places of the separators; `closed` is that of the `]` that ends an array, when it is here."""

    block: bytes
    places: np.ndarray[Any, Any]
    closed: int | None = None


SEPARATOR_BYTES: dict[Layout, int] = {"lines": 1, "array": 1, "objects": 0}
"""Bytes of the separator itself, which belong to no row."""


def line_feeds(block: bytes) -> np.ndarray[Any, Any]:
    """Places of the line feeds in a block."""
    return np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n"))


def find_cuts(blocks: Iterator[bytes], layout: Layout, inside: bool = False) -> Iterator[Cuts]:
    """The rows' ends in each block.  inside: the first block begins between two elements of an array, behind its `[`.

    The result does not depend on where one block ends and the next begins, but for an escape, which is never split.
    """
    if layout == "lines":
        for block in blocks:
            yield Cuts(block, line_feeds(block))
        return
    scanner = _Brackets(1 if inside else 0)
    held = b""
    for block in blocks:
        whole = held + block
        odd = (len(whole) - len(whole.rstrip(b"\\"))) % 2
        held = whole[len(whole) - odd :]
        yield scanner.cuts(whole[: len(whole) - odd], layout)
    if held:
        yield Cuts(held, np.empty(0, np.int64))


_KINDS = bytes(code in b'"[]{},\\' for code in range(256))
_STEPS = np.zeros(256, np.int8)
_STEPS[list(b"[{")] = 1
_STEPS[list(b"]}")] = -1


class _Brackets:
    """Depth of brackets outside of strings, carried from block to block."""

    def __init__(self, depth: int) -> None:
        self.depth, self.in_string, self.over = depth, 0, False

    def cuts(self, block: bytes, layout: Layout) -> Cuts:
        if self.over:
            return Cuts(block, np.empty(0, np.int64))
        places, codes, depths = self._scan(block)
        steps = _STEPS[codes]
        if layout == "objects":
            return Cuts(block, places[(steps < 0) & (depths == 0)] + 1)
        ends = np.flatnonzero((steps < 0) & (depths <= 0))
        commas = (codes == ord(",")) & (depths == 1)
        if not len(ends):
            return Cuts(block, places[commas])
        self.over = True
        return Cuts(block, places[: ends[0]][commas[: ends[0]]], int(places[ends[0]]))

    def _scan(self, block: bytes) -> tuple[Any, Any, Any]:
        """Places and bytes of brackets and commas outside of strings, and the depth after each."""
        places = np.flatnonzero(np.frombuffer(block.translate(_KINDS), np.bool_))
        codes = np.frombuffer(block, np.uint8)[places]
        quotes = (codes == ord('"')) & ~_escaped(places, codes == ord("\\"))
        parity = (np.cumsum(quotes) + self.in_string) & 1
        self.in_string = int(parity[-1]) if len(parity) else self.in_string
        outside = (_STEPS[codes] != 0) | (codes == ord(","))
        outside &= parity == 0
        places, codes = places[outside], codes[outside]
        depths = self.depth + np.cumsum(_STEPS[codes], dtype=np.int64)
        self.depth = int(depths[-1]) if len(depths) else self.depth
        return places, codes, depths


def _escaped(places: Any, backslash: Any) -> Any:
    """Which places stand behind an odd number of backslashes."""
    if not backslash.any():
        return np.zeros(len(places), np.bool_)
    joined = np.empty(len(places), np.bool_)  # to the backslash right before it
    joined[:1] = False
    joined[1:] = backslash[:-1] & (np.diff(places) == 1)
    run_start = np.maximum.accumulate(np.where(joined, 0, np.arange(len(places))))
    return joined & ((np.arange(len(places)) - run_start) % 2 == 1)


class Piece(NamedTuple):
    """The bytes of one row; None when it is longer than MAX_ROW_BYTES.

    end: separator, close (the `]` of an array), rest (what follows the last of them).
    """

    data: bytes | None
    end: Literal["separator", "close", "rest"]


def cut_pieces(cuts: Iterator[Cuts], layout: Layout) -> Iterator[Piece]:
    """The rows' bytes, in order; the last piece is always the `rest`, which may be empty."""
    skip, parts, size = SEPARATOR_BYTES[layout], [], 0
    for block, places, closed in cuts:
        begin = 0
        ends: Sequence[int] = places.tolist()
        for place in ends:
            yield _joined(parts, size, block, begin, place, "separator")
            parts, size, begin = [], 0, place + skip
        if closed is not None:
            yield _joined(parts, size, block, begin, closed, "close")
            parts, size, begin = [], 0, closed + 1
        size += len(block) - begin
        parts = [*parts, block[begin:]] if size <= MAX_ROW_BYTES else []
    yield Piece(b"".join(parts) if size <= MAX_ROW_BYTES else None, "rest")


def _joined(parts: list[bytes], size: int, block: bytes, begin: int, end: int, kind: Literal["separator", "close"]) -> Piece:
    if size + end - begin > MAX_ROW_BYTES:
        return Piece(None, kind)
    return Piece(b"".join((*parts, block[begin:end])) if parts else block[begin:end], kind)
