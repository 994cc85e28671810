"""A model for reading its routers or its losses: loaded whole, or refused with a sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

import pesc.models
from pesc.errors import ModelError
from pesc.models.placement import choose_device, device_map
from pesc.moe.layer import set_dispatch
from pesc.remote_code import refuse_own_code

_ERRORS = (OSError, ValueError, KeyError, RuntimeError, TypeError, AttributeError, ImportError, SafetensorError)


def load_model(directory: Path, name: str, dtype: str, device: str = "auto") -> Any:
    """The causal LM of a directory, in evaluation mode.  dtype: float32, bfloat16; device: auto, cpu, cuda.

    Its dispatch is pinned: a path chosen by measurement may differ by rounding, and a choice between near equals with it.
    Raises ModelError when it cannot be loaded whole.
    """
    pesc.models.register()
    transformers_logging.disable_progress_bar()
    where = choose_device(device)
    refuse_own_code(directory)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            directory, dtype=dtype, device_map=device_map(directory, where), output_loading_info=True, trust_remote_code=False
        )
        model, info = loaded
    except torch.OutOfMemoryError:
        raise ModelError(f"{name} does not fit the GPU: use a larger one, or --device cpu.") from None
    except _ERRORS as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(f"The model of {name} cannot be loaded ({lines[0]}): write or download the directory again.") from error
    if lost := sorted(info["missing_keys"]):
        raise ModelError(f"{name} lacks {len(lost)} tensors ({lost[0]}): what is measured of it would be of random weights.")
    set_dispatch(model, "dense")
    return model.eval()


def load_tokenizer(directory: Path, name: str) -> Any:
    """The tokenizer of a directory.  Raises ModelError."""
    pesc.models.register()
    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except _ERRORS as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(
            f"The tokenizer of {name} cannot be loaded ({lines[0]}): put it into the model's directory, or give --blocks."
        ) from error
