"""Dense to sparse conversion: its time against a plain write of the bank's bytes, and its memory by model size.

    pesc bench convert --dir /scratch

A dense model of each shape is made of shards full of holes: conversion links them, and reads their headers alone.  Each conversion is a process
of its own (imports are not in its time), between two plain writes of the same number of bytes, synced, to the same directory.

    ratio     seconds of the conversion, sync and rename included, over the mean of the writes beside it; the median of the runs
    peak RSS  of the converting process, Python, torch and transformers included

Pitfalls
- Half of the bank is zeros at the start: the conversion leaves a hole for them, while the plain write writes every byte.
- An exec'd process inherits the peak that getrusage reports from whoever started it; VmHWM of /proc is its own.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pesc.errors import PescError
from pesc.models.config import UpcycleConfig

Input = TypeVar("Input")
Result = TypeVar("Result")
MAX_RATIO = 1.5
"""Most that a conversion may take of the time of a plain write."""
MAX_MEMORY_SPREAD = 1.1
"""Largest peak over smallest: memory that does not grow with the model."""
_SHARD_BYTES = 2_000_000_000
_BLOCK_BYTES = 1 << 24


@dataclass(frozen=True)
class Shape:
    """A dense model to convert: a model_type, its config's fields, and the width of the adapters."""

    name: str
    model_type: str
    fields: dict[str, Any]
    adapter_dim: int = 512


@dataclass(frozen=True)
class Row:
    """One line of the table: medians over the runs, the largest peak."""

    shape: str
    dense_bytes: int
    bank_bytes: int
    convert_seconds: float
    write_seconds: float
    ratio: float
    peak_bytes: int


def _fields(hidden: int, ffn: int, layers: int, heads: int, kv_heads: int, vocabulary: int, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        **more,
    }


SHAPES = (
    Shape("0.5B", "qwen2", _fields(896, 4864, 24, 14, 2, 151936, tie_word_embeddings=True)),
    Shape("2B", "gemma2", _fields(2304, 9216, 26, 8, 4, 256000, head_dim=256)),
    Shape("7B", "llama", _fields(4096, 11008, 32, 32, 32, 32000)),
)
"""The shapes of Qwen2.5-0.5B, Gemma-2-2B and Llama-2-7B."""
QUICK_SHAPES = (
    Shape("tiny", "llama", _fields(128, 256, 4, 4, 4, 1000), 64),
    Shape("small", "llama", _fields(256, 512, 8, 4, 4, 2000), 64),
    Shape("medium", "llama", _fields(512, 1024, 16, 8, 8, 4000), 64),
)


def measure(
    shapes: Sequence[Shape], directory: Path | None, repeats: int, progress: Callable[..., None] = lambda *_args, **_kwargs: None
) -> list[Row]:
    """Measure every shape in a new directory below `directory`, which is removed afterwards.  Raises PescError when a conversion fails."""

    def make(place: Path, shape: Shape) -> Path:
        make_dense(place / "dense", shape)
        return place / "dense"

    return measure_each(shapes, directory, repeats, progress, make, _run_once, _summarise)


def measure_each(
    shapes: Sequence[Shape],
    directory: Path | None,
    repeats: int,
    progress: Callable[..., None],
    make: Callable[[Path, Shape], Input],
    run: Callable[[Input, Path, Shape], dict[str, float]],
    summarise: Callable[[Shape, Input, Sequence[dict[str, float]]], Result],
) -> list[Result]:
    """One shape after the other: `make` its input, `run` it `repeats` times, `summarise` the runs, remove it.

    Raises PescError for a directory that is not there.
    """
    if directory is not None and not directory.is_dir():
        raise PescError(f"{directory} is not a directory: give one on the disk to measure with --dir.")
    rows = []
    with tempfile.TemporaryDirectory(prefix="pesc-bench-", dir=directory) as place:
        for number, shape in enumerate(shapes):
            made, runs = make(Path(place, shape.name), shape), []
            for repeat in range(repeats):
                progress(number * repeats + repeat, len(shapes) * repeats, unit="runs", message=shape.name)
                runs.append(run(made, Path(place), shape))
            rows.append(summarise(shape, made, runs))
            shutil.rmtree(Path(place, shape.name))
    return rows


def make_dense(directory: Path, shape: Shape) -> None:
    """A dense model directory of this shape in bf16 whose shards are holes: any size costs nothing on disk."""
    from pesc.models.factory import architecture
    from pesc.models.tensor_files import TensorSpec, plan_shards, write_hollow, write_index
    from pesc.models.upcycle import expected_specs, write_config

    directory.mkdir(parents=True)
    fields = architecture(shape.model_type).dense_config(**shape.fields).to_dict() | {"dtype": "bfloat16"}
    expected = expected_specs(fields, directory)
    specs = {name: TensorSpec("BF16", sizes) for name, (sizes, tied) in expected.items() if not tied or not fields["tie_word_embeddings"]}
    shards = plan_shards(specs, _SHARD_BYTES)
    files = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_hollow(directory / file, shard)
        files |= dict.fromkeys(shard, file)
    write_index(directory, files, sum(spec.num_bytes for spec in specs.values()))
    write_config(directory, fields)


def _run_once(dense: Path, place: Path, shape: Shape) -> dict[str, float]:
    """One conversion in a process of its own, between two plain writes."""
    out = place / "sparse"
    command = [sys.executable, "-m", "pesc.bench.convert", str(dense), str(out), str(shape.adapter_dim)]
    size = _bank_bytes(shape)
    before = plain_write(place / "control", size)
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    if done.returncode:
        raise PescError(f"The conversion of the {shape.name} shape failed: {(done.stderr.strip() or 'no message').splitlines()[-1]}")
    after = plain_write(place / "control", size)
    shutil.rmtree(out)
    return json.loads(done.stdout.splitlines()[-1]) | {"write_seconds": (before + after) / 2}


def _bank_bytes(shape: Shape) -> int:
    from pesc.models.upcycle import bank_specs

    specs = bank_specs(shape.fields["num_hidden_layers"], shape.fields["hidden_size"], UpcycleConfig(adapter_dim=shape.adapter_dim), Path())
    return sum(spec.num_bytes for spec in specs.values())


def plain_write(path: Path, size: int) -> float:
    """Seconds to write and sync `size` bytes that no disk can compress; the file is removed."""
    block = os.urandom(min(_BLOCK_BYTES, size))
    start = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for done in range(0, size, len(block)):
            file.write(block[: size - done])
        os.fsync(file.fileno())
    seconds = time.perf_counter() - start
    path.unlink()
    return seconds


def _summarise(shape: Shape, dense: Path, runs: Sequence[dict[str, float]]) -> Row:
    def median(values: Sequence[float]) -> float:
        return statistics.median(values)

    return Row(
        shape.name,
        sum(path.stat().st_size for path in dense.glob("*.safetensors")),
        _bank_bytes(shape),
        median([run["convert_seconds"] for run in runs]),
        median([run["write_seconds"] for run in runs]),
        median([run["convert_seconds"] / run["write_seconds"] for run in runs]),
        int(max(run["peak_bytes"] for run in runs)),
    )


def render(rows: Sequence[Row]) -> str:
    """The table, and whether the bars are met."""
    lines = [f"{'shape':<8}{'dense MB':>10}{'bank MB':>10}{'convert s':>11}{'write s':>9}{'ratio':>7}{'peak MB':>9}"]
    for row in rows:
        sizes = f"{row.dense_bytes / 1e6:>10,.1f}{row.bank_bytes / 1e6:>10,.1f}"
        lines.append(
            f"{row.shape:<8}{sizes}{row.convert_seconds:>11.2f}{row.write_seconds:>9.2f}{row.ratio:>7.2f}{row.peak_bytes / 1e6:>9.0f}"
        )
    worst, spread = max(row.ratio for row in rows), max(row.peak_bytes for row in rows) / min(row.peak_bytes for row in rows)
    lines.append(f"largest ratio {worst:.2f} (bar {MAX_RATIO}), largest peak over smallest {spread:.2f} (bar {MAX_MEMORY_SPREAD})")
    return "\n".join(lines)


def peak_bytes() -> int:
    """The largest memory that this process ever had."""
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def convert_once(dense: Path, out: Path, adapter_dim: int) -> dict[str, float]:
    """What the process of one run does: convert as `pesc upcycle` does, and say how long it took and how large it grew."""
    from pesc.models.factory import register_architectures
    from pesc.models.new_directory import new_directory
    from pesc.models.upcycle import upcycle_directory

    register_architectures()  # imports every modeling file: the time of none is measured, and all shapes carry the same
    start = time.perf_counter()
    with new_directory(out) as building:
        upcycle_directory(dense, building, UpcycleConfig(adapter_dim=adapter_dim))
    return {"convert_seconds": time.perf_counter() - start, "peak_bytes": peak_bytes()}


if __name__ == "__main__":
    print(json.dumps(convert_once(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))))
