"""Settings of `heldout`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pesc.stage import StageConfig


class HeldOutConfig(StageConfig):
    """The loss of each arm's final model on the held-out rows."""

    enabled: bool = Field(default=False, description="Whether the arms have a `heldout` action.")
    blocks_per_domain: int = Field(default=64, ge=1, description="Held-out blocks of each domain whose rows are read, at most.")
    dtype: Literal["bfloat16", "float32"] = Field(default="float32", description="Of the weights and the computation.")
