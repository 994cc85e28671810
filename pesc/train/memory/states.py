"""Bytes that one rank holds all the time: weights, masters, gradients, optimizer states.

n elements of a tensor, P trained parameters, N ranks; b bytes of the compute dtype.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from pesc.train.config import TrainConfig
from pesc.train.deepspeed import PERSISTENT
from pesc.train.memory.shapes import ModelShape
from pesc.train.memory.trained import TrainedTensor, count_parameters, sizes_by_rate

_NF4_BLOCK, _STATE_BLOCK = 64, 256
_MIN_8BIT = 4096
"""Elements below which bitsandbytes keeps fp32 states."""
_SUB_GROUP = 10**9


@dataclass(frozen=True)
class StateBytes:
    """Bytes of one rank."""

    base: int
    """The frozen model."""
    trained: dict[str, int]
    """Weights in the compute dtype: lora, router, bank, dense."""
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


def frozen_tensors(shape: ModelShape, config: TrainConfig) -> Iterator[tuple[int, int]]:
    """(elements in the compute dtype, bytes beside them) of each frozen parameter; NF4 packs weights into elements of the compute dtype."""
    size = dtype_bytes(config)
    for name, (inputs, outputs) in shape.projections.items() if config.method != "upcycle-full" else ():
        numel = inputs * outputs
        packed = (numel // 2 // size, nf4_bytes(numel) - numel // 2) if config.quantization == "nf4" else (numel, 0)
        yield from [packed] * shape.layers
        if name in shape.biases:
            yield from [(outputs, 0)] * shape.layers
    if config.method != "upcycle-full":
        yield from ((numel, 0) for numel in shape.other_sizes)


def base_bytes(shape: ModelShape, config: TrainConfig) -> int:
    """The frozen model: projections in NF4 or the compute dtype; embeddings, output projection, norms, biases in the compute dtype."""
    return sum(dtype_bytes(config) * elements + beside for elements, beside in frozen_tensors(shape, config))


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

    bf16: ZeRO 0 keeps bf16 gradients; 1 those, and their sum over the step in fp32, padded like the weights; 2 and 3
    this rank's part in fp32.  fp32: ZeRO 0 has no masters, 1 keeps whole gradients.
    """
    if zero_stage == 3:
        return _sharded_bytes(shape, tensors, config, ranks)
    size, counts = dtype_bytes(config), count_parameters(tensors)
    parameters = sum(counts.values())
    weights = {group: size * count for group, count in counts.items()}
    base = base_bytes(shape, config)
    if not zero_stage:
        masters = 4 * parameters if size == 2 else 0
        return StateBytes(base, weights, 0, masters, size * parameters, optimizer_bytes(config, [tensor.numel for tensor in tensors]))
    parts = [partition_size(sum(group), ranks) for group in sizes_by_rate(tensors, config)]
    held = sum(parts)
    gradients = 4 * held
    if zero_stage == 1:
        gradients = size * parameters + (4 * held * ranks if size == 2 else 0)
    return StateBytes(base, weights, size * (held * ranks - parameters), 4 * held, gradients, optimizer_bytes(config, parts))


def _sharded_bytes(shape: ModelShape, tensors: tuple[TrainedTensor, ...], config: TrainConfig, ranks: int) -> StateBytes:
    """ZeRO-3: of every tensor, trained or frozen, this rank's part; those of at most `PERSISTENT` elements are kept gathered beside it."""
    size = dtype_bytes(config)

    def held(elements: int) -> int:
        part = _ceil(elements, ranks)
        return size * part * (1 + (ranks if elements <= PERSISTENT and ranks > 1 else 0))

    base = sum(held(elements) + beside for elements, beside in frozen_tensors(shape, config))
    weights: dict[str, int] = {}
    for tensor in tensors:
        weights[tensor.group] = weights.get(tensor.group, 0) + held(tensor.numel)
    parts = [part for group in sizes_by_rate(tensors, config) for part in _sub_groups(_ceil(numel, ranks) for numel in group)]
    return StateBytes(base, weights, 0, 4 * sum(parts), 4 * sum(parts), optimizer_bytes(config, parts))


def _sub_groups(sizes: Iterable[int]) -> Iterator[int]:
    """Sizes of the flat buffers that ZeRO-3 steps one after the other: full when they reach a thousand million elements."""
    filled = 0
    for size in sizes:
        filled += size
        if filled >= _SUB_GROUP:
            yield filled
            filled = 0
    if filled:
        yield filled


def _ceil(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)
