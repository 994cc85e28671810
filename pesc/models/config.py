"""Settings of `upcycle` and `merge`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from pesc.moe.config import PescConfig
from pesc.stage import StageConfig


class UpcycleConfig(StageConfig):
    """Shape and start of the sparse model."""

    kind: Literal["adapters", "whole"] = Field(
        default="adapters",
        description="adapters: experts are adapters on one shared FFN. whole: every expert is a copy of the dense FFN (a Mixtral), for arms of "
        "method upcycle-full, which set it themselves.",
    )
    num_experts: int = Field(default=8, ge=1, description="Adapters on each shared FFN (E).")
    top_k: int = Field(default=2, ge=1, description="Adapters that a token uses (K).")
    adapter_dim: int = Field(default=512, ge=1, description="Width of an adapter (R).")
    scaling: float = Field(default=1.0, gt=0, description="Factor on the adapters' sum (s); 1 in the paper, 0.25 in the published configs.")
    seed: int = Field(default=42, ge=0, description="Seed of the router and of the down projections; the up projections start at zero.")
    dtype: Literal["bfloat16", "float32"] = Field(default="bfloat16", description="Type of the bank and the router on disk.")
    dispatch: Literal["auto", "dense", "grouped", "segments", "reference"] = Field(
        default="auto", description="How the adapters run. auto: the fastest where it runs; pin one where every bit must repeat."
    )
    adapter_input: Literal["ffn_output", "ffn_input"] = Field(
        default="ffn_output", description="What the adapters read; the paper's read the FFN's output, GroveMoE's its input."
    )
    layer_experts: tuple[int, ...] | None = Field(
        default=None, description="Adapters of each layer instead of num_experts for all; 0 leaves a layer dense."
    )
    shared_adapter_dim: int = Field(default=0, ge=0, description="Width of one more adapter that every token uses; 0: none.")

    @model_validator(mode="after")
    def _is_a_shape(self) -> UpcycleConfig:
        if self.top_k > self.num_experts:
            raise ValueError(
                f"top_k ({self.top_k}) is larger than num_experts ({self.num_experts}); a token cannot use more experts than there are"
            )
        if 1 in (self.layer_experts or (self.num_experts,)):
            raise ValueError("one expert leaves the router nothing to choose, and no gradient: give a layer 0 experts, or at least 2")
        own = ("adapter_dim", "scaling", "dispatch", "adapter_input", "layer_experts", "shared_adapter_dim")
        fields = type(self).model_fields
        if self.kind == "whole" and (unfit := [name for name in own if getattr(self, name) != fields[name].default]):
            raise ValueError(f"{unfit[0]} is a setting of adapters, and an expert of kind whole has none: leave it out")
        self.block()
        return self

    def block(self) -> PescConfig:
        """The `pesc` block of the model that these settings make.  Raises ValueError for values that do not fit together."""
        return PescConfig.from_dict(self.model_dump(exclude={"dtype", "kind"}))


class MergeConfig(StageConfig):
    """Folding the trained LoRA into the model."""

    base: Literal["original", "dequantized"] = Field(
        default="original",
        description="original: fold into the bf16 weights. dequantized: into the 4-bit weights the LoRA was trained against.",
    )
    dtype: Literal["bfloat16", "float32", "nf4"] = Field(
        default="bfloat16",
        description="Type of the merged weights. nf4: the projections that training quantises are stored in 4 bit, as bitsandbytes does, and load "
        "as they are; everything else in bfloat16. That is a rounding of its own, which proof.json and ledger.json measure; with base dequantized "
        "it takes most of a usual LoRA back, and such a merge is refused.",
    )
    max_shard_bytes: int = Field(default=5_000_000_000, gt=0, description="Largest safetensors file.")
    proof_prompts: int = Field(default=4, ge=1, description="Prompts on which merged and unmerged logits are compared.")
