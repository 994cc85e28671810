"""Safetensors read and written one tensor at a time, so that a 70B model is converted with one tensor in memory.

Key contracts
- `TensorDirectory` reads a model directory (single file or sharded) lazily, by tensor name.
- `write_tensors` streams tensors into one file whose header is known before the first of them is made; bytes depend on names, dtypes,
  shapes and values alone (no metadata but the `format` that transformers insists on, tensors in the order given).
- `write_chunks` writes the same bytes with some threads, from pieces of tensors: its memory does not depend on the model.

Pitfalls
- transformers prefers `model.safetensors` over an index.  A directory with more files must not contain a file of that name.
- A linked file *is* the other directory's file: nothing may open it for writing.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pesc.errors import ModelError

if TYPE_CHECKING:
    import torch

MAX_WRITERS = 4
"""Threads of `write_chunks`: they draw random numbers, and a disk is busy with fewer."""
PIECE_ELEMENTS = 1 << 19
"""Values of a tensor in memory at a time, where it is read in pieces."""
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
_FICLONE = 0x40049409
"""The ioctl of Linux that makes a file share another one's blocks until either changes (Btrfs, XFS, bcachefs)."""
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
    """The safetensors code of a torch dtype's name: bfloat16 -> BF16.  Raises ModelError for a dtype that no model here has."""
    if name not in _DTYPE_CODES:
        raise ModelError(f"A tensor of {name} cannot be converted: it must be one of {', '.join(_DTYPE_CODES)}.")
    return _DTYPE_CODES[name]


def dtype_name(code: str) -> str:
    """The name of a torch dtype by its safetensors code: BF16 -> bfloat16."""
    return {found: name for name, found in _DTYPE_CODES.items()}[code]


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
        return read_weight_map(index)

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
        return read_tensor(self.directory / self.files[name], name)

    def pieces(self, name: str) -> Iterator[torch.Tensor]:
        """The values of one tensor in order, in flat pieces of at most `PIECE_ELEMENTS`."""
        return read_pieces(self.directory / self.files[name], name)

    def read_row(self, name: str, row: int) -> torch.Tensor:
        """One row of the first dimension of a tensor, on the CPU; the rest is not read."""
        from safetensors import safe_open

        with safe_open(self.directory / self.files[name], framework="pt", device="cpu") as file:
            return file.get_slice(name)[row]


def read_tensor(path: Path, name: str) -> torch.Tensor:
    """One tensor of one safetensors file, on the CPU."""
    from safetensors import safe_open

    with safe_open(path, framework="pt", device="cpu") as file:
        return file.get_tensor(name)


def read_pieces(path: Path, name: str, start: int = 0, end: int | None = None, size: int = PIECE_ELEMENTS) -> Iterator[torch.Tensor]:
    """Values `start` to `end` of a tensor of one safetensors file, in flat pieces of `size`; plain reads, so that no page of a mapping stays in memory."""
    import torch

    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entry = json.loads(file.read(length))[name]
        dtype, width = getattr(torch, dtype_name(entry["dtype"])), DTYPE_BYTES[entry["dtype"]]
        end = math.prod(entry["shape"]) if end is None else end
        file.seek(8 + length + entry["data_offsets"][0] + start * width)
        for done in range(start, end, size):
            data = bytearray(min(size, end - done) * width)
            if file.readinto(data) != len(data):
                raise ModelError(f"{path} ended inside {name}: it was changed while it was read; download or write it again.")
            yield torch.frombuffer(data, dtype=dtype)


def read_sample(path: Path, name: str, size: int) -> bytes:
    """The first and the last `size` bytes of a tensor of one safetensors file."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        start, end = json.loads(file.read(length))[name]["data_offsets"]
        file.seek(8 + length + start)
        head = file.read(min(size, end - start))
        file.seek(8 + length + max(start, end - size))
        return head + file.read(min(size, end - start))


def read_weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> file name of an index.  Raises ModelError when it is not one, or names a file that is not beside it."""
    try:
        weight_map = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{index} is not an index of shards ({error!r}): download the model again.") from error
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard:
            raise ModelError(f"{index} names the shard {shard}, which is not a plain file name: the index is damaged or hostile.")
        if not (index.parent / shard).is_file():
            raise ModelError(f"{index} names the shard {shard}, but it is not there: download the model again.")
    return weight_map


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
    head, _ = _encode_header(specs)
    with path.open("wb") as file:
        file.write(head)
        for name, spec in specs.items():
            tensor = make(name).detach().cpu().contiguous()
            if tuple(tensor.shape) != spec.shape or dtype_code(str(tensor.dtype).removeprefix("torch.")) != spec.dtype:
                raise ValueError(f"{name} was announced as {spec}, but is {tensor.dtype} {tuple(tensor.shape)}")
            file.write(_raw(tensor))
        file.flush()
        os.fsync(file.fileno())


def write_chunks(
    path: Path,
    specs: Mapping[str, TensorSpec],
    chunks: Callable[[str], Iterable[torch.Tensor] | None],
    done: Callable[[str], None],
    together: Mapping[str, Iterable[str]] | None = None,
) -> None:
    """Write one safetensors file; `chunks(name)` gives a tensor's values in order, in flat pieces; `done(name)` when it is written.

    None for the pieces means zeros: they become a hole, which reads as zeros and takes neither time nor room on the disk.
    together: tensor -> tensors whose values its pieces give after its own, as they come out of one calculation.
    Some tensors are made and written at a time, each by a thread of its own.  The data is synced to disk.
    """
    together = {name: tuple(names) for name, names in (together or {}).items()}
    given = {follower for names in together.values() for follower in names}
    head, offsets = _encode_header(specs)
    workers = min(MAX_WRITERS, os.cpu_count() or 1)
    with path.open("wb") as file, ThreadPoolExecutor(workers) as pool:
        os.pwrite(file.fileno(), head, 0)
        file.truncate(len(head) + sum(spec.num_bytes for spec in specs.values()))
        places = {
            name: [(offsets[part], specs[part].num_bytes) for part in (name, *together.get(name, ()))]
            for name in specs
            if name not in given
        }
        jobs = {pool.submit(_write_pieces, file.fileno(), ranges, chunks(name)): name for name, ranges in places.items()}
        try:
            for job in as_completed(jobs):
                job.result()
                done(jobs[job])
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
        os.fsync(file.fileno())


def write_hollow(path: Path, specs: Mapping[str, TensorSpec]) -> None:
    """Write one safetensors file of zeros that takes no room on the disk: for measurements with models of any size."""
    head, _ = _encode_header(specs)
    with path.open("wb") as file:
        file.write(head)
        file.truncate(len(head) + sum(spec.num_bytes for spec in specs.values()))


def _write_pieces(descriptor: int, ranges: list[tuple[int, int]], pieces: Iterable[torch.Tensor] | None) -> None:
    """Fill the ranges (offset, bytes) of a file one after the other; no piece crosses from one into the next."""
    if pieces is None:
        return
    left = iter(pieces)
    for start, size in ranges:
        offset = start
        while offset < start + size and (piece := next(left, None)) is not None:
            view = memoryview(_raw(piece))
            while view:
                written = os.pwrite(descriptor, view, offset)
                offset, view = offset + written, view[written:]
        if offset != start + size:
            raise ValueError(f"a tensor was announced with {size} bytes, but its pieces have {offset - start}")
        if hasattr(os, "posix_fadvise"):  # the disk starts now, while the next tensor is made, instead of at the fsync
            os.posix_fadvise(descriptor, start, size, os.POSIX_FADV_DONTNEED)
    if any(piece.numel() for piece in left):
        raise ValueError("the pieces of a tensor go on after the bytes that were announced")


def _encode_header(specs: Mapping[str, TensorSpec]) -> tuple[bytes, dict[str, int]]:
    """The start of a safetensors file, and the place in the file of each tensor's values."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, spec in specs.items():
        header[name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [offset, offset + spec.num_bytes]}
        offset += spec.num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, {name: 8 + len(text) + header[name]["data_offsets"][0] for name in specs}


def _raw(tensor: torch.Tensor) -> Any:
    """The bytes of a contiguous tensor, without a copy."""
    import torch

    return tensor.view(-1).view(torch.uint8).numpy().data if tensor.numel() else b""


def write_sharded(out_dir: Path, specs: Mapping[str, TensorSpec], max_bytes: int, make: Callable[[str], torch.Tensor]) -> None:
    """Write a model's tensors in order as `model.safetensors`, or as shards of at most `max_bytes` and their index."""
    shards = plan_shards(specs, max_bytes)
    names = [SINGLE_NAME] if len(shards) == 1 else [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    for file, shard in zip(names, shards, strict=True):
        write_tensors(out_dir / file, shard, make)
    if len(shards) > 1:
        files = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        write_index(out_dir, files, sum(spec.num_bytes for spec in specs.values()))


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
    """Hard-link a file; where the file system does not allow that, let it share the blocks; where it cannot do that either, copy."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        if not _clone_file(source, target):
            shutil.copyfile(source, target)


def _clone_file(source: Path, target: Path) -> bool:
    """Make `target` a reflink of `source`; False where the file system has none."""
    with source.open("rb") as read, target.open("wb") as write:
        try:
            fcntl.ioctl(write.fileno(), _FICLONE, read.fileno())
        except OSError:
            return False
    return True


def symlink_file(source: Path, target: Path) -> None:
    """A symbolic link: for a directory that lives shorter than the file, perhaps on another file system."""
    target.symlink_to(source.resolve())


def link_companions(source: Path, target: Path, code: bool = True, link: Callable[[Path, Path], None] = link_file) -> list[str]:
    """Link what belongs to a model beside weights and config.json: tokenizer, chat template, generation settings, licence, remote code.

    Without `code`, modeling files stay behind: they are of another layout.  Weights in other formats (pickles, GGUF, ONNX) and hidden files
    are left out.  Returns the names.
    """
    names = sorted(path.name for path in source.iterdir() if path.is_file() and _is_companion(path.name, code))
    for name in names:
        link(source / name, target / name)
    return names


def _is_companion(name: str, code: bool) -> bool:
    weights = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ot", ".index.json")
    unwanted = weights if code else (*weights, ".py")
    return not name.startswith(".") and name != "config.json" and not name.endswith(unwanted)
