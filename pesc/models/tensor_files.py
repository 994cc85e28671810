"""Safetensors read and written one tensor at a time, so that a 70B model is converted with one tensor in memory.

Key contracts
- `TensorDirectory` reads a model directory (single file or sharded) lazily, by tensor name.
- `write_tensors` streams tensors into one file whose header is known before the first of them is made; bytes depend on names, dtypes,
  shapes and values alone (no metadata but the `format` that transformers insists on, tensors in the order given).

Pitfall: transformers prefers `model.safetensors` over an index.  A directory with more files must not contain a file of that name.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pesc.errors import ModelError

if TYPE_CHECKING:
    import torch

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

DTYPE_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
}
"""Bytes of one element of the dtypes a checkpoint may hold."""
_DTYPE_CODES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32", "uint8": "U8"}


@dataclass(frozen=True)
class TensorSpec:
    """Dtype (safetensors code, such as BF16) and shape of a tensor."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        """Values in the tensor."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Bytes on disk."""
        return self.num_elements * DTYPE_BYTES[self.dtype]


def dtype_code(name: str) -> str:
    """The safetensors code of a torch dtype's name: bfloat16 -> BF16."""
    return _DTYPE_CODES[name]


class TensorDirectory:
    """The tensors of a model directory, by name.  Reads headers at once and values only when asked.

    Raises ModelError for a directory without safetensors, a missing shard or a damaged one.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self.files: dict[str, str] = self._read_index()

    def _read_index(self) -> dict[str, str]:
        single, index = self.directory / SINGLE_NAME, self.directory / INDEX_NAME
        if single.is_file():
            return {name: SINGLE_NAME for name in read_header(single)}
        if not index.is_file():
            pickles = sorted(path.name for path in self.directory.glob("*.bin"))
            found = f"it holds the pickle {pickles[0]}, which this project does not execute" if pickles else "it holds no weights"
            raise ModelError(
                f"{self.directory} has neither {SINGLE_NAME} nor {INDEX_NAME}: {found}. Convert the model to safetensors first."
            )
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        for shard in sorted(set(weight_map.values())):
            if not (self.directory / shard).is_file():
                raise ModelError(f"{index} names the shard {shard}, but it is not there: download the model again.")
        return dict(weight_map)

    @cached_property
    def specs(self) -> dict[str, TensorSpec]:
        """Tensor name -> spec, in the order of files and of the tensors in them."""
        headers = {file: read_header(self.directory / file) for file in sorted(set(self.files.values()))}
        lost = [name for name, file in self.files.items() if name not in headers[file]]
        if lost:
            raise ModelError(
                f"{self.directory / INDEX_NAME} says {lost[0]} is in {self.files[lost[0]]}, but it is not: download the model again."
            )
        return {name: spec for file, header in headers.items() for name, spec in header.items() if self.files.get(name) == file}

    def read(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU."""
        from safetensors import safe_open

        with safe_open(self.directory / self.files[name], framework="pt", device="cpu") as file:
            return file.get_tensor(name)


def read_header(path: Path) -> dict[str, TensorSpec]:
    """Tensor name -> spec of one safetensors file, in the file's order.  Raises ModelError when it is not one."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > path.stat().st_size:
                raise ValueError("the header is longer than the file")
            header = json.loads(file.read(length))
        specs = {name: TensorSpec(entry["dtype"], tuple(entry["shape"])) for name, entry in header.items() if name != "__metadata__"}
        end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
        if 8 + length + end != path.stat().st_size:
            raise ValueError("its length is not what the header says")
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path} is not a whole safetensors file ({error}): download or write it again.") from error
    return specs


def write_tensors(path: Path, specs: Mapping[str, TensorSpec], make: Callable[[str], torch.Tensor]) -> None:
    """Write one safetensors file; `make(name)` is called for each tensor in turn and its result let go before the next.

    The data is synced to disk.  Raises ValueError when `make` gives another shape or dtype than the spec.
    """
    import torch

    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, spec in specs.items():
        header[name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [offset, offset + spec.num_bytes]}
        offset += spec.num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, spec in specs.items():
            tensor = make(name).detach().cpu().contiguous()
            if tuple(tensor.shape) != spec.shape or dtype_code(str(tensor.dtype).removeprefix("torch.")) != spec.dtype:
                raise ValueError(f"{name} was announced as {spec}, but is {tensor.dtype} {tuple(tensor.shape)}")
            file.write(tensor.view(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
        file.flush()
        os.fsync(file.fileno())


def write_index(directory: Path, files: Mapping[str, str], total_size: int) -> None:
    """Write model.safetensors.index.json; `files` maps tensor names to file names."""
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(files.items()))}
    (directory / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def plan_shards(specs: Mapping[str, TensorSpec], max_bytes: int) -> list[dict[str, TensorSpec]]:
    """Tensors in order, cut into files of at most `max_bytes` (a larger tensor gets a file of its own)."""
    shards: list[dict[str, TensorSpec]] = [{}]
    size = 0
    for name, spec in specs.items():
        if shards[-1] and size + spec.num_bytes > max_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = spec
        size += spec.num_bytes
    return shards


def link_file(source: Path, target: Path) -> None:
    """Hard-link a file, or copy it where the file system does not allow that."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def link_companions(source: Path, target: Path) -> list[str]:
    """Link what belongs to a model beside weights and config.json: tokenizer, chat template, generation settings, licence, remote code.

    Returns the names.  Weights in other formats (pickles, GGUF, ONNX) and hidden files are left out.
    """
    names = sorted(path.name for path in source.iterdir() if path.is_file() and _is_companion(path.name))
    for name in names:
        link_file(source / name, target / name)
    return names


def _is_companion(name: str) -> bool:
    weights = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ot", ".index.json")
    return not name.startswith(".") and name != "config.json" and not name.endswith(weights)
