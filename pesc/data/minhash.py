"""Near-duplicates: MinHash LSH proposes pairs, the true Jaccard similarity of word n-grams decides.

Broder 1997 (resemblance of documents), Leskovec et al., Mining of Massive Datasets §3.4 (banding).  Rows are visited in survival
order and a row goes only if it is similar to a row that *stays* (star clusters): no chains through rows that are gone, exactly
one survivor a cluster, and the same result for any input order, batch size and thread count.

Pitfalls: shingles are words of the user's and the assistant's turns, not characters and not the system prompt, or templated sets
(MetaMathQA, tool calling) collapse.  Rows with fewer words than one shingle are left to exact removal; the index would put all of
them in one bucket.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

from pesc.data.text import words

RECALL = 0.99
"""Least probability that a pair exactly at the threshold shares a band."""
BATCH = 20_000
_REMEMBERED = 8192
"""Rows whose shingles are kept at hand; a set of them takes tens of kilobytes."""
_ESTIMATE_SLACK = 0.2
"""Proposals whose estimated similarity is this far below the threshold are not verified (about four standard errors)."""


class NearDuplicate(NamedTuple):
    """Row `removed` resembles row `kept` with this true Jaccard similarity."""

    removed: int
    kept: int
    score: float


def shingles(tokens: Sequence[str], size: int) -> frozenset[tuple[str, ...]]:
    """The set of word n-grams."""
    return frozenset(zip(*(tokens[start:] for start in range(size)), strict=False))


def jaccard(left: frozenset[tuple[str, ...]], right: frozenset[tuple[str, ...]]) -> float:
    """|A ∩ B| / |A ∪ B|; 0 when both are empty."""
    common = len(left & right)
    total = len(left) + len(right) - common
    return common / total if total else 0.0


def choose_bands(permutations: int, threshold: float) -> tuple[int, int]:
    """(bands, rows in a band): the longest bands that still propose a pair at the threshold with probability RECALL.

    P(proposed | similarity s) = 1 - (1 - s^rows)^bands.
    """
    for rows in range(min(permutations, 32), 0, -1):
        bands = permutations // rows
        if 1 - (1 - threshold**rows) ** bands >= RECALL:
            return bands, rows
    return permutations, 1


def find_near_duplicates(
    texts: Sequence[str],
    *,
    threshold: float,
    ngram: int,
    permutations: int,
    batch: int = BATCH,
    on_progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> list[NearDuplicate]:
    """Rows to remove, given texts in survival order (the first of a cluster stays)."""
    from gaoya.minhash import MinHashStringIndex

    bands, band_size = choose_bands(permutations, threshold)
    index = MinHashStringIndex(
        hash_size=32,
        jaccard_threshold=max(0.0, threshold - _ESTIMATE_SLACK),
        num_bands=bands,
        band_size=band_size,
        analyzer="word",
        ngram_range=(ngram, ngram),
    )

    @lru_cache(maxsize=_REMEMBERED)
    def shingles_of(row: int) -> frozenset[tuple[str, ...]]:
        return shingles(words(texts[row]), ngram)

    removed: list[NearDuplicate] = []
    gone: set[int] = set()
    for start in range(0, len(texts), batch):
        for found in _scan_batch(index, texts, range(start, min(start + batch, len(texts))), ngram, threshold, gone, shingles_of):
            removed.append(found)
        on_progress(min(start + batch, len(texts)), len(texts))
    return removed


def _scan_batch(
    index: object,
    texts: Sequence[str],
    rows: range,
    ngram: int,
    threshold: float,
    gone: set[int],
    shingles_of: Callable[[int], frozenset[tuple[str, ...]]],
) -> list[NearDuplicate]:
    """Add one batch to the index, then decide its rows in order; rows that go leave the index again."""
    tokenised = {row: words(texts[row]) for row in rows}
    usable = [row for row in rows if len(tokenised[row]) >= ngram]
    documents = [" ".join(tokenised[row]) for row in usable]
    del tokenised
    index.par_bulk_insert_docs(usable, documents)  # type: ignore[attr-defined]
    found = []
    for row, candidates in zip(usable, index.par_bulk_query(documents), strict=True):  # type: ignore[attr-defined]
        best: NearDuplicate | None = None
        for other in sorted(candidate for candidate in candidates if candidate < row and candidate not in gone):
            score = jaccard(shingles_of(row), shingles_of(other))
            if score >= threshold and (best is None or score > best.score):
                best = NearDuplicate(row, other, score)
        if best:
            found.append(best)
            gone.add(row)
            index.remove(row)  # type: ignore[attr-defined]
    return found
