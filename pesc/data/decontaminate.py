"""Benchmark questions inside training rows.  Both sides are bare questions: user turns against the question field.

An item is in a row when one of these holds, tried in this order; the first names the kind of the hit.
- short: an item under one n-gram (8 words) is a whole user turn, or, from 4 words on, a sentence or a line of one.
- verbatim, reworded: n-grams shared with ONE row's user turns cover more than half of the item's words (Tülu 3, Lambert et al. 2024,
  §3.2), all of them or not.  n-grams of several items weigh less, those of many (templates) nothing: see `benchmark_items`.
- reworded: an item of 8 to 48 words lies in a turn with at most one word in six different (`near_match`), and most of what
  distinguishes it from other items is equal.
- number_twin: with numbers masked, n-grams cover at least 80 % of it, or it lies in a turn with only numbers different.  Another
  question of the same form, so it is reported, and removed only if the recipe says so.

Measured over 34,379 items of 17 benchmark files: verbatim 100 %, also inside an instruction (items of 4 words or more);
one word in 20 replaced, case, punctuation and spacing changed: 99.3 % of items from 8 words on.
GSM8K train against GSM8K test: 3 of 7,473 rows.
"""

from __future__ import annotations

from typing import Literal

from pesc.data.benchmark_index import BenchmarkIndex, Hit, Kind
from pesc.data.benchmark_items import Item
from pesc.data.contamination_table import ContaminatedRow, ContaminationTable

__all__ = ["BenchmarkIndex", "ContaminatedRow", "ContaminationTable", "Hit", "Item", "Kind", "removing_hit"]


def removing_hit(hits: list[Hit], number_twins: Literal["report", "drop"] = "report") -> Hit | None:
    """The hit for which a row goes, None when it stays.  `hits` as `BenchmarkIndex.find` gives them: what removes comes first."""
    if hits and (hits[0].kind != "number_twin" or number_twins == "drop"):
        return hits[0]
    return None
