"""Blocks -> one micro-batch of tensors.

B blocks, S longest block of the micro-batch, K kept positions, N supervised tokens.

Rows packed into a block are told apart by `position_ids_BS` alone, which start again at 0 with each row.  Every attention
implementation of transformers (eager, sdpa, flex, flash) isolates them when no attention mask is given; so none is made.  Padding
follows the block with position 0 at every place: a row of its own each, that sees nothing and that nothing sees.

All that depends on the batch's values (which positions need logits, how many tokens there are) is found out here, on the host, so that
the training step never waits for the device to learn it.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pesc.launch.guard import die_with_parent
from pesc.train.blocks import PackedBlocks
from pesc.train.order import BlockOrder
from pesc.train.packed_rows import describe_rows

NO_LOSS = -100


class OrderedBlocks(torch.utils.data.Dataset):
    """Blocks in reading order; an item knows its position."""

    def __init__(self, blocks: PackedBlocks, order: BlockOrder, positions: int) -> None:
        self._blocks = blocks
        self._order = order
        self._positions = positions

    def __len__(self) -> int:
        return self._positions

    def __getitem__(self, position: int) -> dict[str, Any]:
        """The block that is read at `position`."""
        return {**self._blocks[self._order.block_at(position)], "position": position}


@dataclass(frozen=True)
class Collator:
    """Makes {input_ids, targets, position_ids, valid} [B, S], {kept_K, rows_N, targets_N} and the numbers `position`, `tokens`, `supervised`;
    and what `pesc.train.packed_rows` says of the rows.

    kept_K: the positions with a target in any block (choose_logits False: all S); rows_N: the supervised tokens among those [B·K];
    targets_N: what they are to predict.  position: of the first block; tokens: not padding.

    flatten: put the blocks behind one another instead (B = 1, no padding), as flash attention's variable-length kernels want it.
    targets_BS: the token to be known after each position, -100 for none; the first token of a packed row is nobody's successor.
    """

    flatten: bool = False
    pad_id: int = 0
    choose_logits: bool = True

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Collate; `valid_BS` is False on padding."""
        blocks = [_concatenate(items)] if self.flatten else items
        longest = max(len(block["input_ids"]) for block in blocks)
        batch = {
            "input_ids": _stack(blocks, "input_ids", longest, self.pad_id),
            "targets": _stack([{"targets": _shift(block)} for block in blocks], "targets", longest, NO_LOSS),
            "position_ids": _stack(blocks, "position_ids", longest, 0),
        }
        lengths = torch.tensor([len(block["input_ids"]) for block in blocks])
        batch["valid"] = torch.arange(longest)[None, :] < lengths[:, None]
        batch |= self._supervision(batch["targets"]) | describe_rows(batch["position_ids"].numpy(), self.flatten)
        return batch | {"position": int(items[0]["position"]), "tokens": int(lengths.sum())}

    def _supervision(self, targets_BS: torch.Tensor) -> dict[str, Any]:
        is_target_BS = targets_BS != NO_LOSS
        kept_K = is_target_BS.any(dim=0).nonzero().flatten() if self.choose_logits else torch.arange(targets_BS.shape[1])
        rows_N = is_target_BS[:, kept_K].flatten().nonzero().flatten()
        return {"kept_K": kept_K, "rows_N": rows_N, "targets_N": targets_BS[is_target_BS], "supervised": rows_N.numel()}


def _shift(block: Mapping[str, np.ndarray]) -> np.ndarray:
    """Labels moved one to the left, without the step over the edge of a packed row."""
    following = np.where(block["position_ids"] == 0, NO_LOSS, block["labels"])[1:]
    return np.append(following, NO_LOSS)


def _concatenate(items: Sequence[Mapping]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([item[name] for item in items]) for name in ("input_ids", "labels", "position_ids")}


def _stack(blocks: Sequence[Mapping], name: str, longest: int, fill: int) -> torch.Tensor:
    rows = np.full((len(blocks), longest), fill, dtype=np.int64)
    for row, block in zip(rows, blocks, strict=True):
        row[: len(block[name])] = block[name]
    return torch.from_numpy(rows)


def loading(device: str, micro_batches: int) -> dict[str, Any]:
    """Settings of the DataLoader: beside a GPU, a process of its own prepares the next optimizer step's micro-batches in pinned memory.

    On the CPU it would only take a core from the training.  The order of the batches is the sampler's either way.
    """
    if device != "cuda":
        return {}
    return {
        "num_workers": 1, "prefetch_factor": max(2, micro_batches), "pin_memory": True, "multiprocessing_context": "fork",
        "worker_init_fn": begin_worker,
    }  # fmt: skip


def begin_worker(_number: int) -> None:
    """In the loading process: signals to the group are for the rank, which still has a step to end; when the rank dies, this one does."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    die_with_parent(os.getppid(), signal.SIGKILL)
