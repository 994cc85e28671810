"""Which block is read when: one fixed sequence of positions, dealt to the ranks.

    position  = step · G + index in the step          G blocks an optimizer step, over all ranks
    block     = permutation of epoch (position // N)  N blocks in all
    rank      of micro-batch m = m mod W              W ranks, B blocks a micro-batch

World size decides who computes a micro-batch, never which blocks a step has.  The last step is filled from the next epoch.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from functools import lru_cache

import numpy as np

from pesc.errors import RecipeError
from pesc.train.config import TrainConfig


def check_batch(config: TrainConfig, world_size: int) -> None:
    """Raises RecipeError when the global batch cannot be dealt evenly, with the sizes that can."""
    unit = config.micro_batch_size * world_size
    if config.global_batch_size % unit:
        below, above = config.global_batch_size // unit * unit, -(-config.global_batch_size // unit) * unit
        near = f"{below} or {above}" if below else str(above)
        raise RecipeError(
            f"train.global_batch_size is {config.global_batch_size}, which {world_size} ranks with micro-batches of {config.micro_batch_size} cannot "
            f"share evenly: make it {near}, or change execution.num_processes or train.micro_batch_size."
        )


def count_steps(num_blocks: int, global_batch_size: int, epochs: float, max_steps: int | None) -> int:
    """Optimizer steps of a run: enough to read `epochs` times everything, at most `max_steps`, at least one."""
    steps = max(1, math.ceil(round(epochs * num_blocks) / global_batch_size))
    return steps if max_steps is None else min(steps, max_steps)


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from names and numbers; equal parts give equal seeds on every machine."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class BlockOrder:
    """Position -> block, for a run of any length."""

    def __init__(self, num_blocks: int, seed: int) -> None:
        self._num_blocks = num_blocks
        self._seed = seed
        self._permutation = lru_cache(maxsize=2)(self._shuffle)

    def block_at(self, position: int) -> int:
        """The block that is read at a position."""
        epoch, index = divmod(position, self._num_blocks)
        return int(self._permutation(epoch)[index])

    def _shuffle(self, epoch: int) -> np.ndarray:
        return np.random.default_rng(derive_seed("order", self._seed, epoch)).permutation(self._num_blocks)


class RankBatches:
    """The micro-batches of one rank, as lists of positions: a batch sampler for a DataLoader."""

    def __init__(self, steps: int, global_batch_size: int, micro_batch_size: int, rank: int, world_size: int) -> None:
        if global_batch_size % (micro_batch_size * world_size):
            raise ValueError(f"{global_batch_size} blocks a step cannot be dealt in {micro_batch_size}s to {world_size} ranks")
        self._steps = steps
        self._global = global_batch_size
        self._micro = micro_batch_size
        self._rank = rank
        self._world = world_size

    @property
    def accumulation(self) -> int:
        """Micro-batches of this rank in one optimizer step."""
        return self._global // (self._micro * self._world)

    def __len__(self) -> int:
        return self._steps * self.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self._steps):
            for turn in range(self.accumulation):
                first = step * self._global + (turn * self._world + self._rank) * self._micro
                yield list(range(first, first + self._micro))
