"""The files of a merged model and its ledger, written in pieces of tensors: memory depends neither on the model nor on its largest tensor.

O output features, I input features.

Key contracts
- A shard in which nothing changes is linked, not written; `ledger.json` calls its tensors "linked".
- Every tensor is in the ledger once: what was done with it, shape, dtype, norm of its change.
- What was declared as trained and is what it was before is refused by name, also where rounding has swallowed it.

Pitfall: with `base: dequantized` a projection passes through NF4 as a whole, as the second quantisation looks at all of its blocks.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pesc.errors import ModelError
from pesc.models.tensor_files import (
    PIECE_ELEMENTS,
    SINGLE_NAME,
    TensorSpec,
    dtype_code,
    link_companions,
    link_file,
    plan_shards,
    read_header,
    read_pieces,
    write_chunks,
    write_index,
)
from pesc.models.upcycle import write_config

if TYPE_CHECKING:
    import torch

    from pesc.models.config import MergeConfig
    from pesc.models.merge import MergeParts

logger = logging.getLogger(__name__)

FLOATING = ("F64", "F32", "F16", "BF16")
_DIGITS = 4
"""Significant digits of the norms in the ledger: enough to see a change, few enough not to see the machine."""


def write_merged(
    parts: MergeParts, out_dir: Path, config: MergeConfig, progress: Callable[..., None] = lambda *_args, **_kwargs: None
) -> list[dict[str, Any]]:
    """Write the merged model and its ledger to the empty `out_dir`; returns the ledger's entries, in the order of the model's tensors."""
    tensors = {**parts.model.specs, **parts.bank}
    specs = {name: _merged_spec(spec, config.dtype) for name, spec in tensors.items()}
    linked = _unchanged_files(parts, specs)
    still = {name for names in linked.values() for name in names}
    ledger = {name: _entry(parts, name, spec, "linked" if name in still else None) for name, spec in specs.items()}
    shards = plan_shards({name: spec for name, spec in specs.items() if name not in still}, config.max_shard_bytes)
    count, files = len(shards) + len(linked), {}
    names = [SINGLE_NAME] if count == 1 else [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
    counter = iter(range(len(still) + 1, len(specs) + 1))
    for file, shard in zip(names, shards, strict=False):
        writers = {name: _Tensor(parts, name, config.dtype, ledger[name]) for name in shard}
        write_chunks(
            out_dir / file,
            shard,
            lambda name, writers=writers: writers[name].pieces(),
            lambda name: progress(next(counter), len(specs), unit="tensors", message=name),
        )
        files |= dict.fromkeys(shard, file)
    for file, (source, held) in zip(names[len(shards) :], linked.items(), strict=True):
        link_file(parts.model_dir / source, out_dir / file)
        files |= dict.fromkeys(held, file)
    if count > 1:
        write_index(out_dir, files, sum(spec.num_bytes for spec in specs.values()))
    write_config(out_dir, merged_fields(parts, config))
    link_companions(parts.model_dir, out_dir)
    entries = list(ledger.values())
    write_json(out_dir / "ledger.json", {"base": config.base, "lora_scaling": parts.lora.scaling, "tensors": entries})
    _warn_of_idle_experts(entries)
    return entries


def merged_fields(parts: MergeParts, config: MergeConfig) -> dict[str, Any]:
    """config.json of the merged model: the trained one's, in another dtype."""
    fields = {name: value for name, value in parts.fields.items() if name != "torch_dtype"}  # the old name of dtype
    return fields | {"dtype": config.dtype}


def _merged_spec(spec: TensorSpec, dtype: str) -> TensorSpec:
    return TensorSpec(dtype_code(dtype) if spec.dtype in FLOATING else spec.dtype, spec.shape)


def _unchanged_files(parts: MergeParts, specs: Mapping[str, TensorSpec]) -> dict[str, list[str]]:
    """Files of the model that belong to the merged one as they are -> their tensors."""
    changed = {*parts.bank, *parts.lora.pairs, *parts.quantized}
    found = {}
    for file in sorted(set(parts.model.files.values())):
        held = read_header(parts.model_dir / file)
        if all(name not in changed and specs.get(name) == spec and parts.model.files[name] == file for name, spec in held.items()):
            found[file] = list(held)
    return found


def _entry(parts: MergeParts, name: str, spec: TensorSpec, action: str | None) -> dict[str, Any]:
    if action is None:
        action = "trained" if name in parts.bank else "merged" if name in parts.lora.pairs else "copied"
    entry = {"name": name, "action": action, "shape": list(spec.shape), "dtype": spec.dtype}
    if spec.dtype in FLOATING:
        entry |= {"quantized": name in parts.quantized, "change": 0.0}
    return entry


@dataclass
class _Tensor:
    """One tensor of the merged model, made in pieces; its line in the ledger is complete after the last."""

    parts: MergeParts
    name: str
    dtype: str
    entry: dict[str, Any]
    _squares: dict[str, float] = field(default_factory=lambda: {"norm": 0.0, "change": 0.0})

    def pieces(self) -> Iterator[torch.Tensor]:
        """Flat pieces in the dtype on disk.  Raises ModelError for what is not a number, or trained and not moved."""
        import torch

        if self.entry["dtype"] not in FLOATING:
            yield from self._whole_numbers()
            return
        target, moved = getattr(torch, self.dtype), False
        for start, result in self._results():
            merged = result.to(target)
            moved = self._measure(start, merged, result) or moved
            yield merged
        self.entry |= {name: _rounded(math.sqrt(value)) for name, value in self._squares.items()}
        if not moved and self.entry["action"] in ("merged", "trained"):
            raise ModelError(self._not_moved())
        if self.name.endswith("adapters.up"):
            self.entry["idle_experts"] = self._idle_experts()

    def _measure(self, start: torch.Tensor, merged: torch.Tensor, result: torch.Tensor) -> bool:
        """Add a piece to the norms; whether it moved."""
        before = start.float()
        norm, change, moved = _sum_of_squares(before), 0.0, False
        if merged is not start:
            difference = merged - before  # in fp32
            change = _sum_of_squares(difference)
            moved = change > 0 or bool(difference.any())  # the square of a small change may be zero
        if not math.isfinite(norm + change) and not merged.isfinite().all():
            raise ModelError(self._not_finite(result))
        self._squares["norm"] += norm
        self._squares["change"] += change
        return moved

    def _results(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
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

    def _not_finite(self, result: torch.Tensor) -> str:
        if self.entry["action"] == "trained" and not result.isfinite().all():
            return f"{self.parts.bank_path} has a value that is not a number in {self.name}: the training diverged; train again."
        return f"{self.name} is not a number after the merge: the training diverged, or {self.dtype} cannot hold it; set merge.dtype to float32."

    def _not_moved(self) -> str:
        if self.entry["action"] == "merged" and self.dtype != "float32":
            return f"{self.name} does not change by its LoRA: rounding to {self.dtype} swallows all of it; set merge.dtype to float32."
        return (
            f"{self.name} was declared as trained, but it is what it was before the training: look for a frozen part in the training log."
        )


def _sum_of_squares(values: torch.Tensor) -> float:
    return values.dot(values).item()


def _warn_of_idle_experts(ledger: list[dict[str, Any]]) -> None:
    idle = {entry["name"]: entry["idle_experts"] for entry in ledger if entry.get("idle_experts")}
    if idle:
        first = next(iter(idle))
        logger.warning("%d layers have experts that no token chose while training (%s: %s)", len(idle), first, idle[first])


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")


def write_json(path: Path, content: Any) -> None:
    """Write one of the records beside the weights, so that equal contents are equal bytes."""
    path.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")
