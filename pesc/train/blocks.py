"""Packed blocks on disk: memory-mapped Arrow streams, read one block at a time.

Files NAME-00000.arrow, NAME-00001.arrow …; the blocks are numbered through.  Columns: input_ids, labels (-100: no loss), position_ids
(start again at 0 with each packed row); held-out blocks also have a domain.  No torch here, so that the stage can look at the data
before it starts any rank.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import numpy as np
import pyarrow as pa

from pesc.errors import DataError

TRAINING, HELD_OUT = "blocks", "heldout"
COLUMNS = ("input_ids", "labels", "position_ids")
_OLD_FILE = "blocks.arrow"


class PackedBlocks:
    """Random access to the blocks of a tokenize object; nothing is copied before a block is asked for.

    name: TRAINING or HELD_OUT.  Raises DataError for files that are missing, cannot be read, lack a column, or hold no block.
    """

    def __init__(self, folder: Path, name: str = TRAINING) -> None:
        self._batches: list[pa.RecordBatch] = []
        self._places: list[tuple[Path, int]] = []
        """File of each record batch, and the number of its first block there."""
        for path in _find_files(folder, name):
            in_file = 0
            for batch in _read_batches(path):
                self._batches.append(batch)
                self._places.append((path, in_file))
                in_file += batch.num_rows
        self._ends = list(accumulate(batch.num_rows for batch in self._batches))
        if not self._ends:
            raise DataError(
                f"{folder} holds no block: the mixture is empty, or every row is longer than the context; see tokenize's stats.json."
            )

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Mapping[str, np.ndarray]:
        """One block as int64 arrays of equal length.  Raises DataError, naming the block, when the lengths differ."""
        which = bisect_right(self._ends, index)
        batch = self._batches[which]
        row = index - (self._ends[which] - batch.num_rows)
        block = {name: batch.column(name)[row].values.to_numpy().astype(np.int64) for name in COLUMNS}
        if len({array.size for array in block.values()}) != 1 or not block["input_ids"].size:
            path, first = self._places[which]
            raise DataError(
                f"{path}, block {first + row}: the columns {', '.join(COLUMNS)} must have one length, above 0; run tokenize again."
            )
        return block

    @cached_property
    def domains(self) -> dict[str, list[int]]:
        """The block numbers of each domain, for a loss by domain; empty for blocks that mix domains."""
        numbers: dict[str, list[int]] = {}
        for end, batch in zip(self._ends, self._batches, strict=True):
            names = batch.column("domain").to_pylist() if "domain" in batch.schema.names else []
            for number, name in enumerate(names, start=end - batch.num_rows):
                numbers.setdefault(name, []).append(number)
        return numbers


def _find_files(folder: Path, name: str) -> list[Path]:
    """The files of one kind of blocks, in order.  Raises DataError when there is none, one is missing, or they are of an older version."""
    paths = sorted(folder.glob(f"{name}-[0-9]*.arrow"))
    if not paths and name == TRAINING and (folder / _OLD_FILE).exists():
        raise DataError(f"{folder} holds {_OLD_FILE}, the one file of an earlier version; run tokenize again.")
    expected = [folder / f"{name}-{number:05d}.arrow" for number in range(max(1, len(paths)))]
    if missing := [path.name for path in expected if path not in paths]:
        raise DataError(f"{folder} lacks the packed blocks {missing[0]}; run tokenize again.")
    return paths


def _read_batches(path: Path) -> list[pa.RecordBatch]:
    """The mapped record batches of a file that have blocks.  Raises DataError."""
    try:
        with pa.ipc.open_stream(pa.memory_map(str(path))) as reader:
            batches = [batch for batch in reader if batch.num_rows]
        for batch in batches:
            batch.select(COLUMNS)
    except (OSError, pa.ArrowInvalid, KeyError) as error:
        raise DataError(f"{path} cannot be read as packed blocks ({error}); run tokenize again.") from None
    return batches
