"""The `pesc` block of a sparse model's config.json.

It is nested on purpose: a top-level `num_experts` makes vLLM's Transformers backend treat the model as a fused MoE and fail at start.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

DISPATCH_MODES = ("auto", "dense", "grouped", "segments", "gathered", "reference")
ADAPTER_INPUTS = ("ffn_output", "ffn_input")
_ALWAYS_WRITTEN = ("num_experts", "top_k", "adapter_dim", "scaling", "seed", "dispatch")


@dataclass(frozen=True)
class PescConfig:
    """Shape of the sparse layers, and how parameters that no checkpoint holds are drawn.

    Raises ValueError for values that cannot be: a message names the field and its bounds.
    """

    num_experts: int = 8
    """Adapters on each shared FFN (E)."""
    top_k: int = 2
    """Adapters that a token uses (K)."""
    adapter_dim: int = 512
    """Width of an adapter (R)."""
    scaling: float = 1.0
    """Factor on the adapters' sum (s)."""
    seed: int = 42
    """Seed of router and down projections that a checkpoint lacks."""
    dispatch: str = "auto"
    """How the adapters run: auto, or the path that is pinned (see `pesc.moe.dispatch`)."""
    adapter_input: str = "ffn_output"
    """What the adapters read.  ffn_output: the paper's; ffn_input: beside the FFN, as in GroveMoE."""
    layer_experts: tuple[int, ...] | None = None
    """Adapters of each layer, instead of `num_experts` for all; 0 leaves the layer dense."""
    shared_adapter_dim: int = 0
    """Width of one more adapter that every token uses, ungated; 0: none."""
    bias_update_rate: float = 0.0
    """γ of balancing without a loss: each router selects by z + γ·(steps of its bias); 0: no bias."""

    def __post_init__(self):
        for name in ("num_experts", "top_k", "adapter_dim"):
            _check_whole(name, getattr(self, name), 1)
        for name in ("seed", "shared_adapter_dim"):
            _check_whole(name, getattr(self, name), 0)
        if self.top_k > self.num_experts:
            raise ValueError(f"pesc.top_k ({self.top_k}) is larger than pesc.num_experts ({self.num_experts})")
        if not isinstance(self.scaling, int | float) or not 0 < self.scaling < float("inf"):
            raise ValueError(f"pesc.scaling must be a number above 0, not {self.scaling!r}")
        if not isinstance(self.bias_update_rate, int | float) or not 0 <= self.bias_update_rate < float("inf"):
            raise ValueError(f"pesc.bias_update_rate must be a number of at least 0, not {self.bias_update_rate!r}")
        for name, known in (("dispatch", DISPATCH_MODES), ("adapter_input", ADAPTER_INPUTS)):
            if getattr(self, name) not in known:
                raise ValueError(f"pesc.{name} must be one of {', '.join(known)}, not {getattr(self, name)!r}")
        if self.layer_experts is not None:
            if not isinstance(self.layer_experts, list | tuple):
                raise ValueError(f"pesc.layer_experts must be a list of one number a layer, not {self.layer_experts!r}")
            object.__setattr__(self, "layer_experts", tuple(self.layer_experts))
            self._check_layers(self.layer_experts)

    def _check_layers(self, counts: tuple[int, ...]) -> None:
        for layer, count in enumerate(counts):
            _check_whole(f"layer_experts[{layer}]", count, 0)
            if 0 < count < self.top_k:
                raise ValueError(f"pesc.layer_experts[{layer}] is {count}, fewer than pesc.top_k ({self.top_k}); 0 leaves a layer dense")
        if not any(counts):
            raise ValueError("pesc.layer_experts leaves every layer dense")

    def experts_of(self, layer: int) -> int:
        """Adapters of one layer; 0 for a layer that stays dense.  Raises ValueError when `layer_experts` does not name the layer."""
        if self.layer_experts is None:
            return self.num_experts
        if layer >= len(self.layer_experts):
            raise ValueError(f"pesc.layer_experts names {len(self.layer_experts)} layers, but the model has a layer {layer}")
        return self.layer_experts[layer]

    @classmethod
    def from_dict(cls, block: Mapping[str, Any]) -> PescConfig:
        """The config of a `pesc` block; a field that does not exist is an error, because silence would drop it."""
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(block) - known)
        if unknown:
            raise ValueError(f"the pesc block has unknown fields: {', '.join(unknown)} (known: {', '.join(sorted(known))})")
        return cls(**block)

    def to_dict(self) -> dict[str, Any]:
        """The block as it stands in config.json: the paper's fields, and the options beyond it that are used."""
        block = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in _ALWAYS_WRITTEN or value != field.default:
                block[field.name] = list(value) if isinstance(value, tuple) else value
        return block


def _check_whole(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"pesc.{name} must be a whole number of at least {least}, not {value!r}")
