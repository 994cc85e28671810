"""A model that holds no weight: each module reads its own when it runs and lets go of them after, so that a 70B model runs in the memory of one.

    model = streamed_model(fields, read)          # read(name) -> tensor
    model(input_ids=ids)

Contract: weights are read by the model's own names, in fp32, one projection, embedding, router or bank at a time; what else a model has (norms,
convolutions, single numbers) is small and is kept.  The outputs are those of the same model loaded whole.

Pitfall: every forward pass reads the whole model again.  Give it all prompts at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from pesc.moe.adapters import AdapterBank
from pesc.moe.router import Router

STREAMED = (nn.Linear, nn.Embedding, Router, AdapterBank)
"""Modules whose weights are used by their own forward pass alone, and are large."""

Read = Callable[[str], torch.Tensor]


def streamed_model(fields: Mapping[str, Any], read: Read) -> Any:
    """A model of this config.json whose weights `read(name)` gives when they are needed; of tied weights, the one that is on disk is asked for."""
    model = empty_model(fields)
    tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
    return stream(model, lambda name: read(tied.get(name, name)))


def empty_model(fields: Mapping[str, Any]) -> Any:
    """A model of this config.json without weights; buffers that are computed (rotary tables) are there."""
    from accelerate import init_empty_weights

    from pesc.models.factory import causal_lm_of

    with init_empty_weights(include_buffers=False):
        return causal_lm_of(dict(fields)).eval()


def stream(model: Any, read: Read) -> Any:
    """Let every module of an empty model read its weights when it runs."""
    for prefix, module in list(model.named_modules()):
        if isinstance(module, STREAMED):
            module.register_forward_pre_hook(_loader(prefix, read))
            module.register_forward_hook(lambda module, _inputs, _output: forget(module), always_call=True)
        else:
            fill(module, prefix, read)
        _fill_buffers(module, prefix, read)
    return model


def _loader(prefix: str, read: Read):
    def load(module: nn.Module, _inputs: Any) -> None:
        fill(module, prefix, read)

    return load


def fill(module: nn.Module, prefix: str, read: Read) -> None:
    """Read a module's own weights."""
    for name, parameter in module._parameters.items():
        if parameter is not None:
            module._parameters[name] = nn.Parameter(read(f"{prefix}.{name}" if prefix else name).float(), requires_grad=False)


def forget(module: nn.Module) -> None:
    """Let go of a module's own weights."""
    for name, parameter in module._parameters.items():
        if parameter is not None:
            module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)


def _fill_buffers(module: nn.Module, prefix: str, read: Read) -> None:
    """What is counted while training (the routers' biases) is on disk as well; everything else is computed."""
    for name, buffer in module._buffers.items():
        if buffer is not None and name not in module._non_persistent_buffers_set:
            buffer.copy_(read(f"{prefix}.{name}"))
