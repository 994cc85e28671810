"""Bytes that one rank holds all the time: weights, masters, gradients, optimizer states.

n elements of a tensor, P trained parameters, N ranks; b bytes of the compute dtype.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pesc.errors import RecipeError
from pesc.train.config import TrainConfig
from pesc.train.memory.shapes import ModelShape
from pesc.train.memory.trained import TrainedTensor, count_parameters, sizes_by_rate

_NF4_BLOCK, _STATE_BLOCK = 64, 256
_MIN_8BIT = 4096
"""Elements below which bitsandbytes keeps fp32 states."""


@dataclass(frozen=True)
class StateBytes:
    """Bytes of one rank under ZeRO 0, 1 or 2."""

    base: int
    """The frozen model."""
    trained: dict[str, int]
    """Weights in the compute dtype: lora, router, bank."""
    padding: int
    """Of the flat buffer that ZeRO 1 and 2 keep the trained weights in."""
    masters: int
    """fp32 copy of the trained weights (this rank's part)."""
    gradients: int
    """As they are accumulated, over a whole step."""
    optimizer: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.base + sum(self.trained.values()) + self.padding + self.masters + self.gradients + self.optimizer


def dtype_bytes(config: TrainConfig) -> int:
    """Bytes of a number in the compute dtype."""
    return 2 if config.compute_dtype == "bfloat16" else 4


def nf4_bytes(numel: int) -> int:
    """One weight in NF4 with double quantisation: packed halves of a byte; an 8-bit scale for 64 weights; an fp32 scale for 256 of those;
    the two code books (16 and 256 fp32) and the fp32 mean, which each weight has of its own."""
    blocks = _ceil(numel, _NF4_BLOCK)
    return numel // 2 + blocks + 4 * _ceil(blocks, _STATE_BLOCK) + 4 * (16 + 256 + 1)


def base_bytes(shape: ModelShape, config: TrainConfig) -> int:
    """The frozen model: projections in NF4 or the compute dtype; embeddings, output projection, norms, biases in the compute dtype."""
    size = dtype_bytes(config)
    rest = size * (shape.parameters - shape.linear_parameters)
    if config.quantization == "none":
        return rest + size * shape.linear_parameters
    return rest + shape.layers * sum(nf4_bytes(inputs * outputs) for inputs, outputs in shape.projections.values())


def optimizer_bytes(config: TrainConfig, sizes: Iterable[int]) -> int:
    """Both moments of tensors of these sizes.  8-bit: a byte each, an fp32 scale for 256, and two maps of 256 fp32 that all share."""
    sizes = list(sizes)
    if config.optimizer in ("adamw_torch", "adamw_torch_fused"):
        return sum(8 * size + 4 for size in sizes)  # the step is a tensor too
    if config.optimizer == "paged_adamw_32bit":
        return sum(8 * size for size in sizes)
    large = [size for size in sizes if size >= _MIN_8BIT]
    small = sum(8 * size for size in sizes if size < _MIN_8BIT)
    return small + sum(2 * size + 8 * _ceil(size, _STATE_BLOCK) for size in large) + (2 * 256 * 4 if large else 0)


def partition_size(parameters: int, ranks: int) -> int:
    """Elements of a rank's part of one optimizer group's flat buffer under ZeRO 1 and 2: P rounded up to a multiple of 2·N, over N."""
    return 2 * _ceil(parameters, 2 * ranks)


def state_bytes(shape: ModelShape, tensors: tuple[TrainedTensor, ...], config: TrainConfig, zero_stage: int, ranks: int) -> StateBytes:
    """What one rank holds.

    bf16: ZeRO 0 keeps bf16 gradients; 1 whole fp32 gradients, padded like the weights; 2 this rank's part in fp32.  fp32: ZeRO 0 has no
    masters.  Raises RecipeError for ZeRO-3, and for fp32 under ZeRO 1 and 2, whose layouts are not modelled.
    """
    size, counts = dtype_bytes(config), count_parameters(tensors)
    sizes = [tensor.numel for tensor in tensors]
    parameters = sum(sizes)
    if zero_stage == 3 or (zero_stage and size == 4):
        raise RecipeError(
            f"The memory of ZeRO-{zero_stage} with {config.compute_dtype} is not modelled: use bfloat16 and execution.zero_stage 0, 1 or 2."
        )
    weights = {group: size * count for group, count in counts.items()}
    base = base_bytes(shape, config)
    if not zero_stage:
        masters = 4 * parameters if size == 2 else 0
        return StateBytes(base, weights, 0, masters, size * parameters, optimizer_bytes(config, sizes))
    parts = [partition_size(sum(group), ranks) for group in sizes_by_rate(tensors, config)]
    held = sum(parts)
    gradients = 4 * held * (ranks if zero_stage == 1 else 1)
    return StateBytes(base, weights, size * (held * ranks - parameters), 4 * held, gradients, optimizer_bytes(config, parts))


def _ceil(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)
