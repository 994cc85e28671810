"""Settings of `routing`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pesc.stage import StageConfig


class RoutingConfig(StageConfig):
    """The routing of a sparse arm on the held-out rows, by domain."""

    enabled: bool = Field(default=True, description="Whether the sparse arms have a `routing` action.")
    tokens: Literal["all", "answers"] = Field(
        default="all", description="Which tokens count. answers: those that training has a loss on, so no chat template and no question."
    )
    blocks_per_domain: int = Field(default=64, ge=1, description="Held-out blocks of each domain that are read, at most.")
    permutations: int = Field(
        default=4999,
        ge=99,
        description="Shuffles of the rows' domains that the p-values come from. Below 20 a layer, none can be below 0.05 after correction.",
    )
    dtype: Literal["bfloat16", "float32"] = Field(default="bfloat16", description="Of the weights and the computation.")
    seed: int = Field(default=42, ge=0, description="Of the shuffles.")
