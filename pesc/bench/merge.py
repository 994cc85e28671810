"""Merging: its throughput against a plain copy of the same bytes on the same disk, and its memory by model size.

    pesc bench merge --dir /scratch

A dense model of each shape is made of shards full of holes and upcycled; LoRA and bank are random.  Each merge is a process of its own (imports
are not in its time), followed by a plain copy of what it wrote, synced, to the same directory.

    share     seconds of the copy over seconds of the merge, sync included: 1 is as fast as a copy; the median of the runs
    peak RSS  of the merging process, Python, torch and transformers included

The proof is not in it: it runs the model, which costs what a forward pass costs.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pesc.bench.convert import Shape, make_dense, measure_each, peak_bytes
from pesc.errors import PescError
from pesc.models.config import MergeConfig, UpcycleConfig

MIN_SHARE = 0.5
"""Least throughput of a merge, as a share of a plain copy's."""
MAX_MEMORY_SPREAD = 1.15
"""Largest peak over smallest: memory that does not grow with the model."""
RANK = 64
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_BLOCK_BYTES = 1 << 24


@dataclass(frozen=True)
class Row:
    """One line of the table: medians over the runs, the largest peak."""

    shape: str
    merged_bytes: int
    merge_seconds: float
    copy_seconds: float
    share: float
    peak_bytes: int


def measure(
    shapes: Sequence[Shape], directory: Path | None, repeats: int, progress: Callable[..., None] = lambda *_args, **_kwargs: None
) -> list[Row]:
    """Measure every shape in a new directory below `directory`, which is removed afterwards.  Raises PescError when a merge fails."""
    return measure_each(shapes, directory, repeats, progress, make_trained, _run_once, _summarise)


def make_trained(place: Path, shape: Shape) -> tuple[Path, Path]:
    """A sparse model of this shape, and a train object for it with random LoRA and bank."""
    from pesc.models.upcycle import upcycle_directory

    dense, model, trained = (place / name for name in ("dense", "model", "trained"))
    make_dense(dense, shape)
    model.mkdir()
    upcycle_directory(dense, model, UpcycleConfig(adapter_dim=shape.adapter_dim))
    (trained / "adapter").mkdir(parents=True)
    lora, groups = _write_lora(model, trained / "adapter"), _write_bank(model, trained)
    config = {"method": "pesc", "quantization": "nf4", "compute_dtype": "bfloat16"}
    (trained / "training.json").write_text(json.dumps({"config": config, "trainable": [lora, *groups]}))
    return model, trained


def _write_lora(model: Path, folder: Path) -> dict[str, Any]:
    from pesc.models.tensor_files import TensorDirectory, TensorSpec

    specs = {}
    for name, spec in TensorDirectory(model).specs.items():
        module = name.removesuffix(".weight")
        if module.endswith(PROJECTIONS):
            out_features, in_features = spec.shape
            specs[f"base_model.model.{module}.lora_A.weight"] = TensorSpec("BF16", (RANK, in_features))
            specs[f"base_model.model.{module}.lora_B.weight"] = TensorSpec("BF16", (out_features, RANK))
    _write_random(folder / "adapter_model.safetensors", specs)
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 16, "target_modules": list(PROJECTIONS)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return _group("lora", specs)


def _write_bank(model: Path, folder: Path) -> list[dict[str, Any]]:
    from pesc.models.merge import is_sparse_tensor
    from pesc.models.tensor_files import TensorDirectory
    from pesc.models.upcycle import BANK_NAME

    specs = {name: spec for name, spec in TensorDirectory(model).specs.items() if is_sparse_tensor(name)}
    _write_random(folder / BANK_NAME, specs)
    routers = {name: spec for name, spec in specs.items() if ".router." in name}
    return [_group("router", routers), _group("bank", {name: spec for name, spec in specs.items() if name not in routers})]


def _write_random(path: Path, specs: dict[str, Any]) -> None:
    import torch

    from pesc.models.tensor_files import write_tensors

    generator = torch.Generator().manual_seed(0)
    write_tensors(path, specs, lambda name: torch.randn(specs[name].shape, generator=generator).mul_(0.02).bfloat16())


def _group(name: str, specs: dict[str, Any]) -> dict[str, Any]:
    return {"group": name, "tensors": len(specs), "parameters": sum(spec.num_elements for spec in specs.values())}


def _run_once(made: tuple[Path, Path], place: Path, shape: Shape) -> dict[str, float]:
    """One merge in a process of its own, then a plain copy of what it wrote."""
    out = place / "merged"
    out.mkdir()
    command = [sys.executable, "-m", "pesc.bench.merge", *map(str, (*made, out))]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    if done.returncode:
        raise PescError(f"The merge of the {shape.name} shape failed: {(done.stderr.strip() or 'no message').splitlines()[-1]}")
    files = sorted(out.glob("*.safetensors"))
    found = json.loads(done.stdout.splitlines()[-1]) | {
        "copy_seconds": sum(plain_copy(path, place / "control") for path in files),
        "merged_bytes": sum(path.stat().st_size for path in files),
    }
    shutil.rmtree(out)
    return found


def plain_copy(source: Path, target: Path) -> float:
    """Seconds to read a file, write it again and sync it; the copy is removed."""
    start = time.perf_counter()
    with source.open("rb", buffering=0) as read, target.open("wb", buffering=0) as write:
        while block := read.read(_BLOCK_BYTES):
            write.write(block)
        os.fsync(write.fileno())
    seconds = time.perf_counter() - start
    target.unlink()
    return seconds


def _summarise(shape: Shape, _made: tuple[Path, Path], runs: Sequence[dict[str, float]]) -> Row:
    return Row(
        shape.name,
        int(runs[0]["merged_bytes"]),
        statistics.median(run["merge_seconds"] for run in runs),
        statistics.median(run["copy_seconds"] for run in runs),
        statistics.median(run["copy_seconds"] / run["merge_seconds"] for run in runs),
        int(max(run["peak_bytes"] for run in runs)),
    )


def render(rows: Sequence[Row]) -> str:
    """The table, and whether the bars are met."""
    lines = [f"{'shape':<8}{'merged MB':>11}{'merge s':>9}{'copy s':>8}{'share':>7}{'peak MB':>9}"]
    for row in rows:
        lines.append(
            f"{row.shape:<8}{row.merged_bytes / 1e6:>11,.1f}{row.merge_seconds:>9.2f}{row.copy_seconds:>8.2f}{row.share:>7.2f}"
            f"{row.peak_bytes / 1e6:>9.0f}"
        )
    worst, spread = min(row.share for row in rows), max(row.peak_bytes for row in rows) / min(row.peak_bytes for row in rows)
    lines.append(f"smallest share {worst:.2f} (bar {MIN_SHARE}), largest peak over smallest {spread:.2f} (bar {MAX_MEMORY_SPREAD})")
    return "\n".join(lines)


def merge_once(model: Path, trained: Path, out: Path) -> dict[str, float]:
    """What the process of one run does: merge as the stage does, and say how long it took and how large it grew."""
    from pesc.models.factory import register_architectures
    from pesc.models.merge import read_parts
    from pesc.models.merge_write import write_merged

    register_architectures()  # imports every modeling file: the time of none is measured, and all shapes carry the same
    config, start = MergeConfig(), time.perf_counter()
    write_merged(read_parts(model, trained, config), out, config)
    return {"merge_seconds": time.perf_counter() - start, "peak_bytes": peak_bytes()}


if __name__ == "__main__":
    print(json.dumps(merge_once(*(Path(argument) for argument in sys.argv[1:4]))))
