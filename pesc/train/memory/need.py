"""All that one GPU needs for a run, what fits into it, and which settings make the most of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from pesc.moe.config import PescConfig
from pesc.train.config import TrainConfig
from pesc.train.deepspeed import BUCKET
from pesc.train.memory.activations import ActivationBytes, Batch, activation_bytes
from pesc.train.memory.shapes import ModelShape
from pesc.train.memory.states import StateBytes, base_bytes, dtype_bytes, state_bytes
from pesc.train.memory.trained import TrainedTensor, trained_tensors

CONTEXT_BYTES = 600_000_000
"""Allowance for the CUDA context and the libraries' workspaces."""
NCCL_BYTES = 500_000_000
"""Allowance for NCCL's channels, with more than one rank."""
FRAGMENTATION = 0.04
"""Share of the device's memory that the allocator cannot use, an allowance."""
POLICIES = ("none", "selective", "full")


@dataclass(frozen=True)
class Layout:
    """How a run is laid out: what `recommend` chooses."""

    ranks: int
    zero_stage: int
    checkpointing: str
    micro_batch: int


@dataclass(frozen=True)
class Run:
    """What is trained, whatever the layout."""

    shape: ModelShape
    block: PescConfig | None
    config: TrainConfig
    sequence: int
    device: str = "cuda"
    flash: bool = False

    @property
    def tensors(self) -> tuple[TrainedTensor, ...]:
        """What is trained.  Raises ModelError for a LoRA target that is not there."""
        return trained_tensors(self.shape, self.block, self.config)


@dataclass(frozen=True)
class Need:
    """Bytes of one GPU."""

    states: StateBytes
    activations: ActivationBytes
    step: int
    """Temporary, while the optimizer steps: activations are gone by then."""
    buckets: int
    """Buffers of DeepSpeed."""
    loading: int
    """Before training: every rank loads the whole model, also what ZeRO-3 shards afterwards."""
    allowance: int
    """CUDA context, NCCL."""

    @property
    def tensors(self) -> int:
        """Peak of what torch allocates."""
        return max(self.loading, self._training)

    @property
    def _training(self) -> int:
        return self.states.total + self.buckets + max(self.activations.total, self.step)

    @property
    def total(self) -> int:
        """Peak with the allowances."""
        return self.tensors + self.allowance

    def groups(self) -> dict[str, int]:
        """By group, in the order of a table; they add up to `total`."""
        states, activations = self.states, self.activations
        named = {"base": states.base, **states.trained, "masters": states.masters + states.padding, "gradients": states.gradients}
        named |= {"optimizer": states.optimizer, "activations": activations.layers}
        named["logits" if activations.logits >= activations.workspace else "workspace"] = activations.total - activations.layers
        named["optimizer step"] = max(0, self.step - activations.total)
        named |= {"buckets": self.buckets, "while loading": max(0, self.loading - self._training), "CUDA and NCCL": self.allowance}
        return {name: size for name, size in named.items() if size}


def need_of(run: Run, layout: Layout) -> Need:
    """The peak of one rank.  Raises ModelError for a LoRA target that is not there."""
    tensors = run.tensors
    return _need(run, layout, state_bytes(run.shape, tensors, run.config, layout.zero_stage, layout.ranks))


def _need(run: Run, layout: Layout, states: StateBytes) -> Need:
    batch = Batch(layout.micro_batch, run.sequence, run.device, run.flash)
    activations = activation_bytes(run.shape, run.block, run.config, batch, layout.checkpointing)
    is_cuda = run.device == "cuda"
    allowance = (CONTEXT_BYTES + (NCCL_BYTES if layout.ranks > 1 else 0)) if is_cuda else 0
    whole = base_bytes(run.shape, run.config) + dtype_bytes(run.config) * sum(tensor.numel for tensor in run.tensors)
    return Need(states, activations, _step_bytes(run, layout, states), _bucket_bytes(run, layout), whole, allowance)


def _step_bytes(run: Run, layout: Layout, states: StateBytes) -> int:
    """Torch's AdamW (not fused) works through lists of temporaries; ZeRO-3 flattens its gradients into a copy."""
    parts = states.masters or states.gradients
    lists = 2 * parts if run.config.optimizer == "adamw_torch" else 0
    return lists + (parts if layout.zero_stage == 3 else 0)


def _bucket_bytes(run: Run, layout: Layout) -> int:
    """Gradients on their way (two buckets, so that they overlap), and under ZeRO-3 what is gathered ahead and for the layer at work."""
    bucket = BUCKET * dtype_bytes(run.config)
    if layout.zero_stage < 2:
        return 0
    if layout.zero_stage == 2:
        return 2 * bucket
    embedding = run.shape.vocab * run.shape.hidden * dtype_bytes(run.config)
    return 2 * bucket + max(bucket, embedding) * (1 if layout.ranks > 1 else 0)


def largest_micro_batch(run: Run, layout: Layout, memory: int) -> int:
    """The most blocks whose peak is at most `memory` bytes, among those that divide a rank's share of the global batch; 0: none."""
    states = state_bytes(run.shape, run.tensors, run.config, layout.zero_stage, layout.ranks)
    return next(
        (
            blocks
            for blocks in micro_batches(run.config.global_batch_size, layout.ranks)
            if _need(run, replace(layout, micro_batch=blocks), states).total <= memory
        ),
        0,
    )


def micro_batches(global_batch: int, ranks: int) -> list[int]:
    """Micro-batches that share a global batch evenly, the largest first; empty when the ranks cannot share it."""
    if global_batch % ranks:
        return []
    share = global_batch // ranks
    return [blocks for blocks in range(share, 0, -1) if share % blocks == 0]


def usable_bytes(memory: int) -> int:
    """Of a device's memory, what a run can plan with."""
    return int(memory * (1 - FRAGMENTATION))


def fitting_layouts(run: Run, ranks: int, memory: int, stages: tuple[int, ...] = (2, 3)) -> Iterator[Layout]:
    """Each ZeRO stage and checkpointing policy that fits, with its largest micro-batch; the quickest to work with first."""
    for stage in stages:
        for policy in POLICIES:
            layout = Layout(ranks, stage, policy, 1)
            if blocks := largest_micro_batch(run, layout, memory):
                yield replace(layout, micro_batch=blocks)


def smallest_need(run: Run, ranks: int) -> Need:
    """The least that this many ranks can do with: ZeRO-2 or 3, full checkpointing, one block at a time."""
    return min((need_of(run, Layout(ranks, stage, "full", 1)) for stage in (2, 3)), key=lambda need: need.total)
