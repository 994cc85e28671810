"""One tensor of the merged model, made in pieces, and its line in the ledger.

O output features, I input features.

Pitfall: with `base: dequantized` a projection passes through NF4 as a whole, as the second quantisation looks at all of its blocks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pesc.errors import ModelError
from pesc.models.tensor_files import PIECE_ELEMENTS, read_pieces

if TYPE_CHECKING:
    import torch

    from pesc.models.merge import MergeParts

FLOATING = ("F64", "F32", "F16", "BF16")
_DIGITS = 4
"""Significant digits of the norms in the ledger: enough to see a change, few enough not to see the machine."""


@dataclass
class MergedTensor:
    """One tensor of the merged model, made in pieces; its line in the ledger is complete after the last."""

    parts: MergeParts
    name: str
    dtype: str
    entry: dict[str, Any]
    squares: dict[str, float] = field(default_factory=lambda: {"norm": 0.0, "change": 0.0})

    def pieces(self) -> Iterator[torch.Tensor]:
        """Flat pieces in the dtype on disk.  Raises ModelError for what is not a number, or trained and not moved."""
        import torch

        if self.entry["dtype"] not in FLOATING:
            yield from self._whole_numbers()
            return
        target, moved = getattr(torch, self.dtype), False
        for start, result in self.results():
            merged = result.to(target)
            moved = self.measure(start, merged, result) or moved
            yield merged
        self.entry |= {name: rounded(math.sqrt(value)) for name, value in self.squares.items()}
        if not moved and self.entry["action"] in ("merged", "trained"):
            raise ModelError(self.not_moved())
        if self.name.endswith("adapters.up"):
            self.entry["idle_experts"] = self._idle_experts()

    def measure(self, start: torch.Tensor, merged: torch.Tensor, result: torch.Tensor) -> bool:
        """Add a piece to the norms; whether it moved."""
        before = start.float()
        norm, change, moved = _sum_of_squares(before), 0.0, False
        if merged is not start:
            difference = merged - before  # in fp32
            change = _sum_of_squares(difference)
            moved = change > 0 or bool(difference.any())  # the square of a small change may be zero
        if not math.isfinite(norm + change) and not merged.isfinite().all():
            raise ModelError(self.not_finite(result))
        self.squares["norm"] += norm
        self.squares["change"] += change
        return moved

    def results(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Piece by piece: the values of the start, and the merged ones before rounding."""
        start = self.parts.model.pieces(self.name)
        if self.name in self.parts.bank:
            self._check_trained()
            yield from zip(start, read_pieces(self.parts.bank_path, self.name), strict=True)
        elif self.name in self.parts.lora.pairs:
            yield from self._folded()
        elif self.name in self.parts.quantized:
            yield from zip(start, self.parts.base_weight(self.name).flatten().split(PIECE_ELEMENTS), strict=True)
        else:
            yield from ((piece, piece) for piece in start)

    def _folded(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Rows of W and of W + scaling · B · A."""
        import torch

        a_RI, b_OR = self.parts.lora.matrices(self.name)
        width, rows = a_RI.shape[1], max(1, PIECE_ELEMENTS // a_RI.shape[1])
        whole = self.parts.base_weight(self.name) if self.name in self.parts.quantized else None
        source = self.parts.model.directory / self.parts.model.files[self.name]
        starts = read_pieces(source, self.name, size=rows * width)
        for number, (b_PR, start) in enumerate(zip(b_OR.split(rows), starts, strict=True)):
            base = start if whole is None else whole[number * rows : (number + 1) * rows].flatten()
            yield start, torch.add(base.float(), (b_PR @ a_RI).flatten(), alpha=self.parts.lora.scaling)

    def _whole_numbers(self) -> Iterator[torch.Tensor]:
        """A tensor that no fold or cast may touch: a trained bias, or a buffer of the model."""
        if self.name in self.parts.bank:
            yield from read_pieces(self.parts.bank_path, self.name)
        else:
            yield from self.parts.model.pieces(self.name)

    def _check_trained(self) -> None:
        if not self.name.endswith(("adapters.up", "adapters.shared_up")):
            return
        if not any(piece.any() for piece in read_pieces(self.parts.bank_path, self.name)):
            raise ModelError(
                f"{self.parts.bank_path} has {self.name} all zero: no adapter of this layer was trained; look for a frozen part in the training log."
            )

    def _idle_experts(self) -> list[int]:
        """Experts whose `up` is still zero: no token ever chose them while training."""
        experts, *sizes = self.entry["shape"]
        path, size = self.parts.bank_path, math.prod(sizes)
        return [e for e in range(experts) if not any(p.any() for p in read_pieces(path, self.name, e * size, (e + 1) * size))]

    def not_finite(self, result: torch.Tensor) -> str:
        """The sentence for a value that is none."""
        if self.entry["action"] == "trained" and not result.isfinite().all():
            return f"{self.parts.bank_path} has a value that is not a number in {self.name}: the training diverged; train again."
        return f"{self.name} is not a number after the merge: the training diverged, or {self.dtype} cannot hold it; set merge.dtype to float32."

    def not_moved(self) -> str:
        """The sentence for what was trained and is what it was."""
        if self.entry["action"] == "merged" and self.dtype != "float32":
            return f"{self.name} does not change by its LoRA: rounding to {self.dtype} swallows all of it; set merge.dtype to float32."
        return (
            f"{self.name} was declared as trained, but it is what it was before the training: look for a frozen part in the training log."
        )


def _sum_of_squares(values: torch.Tensor) -> float:
    return values.dot(values).item()


def rounded(value: float) -> float:
    """A number as the ledger has it."""
    return float(f"{value:.{_DIGITS}g}")
