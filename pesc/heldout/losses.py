"""One pass of a model over rows: the cross-entropy of each row's supervised tokens.

S tokens of a row, N of them supervised, V vocabulary.
"""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from pesc.errors import DataError, ModelError
from pesc.heldout.results import HeldOutResult, RowLoss
from pesc.routing.rows import Row


def measure(model: Any, rows: Sequence[Row], name: str, progress: Callable[..., None]) -> HeldOutResult:
    """The losses of rows whose `counts_S` are the supervised tokens; rows without one are left out.  Nothing is drawn at random.

    Rows run one by one, as they were before packing.  Raises DataError when no row is left, ModelError for a loss that is not finite.
    """
    kept = [row for row in rows if row.counts_S[1:].any()]
    if not kept:
        raise DataError(f"{name}: no held-out row has a supervised token. Raise mix.held_out or mix.held_out_share.")
    losses = []
    for done, row in enumerate(kept, start=1):
        losses.append(RowLoss(domain=row.domain, tokens=int(row.counts_S[1:].sum()), loss=_row_loss(model, row, name)))
        progress(done, len(kept), unit="rows")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return HeldOutResult(
        rows_sha256=digest_rows(kept), parameters=parameters, layers=int(model.config.num_hidden_layers), rows=tuple(losses)
    )


def _row_loss(model: Any, row: Row, name: str) -> float:
    ids_S = torch.from_numpy(np.ascontiguousarray(row.ids_S)).to(model.device)
    places_N = torch.from_numpy(np.flatnonzero(row.counts_S[1:])).to(model.device)
    with torch.inference_mode():
        if "logits_to_keep" in inspect.signature(model.forward).parameters:  # the head is most of a small model's work
            logits_NV = model(input_ids=ids_S[None], use_cache=False, logits_to_keep=places_N).logits[0]
        else:
            logits_NV = model(input_ids=ids_S[None], use_cache=False).logits[0, places_N]
        loss = torch.nn.functional.cross_entropy(logits_NV.float(), ids_S[places_N + 1], reduction="sum").item()
    if not math.isfinite(loss):
        raise ModelError(f"{name}: the loss of a held-out row is not finite: the training diverged. Lower train.learning_rate of this arm.")
    return loss


def digest_rows(rows: Sequence[Row]) -> str:
    """SHA-256 of the rows: domain, token ids, which of them are supervised."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(f"{row.domain}\0{len(row.ids_S)}\0".encode())
        digest.update(row.ids_S.astype("<i8").tobytes())
        digest.update(row.counts_S.astype(np.uint8).tobytes())
    return digest.hexdigest()
