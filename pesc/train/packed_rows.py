"""Where the rows of a micro-batch begin: told to the attention by the host, which made the micro-batch, so that nobody asks the device.

B blocks, S positions, R rows.

    batch |= describe_rows(positions_BS, flatten)
    with rows_told(batch["packed"]):
        model(**model_inputs(batch))

transformers finds out from the positions' values whether rows are packed, once a forward pass, and with flash attention again in every layer,
with the rows' bounds: each time the host waits until the device has done all that it was given.  With the answers from here it computes
the same masks and calls the same kernels.

Pitfall: the answer for the mask has no argument to be passed by; `rows_told` puts it in the place of the function that looks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from transformers import masking_utils

MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
"""Of a batch's tensors and numbers, those that a model's forward takes by these names."""


def describe_rows(positions_BS: np.ndarray, flatten: bool) -> dict[str, Any]:
    """`packed`: whether any block holds more than one row (padding counts as rows).

    flatten (B = 1): also the bounds of the rows, int32 [R + 1], and the longest one's length, by the names of flash attention's arguments.
    """
    breaks = np.diff(positions_BS, axis=1) != 1
    described: dict[str, Any] = {"packed": bool(breaks.any())}
    if not flatten:
        return described
    bounds = np.concatenate([[0], np.flatnonzero(breaks[0]) + 1, [positions_BS.shape[1]]])
    longest = int(np.diff(bounds).max())
    bounds_R = torch.from_numpy(bounds.astype(np.int32))
    return described | {"cu_seq_lens_q": bounds_R, "cu_seq_lens_k": bounds_R, "max_length_q": longest, "max_length_k": longest}


def model_inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """What a model's forward reads of a batch."""
    return {name: batch[name] for name in MODEL_INPUTS if name in batch}


@contextmanager
def rows_told(packed: bool) -> Iterator[None]:
    """Forward passes inside make their masks without looking whether rows are packed."""
    looks = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = _number_rows if packed else _no_rows
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = looks


def _number_rows(position_ids: torch.Tensor) -> torch.Tensor:
    """Which row of its block each position belongs to, [B, S]; a row begins wherever the positions do not go on."""
    return F.pad((torch.diff(position_ids, dim=-1) != 1).cumsum(-1), (1, 0))


def _no_rows(position_ids: torch.Tensor) -> None:
    return None
