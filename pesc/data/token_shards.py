"""Tokenised rows on disk, in shards, so that neither the text nor the tokens of a mixture must fit in memory.

    cut_rows       mixture.parquet -> one Arrow file of conversations a shard       (the stage)
    encode_shard   one such file -> four npy files                                  (a worker; returns counts)
    TokenShards    all npy files of all shards, memory-mapped, as one list of rows  (the stage)

The files of a shard, N rows of T tokens together: ids.npy int32 [T], loss.npy bool [T], lengths.npy int32 [N], rows.npy int64 [N]
(the row's number in the mixture; dropped rows are missing).
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from pesc.data.config import TokenizeConfig
from pesc.data.encoding import Conversation, RowEncoder, load_tokenizer

SHARD_ROWS = 8192
_BATCH = 512
"""Rows that are tokenised at a time: enough for every core, and their offsets stay below 100 MB."""


@dataclass(frozen=True)
class Shard:
    """Rows `first_row` … of the mixture: the file of their conversations, and the directory of their tokens."""

    conversations: Path
    tokens: Path
    first_row: int


def cut_rows(parquet: Path, folder: Path, skip: int = 0, shard_rows: int = SHARD_ROWS) -> list[Shard]:
    """Write the conversations of a parquet file, without its first `skip` rows, in files of `shard_rows` rows below `folder`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    shards: list[Shard] = []
    options = pa.ipc.IpcWriteOptions(compression="lz4")
    with pq.ParquetFile(parquet) as file:
        batches = file.iter_batches(batch_size=shard_rows, columns=["messages"])
        for number, table in enumerate(_rebatch(batches, skip, shard_rows)):
            shard = Shard(folder / f"{number:05d}.arrow", folder / f"{number:05d}", skip + number * shard_rows)
            with pa.OSFile(str(shard.conversations), "wb") as sink, pa.ipc.new_file(sink, table.schema, options=options) as writer:
                writer.write_table(table, max_chunksize=_BATCH)
            shards.append(shard)
    return shards


def _rebatch(batches: Any, skip: int, size: int) -> Iterator[Any]:
    """Tables of exactly `size` rows (the last may be shorter), whatever row groups the file has."""
    import pyarrow as pa

    pending: list[Any] = []
    held = 0
    for batch in batches:
        skipped = min(skip, batch.num_rows)
        skip -= skipped
        pending.append(batch.slice(skipped))
        held += batch.num_rows - skipped
        while held >= size:
            table = pa.Table.from_batches(pending)
            yield table.slice(0, size)
            pending, held = table.slice(size).to_batches(), held - size
    if held:
        yield pa.Table.from_batches(pending)


def read_conversations(column: Any) -> list[Conversation]:
    """The rows of an Arrow column of messages, as (role, content) pairs."""
    turns = column.flatten()
    pairs = list(zip(turns.field("role").to_pylist(), turns.field("content").to_pylist(), strict=True))
    ends = np.cumsum(column.value_lengths().to_numpy(zero_copy_only=False)).tolist()
    return [pairs[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def encode_shard(shard: Shard, *, model: Path, config: TokenizeConfig, stage_process: int) -> Counter[str]:
    """Tokenise one shard; returns counts: rows, tokens, supervised_tokens, and those of `RowEncoder.encode`.

    stage_process: the process id of the stage.  Where the shards run in the stage itself the tokenizer uses all cores; in a worker
    it uses one, for there are other workers.  Raises DataError as RowEncoder does.
    """
    import pyarrow as pa

    encoder = _encoder(model, config)  # pyright: ignore[reportArgumentType]  a frozen model is hashable
    ids, loss, lengths, rows = [], [], [], []
    counts: Counter[str] = Counter()
    first = shard.first_row
    with pa.memory_map(str(shard.conversations)) as source, _tokenizer_threads(os.getpid() == stage_process):
        reader = pa.ipc.open_file(source)
        for number in range(reader.num_record_batches):
            conversations = read_conversations(reader.get_batch(number).column("messages"))
            encoded = encoder.encode(conversations)
            counts.update(encoded.counts)
            ids += [row.ids for row in encoded.rows]
            loss += [row.loss() for row in encoded.rows]
            lengths += [len(row.ids) for row in encoded.rows]
            rows += [first + place for place in encoded.places]
            first += len(conversations)
    shard.tokens.mkdir(parents=True, exist_ok=True)
    np.save(shard.tokens / "ids.npy", np.concatenate([np.empty(0, np.int32), *ids]))
    supervised = np.concatenate([np.empty(0, np.bool_), *loss])
    np.save(shard.tokens / "loss.npy", supervised)
    np.save(shard.tokens / "lengths.npy", np.array(lengths, dtype=np.int32))
    np.save(shard.tokens / "rows.npy", np.array(rows, dtype=np.int64))
    counts.update(rows=len(rows), tokens=sum(lengths), supervised_tokens=int(supervised.sum()))
    return counts


@lru_cache(maxsize=1)
def _encoder(model: Path, config: TokenizeConfig) -> RowEncoder:
    """One encoder a process: loading a tokenizer takes a second, a shard some seconds."""
    return RowEncoder(load_tokenizer(model), config)


@contextlib.contextmanager
def _tokenizer_threads(enabled: bool) -> Iterator[None]:
    """Let the tokenizer use all cores, or one.  Stage processes switch threads off against deadlocks after a fork; nothing is forked here."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = str(enabled).lower()
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


class TokenShards:
    """The rows of all shards, in the mixture's order.  Only lengths and row numbers are in memory.

    lengths: int32 [N], tokens of each row.  source_rows: int64 [N], its number in the mixture.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        kept = [(folder, lengths) for folder in folders if (lengths := np.load(folder / "lengths.npy")).size]
        self._ids = [np.load(folder / "ids.npy", mmap_mode="r") for folder, _ in kept]
        self._loss = [np.load(folder / "loss.npy", mmap_mode="r") for folder, _ in kept]
        self.lengths = np.concatenate([np.empty(0, np.int32), *(lengths for _, lengths in kept)])
        self.source_rows = np.concatenate([np.empty(0, np.int64), *(np.load(folder / "rows.npy") for folder, _ in kept)])
        self._shard_of = np.repeat(np.arange(len(kept)), [len(lengths) for _, lengths in kept])
        self._ends = np.concatenate([np.empty(0, np.int64), *(np.cumsum(lengths, dtype=np.int64) for _, lengths in kept)])

    def gather(self, rows: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ids (int32) and loss (bool) of these rows, one behind the other."""
        shards, ends = self._shard_of[rows].tolist(), self._ends[rows]
        starts, ends = (ends - self.lengths[rows]).tolist(), ends.tolist()
        ids = [self._ids[shard][start:end] for shard, start, end in zip(shards, starts, ends, strict=True)]
        loss = [self._loss[shard][start:end] for shard, start, end in zip(shards, starts, ends, strict=True)]
        return np.concatenate(ids), np.concatenate(loss)
