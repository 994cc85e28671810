from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pesc.train.order import BlockOrder, RankBatches, count_steps, derive_seed

SHAPES = st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(1, 5))  # micro, ranks, accumulation, steps


def positions_by_step(micro: int, world: int, global_batch: int, steps: int) -> list[list[int]]:
    """What all ranks together read in each step."""
    read: list[list[int]] = [[] for _ in range(steps)]
    for rank in range(world):
        batches = RankBatches(steps, global_batch, micro, rank, world)
        for turn, batch in enumerate(batches):
            read[turn // batches.accumulation] += batch
        assert len(list(batches)) == len(batches)
    return [sorted(step) for step in read]


@given(SHAPES)
def test_every_step_reads_its_own_positions_whatever_the_world_size(shape):
    micro, world, accumulation, steps = shape
    global_batch = micro * world * accumulation
    expected = [list(range(step * global_batch, (step + 1) * global_batch)) for step in range(steps)]
    assert positions_by_step(micro, world, global_batch, steps) == expected
    assert positions_by_step(micro, 1, global_batch, steps) == expected


@given(SHAPES)
def test_micro_batches_are_the_same_sets_whatever_the_world_size(shape):
    micro, world, accumulation, steps = shape
    global_batch = micro * world * accumulation
    alone = {tuple(batch) for batch in RankBatches(steps, global_batch, micro, 0, 1)}
    together = {tuple(batch) for rank in range(world) for batch in RankBatches(steps, global_batch, micro, rank, world)}
    assert together == alone


@given(st.integers(1, 60), st.integers(0, 5), st.integers(1, 3))
def test_each_epoch_reads_every_block_once(num_blocks, seed, epochs):
    order = BlockOrder(num_blocks, seed)
    for epoch in range(epochs):
        read = [order.block_at(epoch * num_blocks + index) for index in range(num_blocks)]
        assert sorted(read) == list(range(num_blocks))


def test_epochs_and_seeds_differ_and_repeat():
    def first(seed, epoch):
        return [BlockOrder(50, seed).block_at(epoch * 50 + index) for index in range(50)]

    assert first(1, 0) == first(1, 0)
    assert first(1, 0) != first(1, 1)
    assert first(1, 0) != first(2, 0)


def test_the_order_is_pinned():
    """A change of the order changes every trained model: raise train's code_version with this list."""
    assert [BlockOrder(10, 42).block_at(position) for position in range(10)] == PINNED


PINNED = [1, 8, 6, 5, 2, 7, 9, 3, 0, 4]


@pytest.mark.parametrize(
    ("blocks", "batch", "epochs", "limit", "steps"),
    [
        (100, 10, 1.0, None, 10),
        (101, 10, 1.0, None, 11),
        (100, 10, 0.5, None, 5),
        (100, 10, 3.0, 7, 7),
        (3, 128, 1.0, None, 1),
        (100, 10, 1.0, 50, 10),
    ],
)
def test_steps_cover_the_epochs(blocks, batch, epochs, limit, steps):
    assert count_steps(blocks, batch, epochs, limit) == steps


def test_a_batch_that_cannot_be_dealt_is_refused():
    with pytest.raises(ValueError, match="cannot be dealt"):
        RankBatches(1, 6, 2, 0, 2)


def test_seeds_depend_on_every_part():
    seeds = {derive_seed(*parts) for parts in [("dropout", 1, 2), ("dropout", 1, 3), ("dropout", 2, 2), ("order", 1, 2), ("dropout", 12)]}
    assert len(seeds) == 5
    assert all(0 <= seed < 2**63 for seed in seeds)
