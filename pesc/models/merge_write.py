"""The files of a merged model and its ledger, written in pieces of tensors: memory depends neither on the model nor on its largest tensor.

Key contracts
- A shard in which nothing changes is linked, not written; `ledger.json` calls its tensors "linked".
- Every tensor is in the ledger once: what was done with it, shape, dtype, norm of its change.
- What was declared as trained and is what it was before is refused by name, also where rounding has swallowed it.
- With `dtype: nf4` the ledger says NF4, the weight's own shape, and what the quantisation did (`pesc.models.merge_nf4`).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pesc.models.merge_nf4 import QuantizedTensor, check_kept, plain_dtype
from pesc.models.merge_tensor import FLOATING, MergedTensor
from pesc.models.nf4 import stored_config
from pesc.models.nf4_files import NF4, stored_specs
from pesc.models.tensor_files import (
    DTYPE_BYTES,
    SINGLE_NAME,
    TensorSpec,
    dtype_code,
    link_companions,
    link_file,
    plan_shards,
    read_header,
    write_chunks,
    write_index,
)
from pesc.models.upcycle import write_config

if TYPE_CHECKING:
    from pesc.models.config import MergeConfig
    from pesc.models.merge import MergeParts

logger = logging.getLogger(__name__)


def write_merged(
    parts: MergeParts, out_dir: Path, config: MergeConfig, progress: Callable[..., None] = lambda *_args, **_kwargs: None
) -> list[dict[str, Any]]:
    """Write the merged model and its ledger to the empty `out_dir`; returns the ledger's entries, in the order of the model's tensors."""
    tensors = {**parts.model.specs, **parts.bank}
    specs = {name: _merged_spec(parts, name, spec, config.dtype) for name, spec in tensors.items()}
    linked = _unchanged_files(parts, specs)
    still = {name for names in linked.values() for name in names}
    ledger = {name: _entry(parts, name, spec, "linked" if name in still else None) for name, spec in specs.items()}
    shards = _plan({name: spec for name, spec in specs.items() if name not in still}, config.max_shard_bytes)
    count, files = len(shards) + len(linked), {}
    names = [SINGLE_NAME] if count == 1 else [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
    counter = iter(range(len(still) + 1, len(specs) + 1))
    for file, (shard, together) in zip(names, shards, strict=False):
        writers = {name: _writer(parts, name, config.dtype, ledger[name]) for name in shard if name in ledger}
        write_chunks(
            out_dir / file,
            shard,
            lambda name, writers=writers: writers[name].pieces(),
            lambda name: progress(next(counter), len(specs), unit="tensors", message=name),
            together,
        )
        files |= dict.fromkeys(shard, file)
    for file, (source, held) in zip(names[len(shards) :], linked.items(), strict=True):
        link_file(parts.model_dir / source, out_dir / file)
        files |= dict.fromkeys(held, file)
    if count > 1:
        write_index(out_dir, files, sum(_num_bytes(name, spec) for name, spec in specs.items()))
    write_config(out_dir, merged_fields(parts, config))
    link_companions(parts.model_dir, out_dir)
    entries = list(ledger.values())
    write_json(out_dir / "ledger.json", {"base": config.base, "lora_scaling": parts.lora.scaling, "tensors": entries})
    _warn_of_idle_experts(entries)
    check_kept(entries, config)
    return entries


def _num_bytes(name: str, spec: TensorSpec) -> int:
    return sum(part.num_bytes for part in stored_specs(name, spec.shape).values()) if spec.dtype == NF4 else spec.num_bytes


def _plan(specs: Mapping[str, TensorSpec], max_bytes: int) -> list[tuple[dict[str, TensorSpec], dict[str, list[str]]]]:
    """The files to write: tensors as they lie in each, and those that come with another.  The parts of a weight in NF4 stay together."""
    shards = []
    for held in plan_shards({name: TensorSpec("U8", (_num_bytes(name, spec),)) for name, spec in specs.items()}, max_bytes):
        parts = {name: stored_specs(name, specs[name].shape) if specs[name].dtype == NF4 else {name: specs[name]} for name in held}
        shard = {part: spec for group in parts.values() for part, spec in group.items()}
        if any(len(group) > 1 for group in parts.values()):  # wide types first, so that each tensor lies at a multiple of its width
            shard = dict(sorted(shard.items(), key=lambda item: -DTYPE_BYTES[item[1].dtype]))
        shards.append((shard, {name: list(group)[1:] for name, group in parts.items() if len(group) > 1}))
    return shards


def merged_fields(parts: MergeParts, config: MergeConfig) -> dict[str, Any]:
    """config.json of the merged model: the trained one's, in another dtype."""
    fields = {name: value for name, value in parts.fields.items() if name != "torch_dtype"}  # the old name of dtype
    if config.dtype == "nf4":
        fields["quantization_config"] = stored_config(fields, parts.compute_dtype)
    return fields | {"dtype": plain_dtype(config.dtype)}


def _merged_spec(parts: MergeParts, name: str, spec: TensorSpec, dtype: str) -> TensorSpec:
    if name in parts.stored_nf4:
        return TensorSpec(NF4, spec.shape)
    return TensorSpec(dtype_code(plain_dtype(dtype)) if spec.dtype in FLOATING else spec.dtype, spec.shape)


def _writer(parts: MergeParts, name: str, dtype: str, entry: dict[str, Any]) -> MergedTensor:
    return QuantizedTensor(parts, name, dtype, entry) if entry["dtype"] == NF4 else MergedTensor(parts, name, plain_dtype(dtype), entry)


def _unchanged_files(parts: MergeParts, specs: Mapping[str, TensorSpec]) -> dict[str, list[str]]:
    """Files of the model that belong to the merged one as they are -> their tensors."""
    changed = {*parts.bank, *parts.lora.pairs, *parts.quantized, *parts.stored_nf4}
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
    if spec.dtype in (*FLOATING, NF4):
        entry |= {"quantized": name in parts.quantized, "change": 0.0}
    return entry


def _warn_of_idle_experts(ledger: list[dict[str, Any]]) -> None:
    idle = {entry["name"]: entry["idle_experts"] for entry in ledger if entry.get("idle_experts")}
    if idle:
        first = next(iter(idle))
        logger.warning("%d layers have experts that no token chose while training (%s: %s)", len(idle), first, idle[first])


def write_json(path: Path, content: Any) -> None:
    """Write one of the records beside the weights, so that equal contents are equal bytes."""
    path.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")
