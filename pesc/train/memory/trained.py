"""What is trained, tensor by tensor: LoRA on the projections, the bank and the routers in full.

E experts, R adapter width, H hidden, r LoRA rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pesc.errors import ModelError
from pesc.moe.config import PescConfig
from pesc.train.config import TrainConfig, full_rates
from pesc.train.memory.shapes import ModelShape


@dataclass(frozen=True)
class TrainedTensor:
    """One parameter that the optimizer updates."""

    group: str
    """lora, bank, router or dense."""
    numel: int
    part: str
    """What its learning rate goes by: lora_A, lora_B, bank, router or dense."""


def trained_tensors(shape: ModelShape, block: PescConfig | None, config: TrainConfig) -> tuple[TrainedTensor, ...]:
    """In the model's order.  block: the sparse layers' shape; None for the dense control.

    Raises ModelError for a LoRA target that the model does not have.
    """
    if config.method == "upcycle-full":
        return tuple(_of_whole_model(shape, block.num_experts if block else 1))
    if missing := [name for name in config.lora.targets if name not in shape.projections]:
        raise ModelError(
            f"lora.targets names {missing[0]!r}, but the model has no such projection; there are: {', '.join(shape.projections)}."
        )
    return tuple(tensor for layer in range(shape.layers) for tensor in _of_layer(shape, block, config, layer))


def _of_layer(shape: ModelShape, block: PescConfig | None, config: TrainConfig, layer: int) -> Iterator[TrainedTensor]:
    rank = config.lora.rank
    for name, (inputs, outputs) in shape.projections.items():
        if name in config.lora.targets:
            yield TrainedTensor("lora", rank * inputs, "lora_A")
            yield TrainedTensor("lora", outputs * rank, "lora_B")
    experts = block.experts_of(layer) if block else 0
    if not block or not experts:
        return
    yield TrainedTensor("router", experts * shape.hidden, "router")
    for _ in ("down", "up"):
        yield TrainedTensor("bank", experts * block.adapter_dim * shape.hidden, "bank")
    if block.shared_adapter_dim:
        for _ in ("shared_down", "shared_up"):
            yield TrainedTensor("bank", block.shared_adapter_dim * shape.hidden, "bank")


def _of_whole_model(shape: ModelShape, experts: int) -> Iterator[TrainedTensor]:
    """A Mixtral: attention, norms and embeddings, and each layer's FFNs stacked in two tensors."""
    attention = [
        inputs * outputs for name, (inputs, outputs) in shape.projections.items() if name in ("q_proj", "k_proj", "v_proj", "o_proj")
    ]
    for _ in range(shape.layers):
        yield from (TrainedTensor("dense", numel, "dense") for numel in attention)
        yield TrainedTensor("router", experts * shape.hidden, "router")
        yield TrainedTensor("bank", experts * 2 * shape.ffn * shape.hidden, "bank")
        yield TrainedTensor("bank", experts * shape.hidden * shape.ffn, "bank")
    yield from (TrainedTensor("dense", numel, "dense") for numel in shape.other_sizes)


def count_parameters(tensors: tuple[TrainedTensor, ...]) -> dict[str, int]:
    """Parameters of each group."""
    counts: dict[str, int] = {}
    for tensor in tensors:
        counts[tensor.group] = counts.get(tensor.group, 0) + tensor.numel
    return counts


def sizes_by_rate(tensors: tuple[TrainedTensor, ...], config: TrainConfig) -> list[list[int]]:
    """Sizes of the optimizer's groups: one a learning rate, as `pesc.train.optimizer.group_by_rate` makes them."""
    rates, groups = full_rates(config), dict[float, list[int]]()
    for tensor in tensors:
        groups.setdefault(rates[tensor.part], []).append(tensor.numel)
    return list(groups.values())
