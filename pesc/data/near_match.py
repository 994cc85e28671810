"""Items that lie in a row almost word for word: what 8-grams cannot see after one edit of a short item.

A 4-gram in common, which a short item keeps whatever word of it is replaced, aligns an item with a place in a row.  Along that
alignment the words are compared one by one; words that were put in or left out shift it, so alignments up to SHIFT words apart count
together, with runs of two words or more; each of them needs a 4-gram of its own.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from pesc.data.benchmark_items import Entries
from pesc.data.ngram_table import ragged

SEED = 4
SHIFT = 3
LONGEST = 48  # words; longer items keep whole 8-grams under light rewording, and the masks below hold 64 bits


class Alignment(NamedTuple):
    """Entry `entry` laid on the row words from `place` on (may lie before the turn); bit k of `mask`: word k is equal."""

    turn: int
    entry: int
    place: int
    mask: int


def allowed_edits(length: int | np.ndarray) -> int | np.ndarray:
    """Words of an item of this length that may differ: 1 of 8, 2 of 12, then one in six, up to 4."""
    return np.minimum(np.maximum(length // 6, 1), 4) * (np.asarray(length) >= 8)


def align(
    entries: Entries, row_words: np.ndarray, turns: np.ndarray, seeds: tuple[np.ndarray, np.ndarray, np.ndarray]
) -> list[list[Alignment]]:
    """Groups of alignments of one entry in one turn that together may match: equal words reach `length - allowed_edits(length)`.

    row_words: word numbers of all turns (N,).  turns: where each begins, and N (T + 1,).  seeds: (place in row_words, entry, start).
    """
    places, entry, start = seeds
    if not len(places):
        return []
    turn = np.searchsorted(turns, places, side="right") - 1
    turn, entry, place = _distinct(turn, entry, places - start, len(entries.lengths), len(row_words))
    masks, equal = _masks(entries, row_words, turns, turn, entry, place)
    new = np.ones(len(turn), dtype=bool)
    new[1:] = (turn[1:] != turn[:-1]) | (entry[1:] != entry[:-1]) | (place[1:] - place[:-1] > SHIFT)
    first = np.flatnonzero(new)
    lengths = entries.lengths[entry[first]]
    promising = np.add.reduceat(equal, first) >= lengths - allowed_edits(lengths)
    ends = np.append(first[1:], len(turn))
    return [
        [Alignment(int(turn[i]), int(entry[i]), int(place[i]), int(masks[i])) for i in range(begin, end)]
        for begin, end in zip(first[promising].tolist(), ends[promising].tolist(), strict=True)
    ]


def _distinct(turn: np.ndarray, entry: np.ndarray, place: np.ndarray, num_entries: int, num_words: int) -> tuple[np.ndarray, ...]:
    """The distinct triples, sorted."""
    span = num_words + 2 * LONGEST
    key, shifted = np.divmod(np.unique((turn * num_entries + entry) * span + place + LONGEST), span)
    return *np.divmod(key, num_entries), shifted - LONGEST


def _masks(
    entries: Entries, row_words: np.ndarray, turns: np.ndarray, turn: np.ndarray, entry: np.ndarray, place: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """For each alignment: the bits of its equal words (uint64) and their number."""
    lengths = entries.lengths[entry]
    ends = np.cumsum(lengths)
    at_item = ragged(entries.offsets[entry], lengths)
    at_row = ragged(place, lengths)
    inside = (at_row >= np.repeat(turns[turn], lengths)) & (at_row < np.repeat(turns[turn + 1], lengths))
    equal = inside & (row_words[np.where(inside, at_row, 0)] == entries.words[at_item])
    bit = np.uint64(1) << ragged(np.zeros_like(lengths), lengths).astype(np.uint64)
    first = ends - lengths
    return np.bitwise_or.reduceat(np.where(equal, bit, np.uint64(0)), first), np.add.reduceat(equal.astype(np.int64), first)


def equal_words(group: list[Alignment]) -> tuple[Alignment, int]:
    """The alignment with the most equal words, and the mask of all words that the group matches."""
    best = max(group, key=lambda alignment: (alignment.mask.bit_count(), -alignment.place))
    mask = best.mask
    for other in group:
        if abs(other.place - best.place) <= SHIFT:
            mask |= other.mask & (other.mask << 1 | other.mask >> 1)
    return best, mask
