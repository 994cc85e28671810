"""The loss on blocks that are never trained on, for each domain.

    domain's loss = Σ CE over its supervised tokens / their number          no dropout, no balance loss

Each domain's first `evaluate_blocks` held-out blocks are read in micro-batches, dealt to the ranks in turn.  Every rank runs the same
number of forward passes (ZeRO-3 gathers each weight from all of them); those that have none left repeat one that counts for nothing.
Nothing is drawn at random and no gradient is made: a run ends with the same weights whether it looks or not.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pesc.train.blocks import HELD_OUT, PackedBlocks
from pesc.train.collator import NO_LOSS
from pesc.train.config import TrainConfig

logger = logging.getLogger(__name__)
EVALUATIONS = 10
"""How often a run looks, besides its start, unless the settings say otherwise."""

Items = Sequence[Mapping[str, Any]]
SumOfLosses = Callable[[Items], torch.Tensor]
"""The sum of the cross-entropy over the supervised tokens of some blocks, a scalar on the device, without a graph."""


class HeldOut:
    """The held-out blocks of one run, as one rank sees them."""

    def __init__(self, blocks: PackedBlocks, config: TrainConfig, steps: int, rank: int, world_size: int) -> None:
        self._blocks, self._rank, self._world = blocks, rank, world_size
        self._steps = steps
        self._every = config.evaluate_every_steps or math.ceil(steps / EVALUATIONS)
        self.domains = {name: numbers[: config.evaluate_blocks] for name, numbers in sorted(blocks.domains.items())}
        size = config.micro_batch_size
        self._batches = [
            (index, numbers[start : start + size])
            for index, numbers in enumerate(self.domains.values())
            for start in range(0, len(numbers), size)
        ]
        self._tokens = [sum(count_supervised(blocks[number]) for number in numbers) for numbers in self.domains.values()]

    def is_due(self, step: int) -> bool:
        """Whether to look after `step` optimizer steps: at the start, every so often, and at the end."""
        return step % self._every == 0 or step == self._steps

    def measure(self, sum_of_losses: SumOfLosses, reduce_sum: Callable[[torch.Tensor], None], device: torch.device) -> dict[str, Any]:
        """{"loss": over all domains, "domains": {name: {"loss", "tokens"}}}; a loss that is not finite, or of no token, is None.

        All ranks call it together.  reduce_sum: in-place sum over the ranks.
        """
        sums = torch.zeros(len(self.domains), dtype=torch.float64, device=device)
        for turn in range(math.ceil(len(self._batches) / self._world)):
            mine = turn * self._world + self._rank
            domain, numbers = self._batches[min(mine, len(self._batches) - 1)]
            loss = sum_of_losses([{**self._blocks[number], "position": 0} for number in numbers])
            if mine < len(self._batches):
                sums[domain] += loss.double()
        reduce_sum(sums)
        totals = sums.tolist()
        domains = {
            name: {"loss": _mean(total, tokens), "tokens": tokens}
            for name, total, tokens in zip(self.domains, totals, self._tokens, strict=True)
        }
        return {"loss": _mean(sum(totals), sum(self._tokens)), "domains": domains}


def open_held_out(folder: Path, config: TrainConfig, steps: int, rank: int, world_size: int) -> HeldOut | None:
    """The held-out blocks of a tokenize object; None when it has none (earlier ones do not), or the settings want none."""
    if not config.evaluate_blocks:
        return None
    if not any(folder.glob(f"{HELD_OUT}-[0-9]*.arrow")):
        logger.info("no held-out blocks in %s: no held-out loss", folder)
        return None
    blocks = PackedBlocks(folder, HELD_OUT)
    return HeldOut(blocks, config, steps, rank, world_size) if blocks.domains else None


def count_supervised(block: Mapping[str, np.ndarray]) -> int:
    """Tokens of a block that the loss is over: labelled, and not the first of a packed row (nothing comes before it)."""
    return int(((block["labels"] != NO_LOSS) & (block["position_ids"] != 0))[1:].sum())


def _mean(total: float, tokens: int) -> float | None:
    return total / tokens if tokens and math.isfinite(total) else None
