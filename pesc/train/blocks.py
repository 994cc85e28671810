"""Packed blocks on disk: a memory-mapped Arrow stream, read one block at a time.

Columns: input_ids, labels (-100: no loss), position_ids (start again at 0 with each packed row).  No torch here, so that the stage
can look at the data before it starts any rank.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path

import numpy as np
import pyarrow as pa

from pesc.errors import DataError

FILE_NAME = "blocks.arrow"
COLUMNS = ("input_ids", "labels", "position_ids")


class PackedBlocks:
    """Random access to the blocks of a file; nothing is copied before a block is asked for.

    Raises DataError for a file that cannot be read, lacks a column, or holds no block.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._map = pa.memory_map(str(path))
            with pa.ipc.open_stream(self._map) as reader:
                self._batches = [batch.select(COLUMNS) for batch in reader if batch.num_rows]
        except (OSError, pa.ArrowInvalid, KeyError) as error:
            raise DataError(f"{path} cannot be read as packed blocks ({error}); run tokenize again.") from None
        self._ends = list(accumulate(batch.num_rows for batch in self._batches))
        if not self._ends:
            raise DataError(
                f"{path} holds no block: the mixture is empty, or every row is longer than the context; see tokenize's stats.json."
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
            raise DataError(
                f"{self._path}, block {index}: the columns {', '.join(COLUMNS)} must have one length, above 0; run tokenize again."
            )
        return block
