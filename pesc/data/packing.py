"""Best-fit-decreasing bin packing over all rows at once.

Johnson 1973: rows by falling length, each into the open bin with the least space that still holds it.  The bins are kept by their
free space, and one Python integer is the bitmask of the spaces that have a bin; the best fit for length l is the lowest set bit of
`mask >> l`, so a row costs a handful of integer operations and 520,000 rows take well under a second.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def pack_rows(lengths: Sequence[int] | np.ndarray, capacity: int) -> list[list[int]]:
    """Bins of row numbers, each bin's lengths summing to at most `capacity`; every row is in exactly one bin.

    Rows within a bin, and bins by their first row, keep the order of the input, so a shuffled input gives shuffled blocks.
    Raises ValueError for a length outside 1 … capacity.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    wrong = np.flatnonzero((sizes < 1) | (sizes > capacity))
    if len(wrong):
        raise ValueError(f"row {wrong[0]} has {sizes[wrong[0]]} tokens; lengths must be 1 to {capacity}")
    bins: list[list[int]] = []
    by_space: list[list[int]] = [[] for _ in range(capacity + 1)]
    mask = 0
    falling = np.argsort(-sizes, kind="stable")
    for row, length in zip(falling.tolist(), sizes[falling].tolist(), strict=True):
        fitting = mask >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            number = by_space[space].pop()
            if not by_space[space]:
                mask ^= 1 << space
        else:
            space, number = capacity, len(bins)
            bins.append([])
        bins[number].append(row)
        by_space[space - length].append(number)
        mask |= 1 << (space - length)
    for members in bins:
        members.sort()
    return sorted(bins, key=lambda members: members[0])
