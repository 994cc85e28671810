"""Where a model goes: the device that is asked for, and whether one GPU holds it.  Nothing here imports torch before it is asked."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Any

from pesc.errors import ModelError

_FULL = 0.8
"""Share of one GPU's memory that weights may take; the rest is for what they compute."""


class Device(StrEnum):
    """Where the model runs; auto: on a GPU where there is one."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


def choose_device(wanted: str) -> str:
    """`cuda` or `cpu`.  Raises ModelError when a GPU is asked for and there is none."""
    import torch

    if wanted == "cuda" and not torch.cuda.is_available():
        raise ModelError(
            "The device is cuda, but torch sees no GPU on this machine: use --device cpu (in a recipe, execution.device=cpu), or a GPU worker."
        )
    return "cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu"


def exceeds_one_gpu(model_dir: Path, device: str) -> bool:
    """Whether there are several GPUs and the weights are too large for one of them."""
    import torch

    if device != "cuda" or torch.cuda.device_count() < 2:
        return False
    weights = sum(file.stat().st_size for file in model_dir.glob("*.safetensors"))
    return weights > _FULL * torch.cuda.get_device_properties(0).total_memory


def device_map(model_dir: Path, device: str) -> Any:
    """What from_pretrained takes as `device_map`: the one device, or all GPUs where one is too small."""
    return "auto" if exceeds_one_gpu(model_dir, device) else {"": device}
