"""Packed blocks as Arrow IPC streams, which `datasets.Dataset.from_file` and the trainer map into memory.

NAME-00000.arrow, NAME-00001.arrow …: one row a block, not padded, all columns lists of int32.
- input_ids     - labels (-100: no loss)     - position_ids (from 0 in each packed row)
- cu_seqlens    where the packed rows begin, and the length of the block: what variable-length attention kernels take
- domain        (held-out blocks only, a string) whose rows are in the block
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pesc.data.encoding import IGNORED
from pesc.data.token_shards import TokenShards

COLUMNS = ("input_ids", "labels", "position_ids", "cu_seqlens")
FILE_BLOCKS = 32_768
_BATCH_TOKENS = 2**21


def write_blocks(
    folder: Path,
    name: str,
    shards: TokenShards,
    blocks: Sequence[Sequence[int]],
    domains: Sequence[str] | None = None,
    file_blocks: int = FILE_BLOCKS,
) -> list[Path]:
    """Write blocks of row numbers, at most `file_blocks` to a file; `domains` names the domain of each block.  Returns the files."""
    import pyarrow as pa

    fields = [pa.field(column, pa.list_(pa.int32())) for column in COLUMNS]
    schema = pa.schema(fields if domains is None else [*fields, pa.field("domain", pa.string())])
    paths = []
    for number, first in enumerate(range(0, len(blocks), file_blocks)):
        path = folder / f"{name}-{number:05d}.arrow"
        end = min(first + file_blocks, len(blocks))
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
            for start, stop in _batches(shards.lengths, blocks, first, end):
                columns = _columns(shards, blocks[start:stop])
                columns += [] if domains is None else [pa.array(domains[start:stop], pa.string())]
                writer.write_batch(pa.record_batch(columns, schema=schema))
        paths.append(path)
    return paths


def _batches(lengths: np.ndarray, blocks: Sequence[Sequence[int]], first: int, end: int) -> list[tuple[int, int]]:
    """Ranges of blocks with some two million tokens each (and at least one block)."""
    ranges, start, tokens = [], first, 0
    for number in range(first, end):
        size = int(lengths[blocks[number]].sum())
        if tokens and tokens + size > _BATCH_TOKENS:
            ranges.append((start, number))
            start, tokens = number, 0
        tokens += size
    return [*ranges, (start, end)]


def _columns(shards: TokenShards, blocks: Sequence[Sequence[int]]) -> list[Any]:
    """The Arrow columns of some blocks, without a Python object for each token."""
    import pyarrow as pa

    counts = np.array([len(block) for block in blocks])
    rows = np.concatenate([np.asarray(block, dtype=np.int64) for block in blocks])
    lengths = shards.lengths[rows].astype(np.int64)
    ids, loss = shards.gather(rows)
    row_starts = np.cumsum(lengths) - lengths
    row_edges = np.concatenate([[0], np.cumsum(counts)])
    token_edges = np.concatenate([row_starts, [len(ids)]])[row_edges]
    positions = np.arange(len(ids)) - np.repeat(row_starts, lengths)
    edges = np.insert(row_starts + lengths, row_edges[:-1], token_edges[:-1]) - np.repeat(token_edges[:-1], counts + 1)
    values = (
        (token_edges, ids),
        (token_edges, np.where(loss, ids, np.int32(IGNORED))),
        (token_edges, positions),
        (row_edges + np.arange(len(row_edges)), edges),
    )
    return [
        pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(array.astype(np.int32, copy=False)))
        for offsets, array in values
    ]
