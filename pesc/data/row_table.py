"""All rows that `prepare` let pass, as arrays: what dedup decides on, while the texts stay in the batches' files.

N rows over all batches, in the order of the batches; a place is an index into them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from pesc.data.exact_dedup import KEYS
from pesc.data.prepare import Batch, open_arrow


class RowTable:
    """Keys of all rows, and access to what the batches hold of them."""

    def __init__(self, batches: Sequence[Batch], datasets: Sequence[str]) -> None:
        self.batches = batches
        self.datasets = list(datasets)
        loaded = [np.load(batch.out / "keys.npy") for batch in batches]
        self.keys = np.concatenate([np.zeros(0, KEYS), *loaded])
        sizes = np.array([len(part) for part in loaded], dtype=np.int64)
        self.batch = np.repeat(np.arange(len(batches)), sizes)
        self.local = np.arange(len(self.keys)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        self.dataset = np.array([self.datasets.index(batch.dataset) for batch in batches], dtype=np.int64)[self.batch]

    def __len__(self) -> int:
        return len(self.keys)

    def dataset_of(self, place: int) -> str:
        """Name of the data set."""
        return self.datasets[self.dataset[place]]

    def file_of(self, place: int) -> str:
        """Name of the file that the row came from."""
        return self.batches[self.batch[place]].files[self.keys["file"][place]]

    def where(self, place: int) -> str:
        """A row's place for messages."""
        return f"{self.dataset_of(place)}/{self.file_of(place)} row {self.keys['row'][place]}"

    def band(self, number: int, places: np.ndarray) -> np.ndarray:
        """The keys of one band for some rows, uint64 [n]."""
        columns = [np.load(batch.out / "bands.npy", mmap_mode="r")[number] for batch in self.batches]
        return np.concatenate(columns)[places]

    def by_batch(self, places: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """(batch, local row numbers) of some rows, for each batch that has any; within a batch in the order of `places`."""
        if not len(places):
            return
        order = np.argsort(self.batch[places], kind="stable")
        batches, starts = np.unique(self.batch[places][order], return_index=True)
        for batch, part in zip(batches.tolist(), np.split(order, starts[1:]), strict=True):
            yield batch, self.local[places[part]]

    def gather(self, places: np.ndarray, columns: Sequence[str]) -> pa.Table:
        """Columns of rows.arrow for some rows, in the order of `places`.  Files are mapped for this call alone."""
        if not len(places):
            return open_arrow(self.batches[0].out / "rows.arrow").select(columns).slice(0, 0)
        parts = [
            open_arrow(self.batches[batch].out / "rows.arrow").select(columns).take(pa.array(local))
            for batch, local in self.by_batch(places)
        ]
        back = np.argsort(np.argsort(self.batch[places], kind="stable"), kind="stable")
        return pa.concat_tables(parts).combine_chunks().take(pa.array(back))


class Sketches:
    """MinHash values of all rows, memory-mapped."""

    def __init__(self, rows: RowTable) -> None:
        self._rows = rows
        self._files = [np.load(batch.out / "values.npy", mmap_mode="r") for batch in rows.batches]

    def of(self, places: Sequence[int]) -> np.ndarray:
        """Values of some rows, uint32 [n, P]."""
        return np.stack([self._files[self._rows.batch[place]][self._rows.local[place]] for place in places])


class ShingleSets:
    """The shingle sets that `prepare.shingle_sets` wrote for some rows, memory-mapped."""

    def __init__(self, rows: RowTable, places: np.ndarray) -> None:
        self._rows = rows
        self._slot = np.full(len(rows), -1, dtype=np.int64)
        self._files: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        for batch, local in rows.by_batch(places):
            mine = np.flatnonzero(rows.batch == batch)
            self._slot[mine[local]] = np.arange(len(local))
            folder: Path = rows.batches[batch].out
            self._files[batch] = (np.load(folder / "shingles.npy", mmap_mode="r"), np.load(folder / "shingle_offsets.npy"))

    def of(self, place: int) -> np.ndarray:
        """The sorted set of a row's n-gram hashes."""
        flat, offsets = self._files[self._rows.batch[place]]
        slot = self._slot[place]
        return np.asarray(flat[offsets[slot] : offsets[slot + 1]])
