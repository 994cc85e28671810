"""Where and in what precision to measure, from what a user wrote."""

from __future__ import annotations

import torch

from pesc.errors import RecipeError


def dtype_named(name: str) -> torch.dtype:
    """A dtype that banks are trained in.  Raises RecipeError for another."""
    if name not in ("float32", "bfloat16"):
        raise RecipeError(f"--dtype is {name!r}: choose float32 or bfloat16.")
    return getattr(torch, name)


def device_named(name: str) -> str:
    """The CPU or CUDA; for "" the GPU, if there is one.  Raises RecipeError for a GPU that is not there."""
    if name not in ("", "cpu", "cuda"):
        raise RecipeError(f"--device is {name!r}: choose cpu or cuda.")
    if name == "cuda" and not torch.cuda.is_available():
        raise RecipeError("--device is cuda, but torch sees no GPU on this machine: choose cpu.")
    return name or ("cuda" if torch.cuda.is_available() else "cpu")
