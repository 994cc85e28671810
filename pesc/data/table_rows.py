"""Rows out of tables: Parquet by row groups, Arrow files and streams (what `datasets` saves) by record batches."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pesc.data.conversation import BadRow
from pesc.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

_SLICE = 4096
"""Rows that become Python objects at a time."""


def group_sizes(path: Path) -> list[tuple[int, int]]:
    """(rows, bytes in memory) of each row group of a Parquet file.  Raises DataError when the file has no readable footer."""
    metadata = _open_parquet(path).metadata
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    return [(group.num_rows, group.total_byte_size) for group in groups]


def read_parquet(path: Path, start: int = 0, stop: int | None = None, first: int = 1) -> Iterator[tuple[int, Any]]:
    """(number, row) of the row groups start … stop.  Each row of a damaged group is a BadRow: the footer says how many there are."""
    import pyarrow as pa

    file = _open_parquet(path)
    for group in range(start, file.num_row_groups if stop is None else stop):
        after = first + file.metadata.row_group(group).num_rows
        try:
            for batch in file.iter_batches(batch_size=_SLICE, row_groups=[group]):
                for row in _rows_of(batch):
                    yield first, row
                    first += 1
        except (pa.ArrowException, OSError) as error:
            if getattr(error, "errno", None):
                raise _unreadable(path, "Parquet", error) from None
            for number in range(first, after):
                yield number, BadRow(f"cannot be read: row group {group + 1} is damaged ({error})")
        first = after


def _open_parquet(path: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(path, "Parquet", error) from None


def batch_sizes(path: Path) -> list[tuple[int, int]]:
    """(rows, bytes in memory) of each record batch of an Arrow file; a batch that cannot be read counts as one row."""
    return [(1, 0) if isinstance(batch, BadRow) else (batch.num_rows, batch.nbytes) for batch in _batches(path, 0, None)]


def read_arrow(path: Path, start: int = 0, stop: int | None = None, first: int = 1) -> Iterator[tuple[int, Any]]:
    """(number, row) of the record batches start … stop.  A batch that cannot be read is one BadRow, and so is the break of a stream."""
    for batch in _batches(path, start, stop):
        rows = iter([batch]) if isinstance(batch, BadRow) else _rows_of(batch)
        for row in rows:
            yield first, row
            first += 1


def _batches(path: Path, start: int, stop: int | None) -> Iterator[pa.RecordBatch | BadRow]:
    """Record batches of the file format or of the stream format; a stream is not read behind its break."""
    import pyarrow as pa

    try:
        source = pa.memory_map(str(path))
        head = source.read(6)
        if head[:4] == b"FEA1":
            raise DataError(f"{path.name} is of the first Feather format, which is no longer read. Save it again as Feather 2 or Parquet.")
        source.seek(0)
        reader: Any = pa.ipc.open_file(source) if head == b"ARROW1" else pa.ipc.open_stream(source)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(path, "Arrow", error) from None
    stream, index = head != b"ARROW1", 0 if head != b"ARROW1" else start
    while stop is None or index < stop:
        if not stream and index >= reader.num_record_batches:
            return
        try:
            batch = reader.read_next_batch() if stream else reader.get_batch(index)
        except StopIteration:
            return
        except (pa.ArrowException, OSError) as error:
            batch = BadRow(f"breaks off: record batch {index + 1} is damaged or cut off ({error}); its rows are lost")
        if index >= start:
            yield batch
        if stream and isinstance(batch, BadRow):
            return
        index += 1


def _rows_of(batch: pa.RecordBatch) -> Iterator[Any]:
    """The rows of a batch as maps; one whose values are no Python values (broken UTF-8, a date out of range) is a BadRow."""
    import pyarrow as pa

    for begin in range(0, batch.num_rows, _SLICE):
        part = batch.slice(begin, _SLICE)
        try:
            rows: list[Any] = part.to_pylist()
        except (ValueError, OverflowError, pa.ArrowException):
            rows = [_row_of(part.slice(index, 1)) for index in range(part.num_rows)]
        yield from rows


def _row_of(batch: pa.RecordBatch) -> Any:
    import pyarrow as pa

    try:
        return batch.to_pylist()[0]
    except (ValueError, OverflowError, pa.ArrowException) as error:
        return BadRow(f"holds a value that cannot be read ({error})")


def _unreadable(path: Path, kind: str, error: Exception) -> DataError:
    return DataError(f"{path.name} is not a readable {kind} file: {error}. Fetch the file again.")
