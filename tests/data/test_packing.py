"""Packing against the textbook algorithm."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pesc.data.packing import pack_rows


def textbook(lengths: list[int], capacity: int) -> list[list[int]]:
    """Best-fit-decreasing by search over all bins; ties go to the bin that reached its space last."""
    bins: list[tuple[int, int, list[int]]] = []
    for clock, row in enumerate(sorted(range(len(lengths)), key=lambda row: -lengths[row])):
        fitting = [place for place, (space, _, _) in enumerate(bins) if space >= lengths[row]]
        if fitting:
            best = min(fitting, key=lambda place: (bins[place][0], -bins[place][1]))
            space, _, members = bins[best]
            bins[best] = (space - lengths[row], clock, [*members, row])
        else:
            bins.append((capacity - lengths[row], clock, [row]))
    return sorted((sorted(members) for _, _, members in bins), key=lambda members: members[0])


@given(st.lists(st.integers(1, 30), max_size=60))
def test_it_is_best_fit_decreasing(lengths):
    assert pack_rows(lengths, 30) == textbook(lengths, 30)


@given(st.lists(st.integers(1, 64), max_size=200))
def test_every_row_is_packed_once_and_no_bin_overflows(lengths):
    bins = pack_rows(lengths, 64)
    assert sorted(row for members in bins for row in members) == list(range(len(lengths)))
    assert all(sum(lengths[row] for row in members) <= 64 for members in bins)
    assert len(bins) <= max(1, 2 * sum(lengths) // 64 + 1)


def test_real_like_lengths_fill_more_than_99_percent():
    draw = random.Random(0)
    lengths = [min(2048, max(20, int(draw.lognormvariate(5.9, 0.6)))) for _ in range(20_000)]
    bins = pack_rows(lengths, 2048)
    assert sum(lengths) / (2048 * len(bins)) > 0.99


@pytest.mark.slow
def test_real_lengths_fill_995_of_1000(smollm2, real_conversations):
    """20,000 lengths of real rows at 2048: as full as TRL's packer in one batch (99.57 %); the floor is a block more than the tokens need."""
    from pesc.data.config import TokenizeConfig
    from pesc.data.encoding import RowEncoder, load_tokenizer

    rows = RowEncoder(load_tokenizer(smollm2), TokenizeConfig()).encode(real_conversations()).rows
    assert len(rows) > 495
    lengths = random.Random(0).choices([len(row.ids) for row in rows], k=20_000)
    assert 400 < sum(lengths) / len(lengths) < 480
    bins = pack_rows(lengths, 2048)
    assert sorted(row for members in bins for row in members) == list(range(20_000))
    assert sum(lengths) / (2048 * len(bins)) >= 0.995


def test_rows_keep_their_order_and_blocks_come_by_their_first_row():
    bins = pack_rows([5, 3, 5, 5, 2], 10)
    assert bins == [[0, 2], [1, 3, 4]]


@pytest.mark.parametrize("length", [0, 11, -1])
def test_a_length_that_does_not_fit_is_refused(length):
    with pytest.raises(ValueError, match="row 1 has"):
        pack_rows([10, length], 10)
