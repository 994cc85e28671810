"""Files of `torch.save`: the tensors of published checkpoints, read without running any code of theirs, and written.

Contract: only plain dictionaries of tensors are read (`weights_only`), memory-mapped where the file allows it.  Whatever is damaged, holds
something else or would run code is a ModelError that names the file.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from pesc.errors import ModelError
from pesc.models.tensor_files import TensorSpec, dtype_code, read_weight_map

if TYPE_CHECKING:
    import torch

PICKLE_INDEX_NAME = "pytorch_model.bin.index.json"
PICKLE_SINGLE_NAME = "pytorch_model.bin"


class PickleDirectory:
    """The tensors of a directory with `pytorch_model*.bin`, with the interface of `TensorDirectory`."""

    def __init__(self, directory: Path):
        self.directory = directory
        index, single = directory / PICKLE_INDEX_NAME, directory / PICKLE_SINGLE_NAME
        if not index.is_file() and not single.is_file():
            raise ModelError(f"{directory} holds no weights: give the directory of a whole model.")
        self._files = sorted(set(read_weight_map(index).values())) if index.is_file() else [single.name]

    @cached_property
    def _tensors(self) -> dict[str, torch.Tensor]:
        tensors: dict[str, torch.Tensor] = {}
        for file in self._files:
            found = read_pickle(self.directory / file)
            if twice := tensors.keys() & found.keys():
                raise ModelError(f"{self.directory / file} has {min(twice)}, which another shard has too: download the model again.")
            tensors |= found
        return tensors

    @cached_property
    def specs(self) -> dict[str, TensorSpec]:
        """Tensor name -> spec."""
        return tensor_specs(self._tensors)

    def read(self, name: str) -> torch.Tensor:
        """One tensor."""
        return self._tensors[name]


def read_pickle(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of one file.  Raises ModelError when it is damaged, or not a plain dictionary of tensors."""
    import torch

    with path.open("rb") as file:
        is_zip = file.read(2) == b"PK"  # the format before torch 1.6 cannot be mapped
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError, KeyError, AttributeError) as error:
        reason = (str(error) or repr(error)).splitlines()[0]
        raise ModelError(f"{path} is not a plain file of tensors, so it is not opened: {reason}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds a {type(content).__name__}, not tensors by name: it is not a file of weights.")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise ModelError(f"{path} has {name!r}, which is not a tensor but a {type(value).__name__}: it is not a file of weights.")
    return content


def tensor_specs(tensors: Mapping[str, torch.Tensor]) -> dict[str, TensorSpec]:
    """Tensor name -> spec."""
    return {name: TensorSpec(dtype_code(str(t.dtype).removeprefix("torch.")), tuple(t.shape)) for name, t in tensors.items()}


def write_pickle(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write and sync one file; every tensor gets a storage of its own.  A full disk is an OSError, as everywhere."""
    import torch

    own = {
        name: tensor if _owns_storage(tensor) else tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    with path.open("wb") as file:  # given a path, torch reports a full disk as a RuntimeError without a cause
        torch.save(own, file)
        file.flush()
        os.fsync(file.fileno())


def _owns_storage(tensor: torch.Tensor) -> bool:
    return tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
