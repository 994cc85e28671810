"""Projections of a merged model that are stored in 4 bit (`dtype: nf4`): LoRA is folded in fp32, and the sum is quantised once, from fp32.

Stored in NF4 is what loading the model in 4 bit would quantise, with the settings of the training; everything else is in bfloat16.

This rounding is some fifty times coarser than one to bfloat16, and it is measured, for each projection and over all.  With E = stored - sum:

    rounding    the norm of E
    lora        the norm of what LoRA adds
    kept        1 + <E, LoRA> / <LoRA, LoRA>: the share of LoRA's change that is left, in its own direction

Pitfall: LoRA is small beside a step between two of the 16 values.  Added to weights that lie between them (`base: original`), it moves as
many over the next threshold as it should, so that its change is kept, beside the noise of every 4-bit model.  Added to weights that lie on
them (`base: dequantized`) it is rounded away: the result is the model of the start.  `check_kept` refuses that.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pesc.errors import ModelError
from pesc.models.merge_tensor import MergedTensor, rounded
from pesc.models.nf4 import quantize, restore
from pesc.models.nf4_files import stored_tensors

if TYPE_CHECKING:
    import torch

    from pesc.models.config import MergeConfig

logger = logging.getLogger(__name__)

MIN_KEPT = 0.5
"""Least share of LoRA's change that a merge may leave."""
_CHANCE = 3.0
"""Standard deviations by which the noise of the quantisation may make that share look smaller: it matters in small models alone."""
_one_at_a_time = threading.Lock()
"""A projection is in memory as a whole while it is quantised: one of them, whatever the number of writing threads."""


def plain_dtype(dtype: str) -> str:
    """The dtype of what is not stored in NF4."""
    return "bfloat16" if dtype == "nf4" else dtype


class QuantizedTensor(MergedTensor):
    """One projection that is stored in NF4."""

    def pieces(self) -> Iterator[torch.Tensor]:
        """The tensors of `pesc.models.nf4_files.stored_specs`, in that order.  Raises ModelError for what is not a number."""
        with _one_at_a_time:
            tensors = self._make()
        yield from tensors

    def _make(self) -> list[torch.Tensor]:
        start, merged = self._whole()
        if not merged.isfinite().all():
            raise ModelError(self.not_finite(merged))
        packed, state = quantize(merged.view(self.entry["shape"]), self.parts.compute_dtype)
        stored = restore(packed, state).float().flatten()
        self.measure(start, stored, merged)
        self.entry |= {name: rounded(math.sqrt(value)) for name, value in self.squares.items()}
        error = stored.sub_(merged)
        self.entry["rounding"] = rounded(error.norm().item())
        if self.name in self.parts.lora.pairs:
            delta = self.parts.lora.delta(self.name).flatten()
            self.entry |= {
                "lora": rounded(delta.norm().item()),
                "kept": rounded(1 + (error.dot(delta) / delta.dot(delta).clamp(min=1e-38)).item()),
            }
        return stored_tensors(packed, state)

    def _whole(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The values of the start and of the merged weight in fp32, flat; one without LoRA is what training quantised it from."""
        import torch

        if self.name not in self.parts.lora.pairs:
            start = self.parts.model.read(self.name).flatten()
            return start, start.to(getattr(torch, self.parts.compute_dtype)).float()
        size = math.prod(self.entry["shape"])
        start = merged = torch.empty(0)
        done = 0
        for before, result in self.results():
            if not done:
                start, merged = torch.empty(size, dtype=before.dtype), torch.empty(size)
            start[done : done + before.numel()], merged[done : done + result.numel()] = before, result
            done += result.numel()
        return start, merged


def check_kept(ledger: Sequence[Mapping[str, Any]], config: MergeConfig) -> None:
    """Raises ModelError when NF4 has rounded away most of what LoRA changed."""
    if config.dtype != "nf4":
        return
    kept, chance = share_kept(ledger)
    if kept + _CHANCE * chance < MIN_KEPT:
        advice = "set merge.base to original, or merge.dtype to bfloat16" if config.base == "dequantized" else "set merge.dtype to bfloat16"
        raise ModelError(
            f"Rounding to NF4 leaves {max(kept, 0):.1%} of what LoRA changed in the projections, because most of its changes are smaller than half a "
            f"step of the 4-bit weights that they are added to: the merged model would be the one of before the training; {advice}."
        )


def share_kept(ledger: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """The share of LoRA's change that all projections together have kept, and the standard deviation that quantisation noise gives it."""
    entries = [entry for entry in ledger if entry.get("lora")]
    whole = sum(entry["lora"] ** 2 for entry in entries)
    if not whole:
        return 1.0, 0.0
    noise = sum((entry["rounding"] * entry["lora"]) ** 2 / math.prod(entry["shape"]) for entry in entries)
    return sum(entry["kept"] * entry["lora"] ** 2 for entry in entries) / whole, math.sqrt(noise) / whole


def tell_rounding(ledger: Sequence[Mapping[str, Any]], logits: Mapping[str, float]) -> dict[str, float]:
    """What the quantisation did, logged and returned as metrics of the stage."""
    kept, _ = share_kept(ledger)
    moved, trained = logits["relative_rms_of_rounding"], logits["relative_rms_effect_of_training"]
    logger.log(
        logging.WARNING if moved > trained else logging.INFO,
        "NF4 changes the logits by %.2g of their size, training changed them by %.2g; the projections keep %.1f %% of what LoRA changed%s",
        moved,
        trained,
        100 * kept,
        "; merge.dtype bfloat16 has no such noise" if moved > trained else "",
    )
    return {"lora_kept": rounded(kept), "relative_rms_of_nf4": moved, "relative_rms_effect_of_training": trained}
