"""Chosen rows of a Parquet file in another order, without the whole table in memory.

    pass 1   the file is streamed; each chosen row goes to the bucket that holds its place in the output     (Arrow streams in `work`)
    pass 2   bucket after bucket is read, put in order, and written as one row group

The bytes written depend on the rows and their order alone: not on how the input was cut into row groups, nor on its metadata.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

GROUP_ROWS = 16_384
"""Rows of one bucket and of one row group of the output."""
_MAX_BUCKETS = 256
"""Files that are open at once; a larger output has larger row groups."""
_READ_ROWS = 4096
_READ_BYTES = 1 << 20
_PLACE = "__place"


def write_reordered(
    source: Path,
    outputs: Mapping[Path, np.ndarray],
    work: Path,
    on_progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> None:
    """Write each output as the rows `outputs[path]` of the Parquet file `source`, in that order.

    outputs: path -> int64 row numbers of `source`; no row may be chosen twice, over all outputs.  work: a directory for scratch;
    it is emptied before and removed after.  on_progress(rows read, rows in the source).
    """
    import pyarrow.parquet as pq

    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    with pq.ParquetFile(source, buffer_size=_READ_BYTES, pre_buffer=False) as file:
        schema = file.schema_arrow.remove_metadata()
        bucket_rows = {path: max(GROUP_ROWS, -(-len(rows) // _MAX_BUCKETS)) for path, rows in outputs.items()}
        targets, buckets = _targets(outputs, bucket_rows, file.metadata.num_rows)
        _scatter(file, schema, targets, buckets, work, on_progress)
    first = 0
    for path, rows in outputs.items():
        count = -(-len(rows) // bucket_rows[path])
        _gather(path, schema, [work / f"{number}.arrow" for number in range(first, first + count)])
        first += count
    shutil.rmtree(work)


def _targets(outputs: Mapping[Path, np.ndarray], bucket_rows: Mapping[Path, int], total: int) -> tuple[np.ndarray, np.ndarray]:
    """(place over all outputs, or -1; bucket by that place).  int64 and int32."""
    targets = np.full(total, -1, dtype=np.int64)
    buckets: list[np.ndarray] = []
    start = first = 0
    for path, rows in outputs.items():
        if np.any(targets[rows] >= 0):
            raise ValueError("a row is chosen twice")
        targets[rows] = np.arange(start, start + len(rows))
        own = first + np.arange(len(rows), dtype=np.int32) // bucket_rows[path]
        buckets.append(own.astype(np.int32))
        start, first = start + len(rows), first + -(-len(rows) // bucket_rows[path])
    return targets, np.concatenate(buckets) if buckets else np.zeros(0, dtype=np.int32)


def _scatter(file: Any, schema: Any, targets: np.ndarray, buckets: np.ndarray, work: Path, on_progress: Callable[[int, int], None]) -> None:
    """Pass 1: every chosen row to its bucket, with its place."""
    import pyarrow as pa

    placed = schema.append(pa.field(_PLACE, pa.int64()))
    with ExitStack() as stack:
        names = range(int(buckets[-1]) + 1 if len(buckets) else 0)
        writers = [
            stack.enter_context(pa.ipc.new_stream(stack.enter_context(pa.OSFile(f"{work / str(n)}.arrow", "wb")), placed)) for n in names
        ]
        done = 0
        for batch in file.iter_batches(batch_size=_READ_ROWS):
            places = targets[done : done + batch.num_rows]
            chosen = np.flatnonzero(places >= 0)
            chosen = chosen[np.argsort(places[chosen])]
            places = places[chosen]
            part = pa.RecordBatch.from_arrays([*batch.take(pa.array(chosen)).columns, pa.array(places)], schema=placed)
            for number, (start, end) in _runs(buckets[places]):
                writers[number].write_batch(part.slice(start, end - start))
            done += batch.num_rows
            on_progress(done, len(targets))


def _runs(values: np.ndarray) -> Iterator[tuple[int, tuple[int, int]]]:
    """Each run of equal values with its half-open range."""
    if len(values):
        edges = [0, *(np.flatnonzero(np.diff(values)) + 1).tolist(), len(values)]
        yield from ((int(values[start]), (start, end)) for start, end in pairwise(edges))


def _gather(path: Path, schema: Any, buckets: list[Path]) -> None:
    """Pass 2: each bucket in order, as one row group."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for bucket in buckets:
            with pa.OSFile(str(bucket), "rb") as stream, pa.ipc.open_stream(stream) as reader:
                table = reader.read_all()
            order = np.argsort(table.column(_PLACE).to_numpy())
            rows = table.drop_columns([_PLACE]).take(pa.array(order)).combine_chunks()
            writer.write_table(rows, row_group_size=max(1, rows.num_rows))
            bucket.unlink()
