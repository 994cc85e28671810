"""Settings of `train`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from pesc.stage import StageConfig

Method = Literal["pesc", "qlora", "lora", "upcycle-full"]
UNQUANTIZED: tuple[Method, ...] = ("lora", "upcycle-full")
"""Methods whose weights are in the compute dtype."""


class LoraConfig(StageConfig):
    """LoRA on the dense projections."""

    rank: int = Field(default=64, ge=1, description="Width of the two matrices.")
    alpha: float = Field(default=16.0, gt=0, description="Their product is scaled by alpha / rank.")
    dropout: float = Field(default=0.1, ge=0, lt=1, description="Share of their input that is left out while training.")
    targets: tuple[str, ...] = Field(
        default=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        min_length=1,
        description="Names of the projections that get LoRA.",
    )
    plus_ratio: float = Field(
        default=1.0, gt=0, description="LoRA+: learning rate of lora_B over that of lora_A (Hayou et al. 2024); 1: plain LoRA."
    )


class BalanceConfig(StageConfig):
    """Load balancing of the router."""

    kind: Literal["switch", "bias", "none"] = Field(
        default="switch",
        description="switch: the loss alpha * E * sum f_i P_i per layer (Fedus et al. 2022, eq. 4). bias: no loss; a bias per expert that only "
        "selects is moved after each step (Wang et al. 2024).",
    )
    coefficient: float = Field(default=0.01, ge=0, description="alpha of kind switch.")
    bias_update_rate: float = Field(default=0.001, gt=0, description="Step of the bias of kind bias.")
    z_coefficient: float = Field(default=0.0, ge=0, description="Factor on the routers' z-loss (Zoph et al. 2022, eq. 5); 0: off.")
    jitter: float = Field(
        default=0.0, ge=0, lt=1, description="The router's input is multiplied by U(1 - jitter, 1 + jitter) while training."
    )


class LearningRates(StageConfig):
    """Learning rates of parts of the model; where there is none, train.learning_rate.  One schedule shapes them all."""

    lora: float | None = Field(default=None, gt=0, description="Of lora_A; lora_B has lora.plus_ratio times it.")
    bank: float | None = Field(default=None, gt=0, description="Of the experts.")
    router: float | None = Field(default=None, gt=0, description="Of the routers.")


class BadLossConfig(StageConfig):
    """What becomes of a step whose loss or gradient is not finite, or far above what is usual.  Its gradient is never applied."""

    policy: Literal["stop", "skip"] = Field(
        default="stop", description="stop: end the run with a sentence. skip: go on with the next blocks; weights stay as they were."
    )
    max_skips: int = Field(default=3, ge=1, description="Steps in a row that skip may leave out before the run ends.")
    explosion_factor: float | None = Field(
        default=None, gt=1, description="A loss over so many times the median of the last steps is bad, too. null: only what is not finite."
    )
    norm_explosion_factor: float | None = Field(default=None, gt=1, description="The same for the norm of the gradient.")
    window: int = Field(default=50, ge=8, description="Steps of that median.")


class TrainConfig(StageConfig):
    """One training run.  World size and ZeRO stage are not here: they change the order of sums only."""

    method: Method = Field(
        default="pesc",
        description="pesc: bank + router + LoRA. qlora: LoRA alone on the dense model, the control. "
        "lora: the same, never quantised. upcycle-full: every expert a whole copy of the dense FFN, everything trained.",
    )
    quantization: Literal["nf4", "none"] = Field(
        default="nf4", description="nf4: 4-bit base with double quantisation. none: the only choice of methods lora and upcycle-full."
    )
    compute_dtype: Literal["bfloat16", "float32"] = Field(
        default="bfloat16", description="Of the computation, and of what is trained. float32: for CPUs without bf16 instructions."
    )
    lora: LoraConfig = Field(default_factory=LoraConfig)
    balance: BalanceConfig = Field(default_factory=BalanceConfig)
    learning_rate: float = Field(default=2e-4, gt=0, description="After the warm-up, of every part that learning_rates does not name.")
    learning_rates: LearningRates = Field(default_factory=LearningRates)
    schedule: Literal["constant_with_warmup", "linear", "cosine"] = Field(
        default="constant_with_warmup", description="How the learning rate goes on after the warm-up: linear and cosine fall to 0."
    )
    warmup_ratio: float = Field(default=0.03, ge=0, lt=1, description="Share of the optimizer steps spent warming up.")
    weight_decay: float = Field(default=0.0, ge=0, description="AdamW's, a step and unit of the learning rate.")
    max_grad_norm: float = Field(default=0.3, gt=0, description="A longer gradient is cut to this length.")
    optimizer: Literal["paged_adamw_8bit", "paged_adamw_32bit", "adamw_torch", "adamw_torch_fused"] = Field(
        default="paged_adamw_8bit", description="AdamW; 8bit: a quarter of the memory for its states; paged: they may leave a full GPU."
    )
    epochs: float = Field(default=1.0, gt=0, description="How often the mixture is gone through.")
    max_steps: int | None = Field(default=None, gt=0, description="Stop after this many optimizer steps, whatever epochs says.")
    global_batch_size: int = Field(default=128, ge=1, description="Packed blocks in one optimizer step, over all ranks.")
    micro_batch_size: int = Field(default=1, ge=1, description="Packed blocks in one forward pass of one rank.")
    bad_loss: BadLossConfig = Field(default_factory=BadLossConfig)
    seed: int = Field(default=42, ge=0, description="Data order and dropout.")
    evaluate_every_steps: int | None = Field(
        default=None,
        ge=1,
        description="Optimizer steps between looks at the held-out loss. Default: a tenth of the run; also at start and end.",
    )
    evaluate_blocks: int = Field(default=16, ge=0, description="Held-out blocks of each domain that a look reads, at most; 0: no looks.")

    @model_validator(mode="before")
    @classmethod
    def _some_methods_are_not_quantized(cls, fields: Any) -> Any:
        if isinstance(fields, dict) and fields.get("method") in UNQUANTIZED:
            return {"quantization": "none"} | fields
        return fields

    @model_validator(mode="after")
    def _method_fits(self) -> TrainConfig:
        if self.method in UNQUANTIZED and self.quantization != "none":
            qlora = ", or use method qlora" if self.method == "lora" else ""
            raise ValueError(f"method {self.method} trains on weights that are not quantised: set quantization to none{qlora}")
        if self.method == "upcycle-full" and (self.balance.kind == "bias" or self.balance.jitter):
            raise ValueError(
                "method upcycle-full is a Mixtral, whose routers have no bias to select with and whose jitter reaches the experts too: set "
                "balance.kind to switch or none, and balance.jitter to 0"
            )
        return self

    @model_validator(mode="after")
    def _batch_divides(self) -> TrainConfig:
        if self.global_batch_size % self.micro_batch_size:
            raise ValueError(
                f"global_batch_size ({self.global_batch_size}) must be a multiple of micro_batch_size ({self.micro_batch_size})"
            )
        return self


def full_rates(config: TrainConfig) -> dict[str, float]:
    """Part -> its learning rate after the warm-up and before any decay."""
    own, plain = config.learning_rates, config.learning_rate
    lora = own.lora or plain
    return {
        "lora_A": lora,
        "lora_B": lora * config.lora.plus_ratio,
        "bank": own.bank or plain,
        "router": own.router or plain,
        "dense": plain,
    }
