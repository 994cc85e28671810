"""The `pesc` block of a sparse model's config.json.

It is nested on purpose: a top-level `num_experts` makes vLLM's Transformers backend treat the model as a fused MoE and fail at start.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

DISPATCH_MODES = ("auto", "dense", "grouped", "loop")


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
    """How the adapters run: auto, dense, grouped or loop (see `pesc.moe.dispatch`)."""

    def __post_init__(self):
        for name in ("num_experts", "top_k", "adapter_dim"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"pesc.{name} must be a whole number of at least 1, not {value!r}")
        if self.top_k > self.num_experts:
            raise ValueError(f"pesc.top_k ({self.top_k}) is larger than pesc.num_experts ({self.num_experts})")
        if not isinstance(self.scaling, int | float) or not 0 < self.scaling < float("inf"):
            raise ValueError(f"pesc.scaling must be a number above 0, not {self.scaling!r}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f"pesc.seed must be a whole number of at least 0, not {self.seed!r}")
        if self.dispatch not in DISPATCH_MODES:
            raise ValueError(f"pesc.dispatch must be one of {', '.join(DISPATCH_MODES)}, not {self.dispatch!r}")

    @classmethod
    def from_dict(cls, block: Mapping[str, Any]) -> PescConfig:
        """The config of a `pesc` block; a field that does not exist is an error, because silence would drop it."""
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(block) - known)
        if unknown:
            raise ValueError(f"the pesc block has unknown fields: {', '.join(unknown)} (known: {', '.join(sorted(known))})")
        return cls(**block)

    def to_dict(self) -> dict[str, Any]:
        """The block as it stands in config.json."""
        return asdict(self)
