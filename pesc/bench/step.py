"""A training step of PESC against the dense control's: one process, one packed batch, the arms in turn.

    pesc bench step --shape 7b --adapter-dim 64,512 --sequence 2048 --dtype bfloat16
    pesc bench step --model DIR --layers 6

T tokens, H hidden, E experts, K active experts, R adapter width, V vocabulary, S supervised tokens.  A step is forward, loss (as in
training: chunked over the vocabulary, with the balance loss), backward and AdamW over an NF4 base with LoRA; medians count.

    FLOPs a token = 4·P + 6·(LoRA + router + K·2·H·R) + 3.5·4·L·d·(Σ row²/2)/T + 4·V·H·S/T      (full recompute: + another forward)

P the frozen projections, d the attention's width, L layers.  "FLOPs alone" is the ratio of these: what the adapters would cost if everything
ran at the dense model's speed.  Peak memory is that of an arm alone: what the others keep is taken off.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch

from pesc.bench.models import base_model, widened
from pesc.bench.profile import Memory, share_by_part, wait
from pesc.moe.balance import RouterRecorder
from pesc.moe.config import PescConfig
from pesc.moe.layer import sparse_parameters
from pesc.moe.tuning import export_choices
from pesc.stage import RECOMPUTED

DENSE = 0
"""The adapter width that stands for the dense control."""


@dataclass(frozen=True)
class StepSettings:
    """What is measured."""

    model: Path | None = None
    shape: str = "smollm2-135m"
    layers: int | None = None
    adapter_dims: tuple[int, ...] = (64, 512)
    experts: int = 8
    top_k: int = 2
    sequence: int = 2048
    micro_batch: int = 1
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    checkpointing: str = "none"
    rounds: int = 5


@dataclass(frozen=True)
class ArmTimes:
    """One arm.  adapter_dim: 0 for the dense control; flops: of a token; parts: shares of the time."""

    adapter_dim: int
    seconds: float
    tokens_per_second: float
    ratio: float
    flops_ratio: float
    peak_bytes: int
    loss: float
    dispatch: str
    parts: dict[str, float]


@dataclass(frozen=True)
class StepTimes:
    """All of a run."""

    settings: StepSettings
    device: str
    threads: int
    tokens: int
    arms: tuple[ArmTimes, ...]

    def arm(self, adapter_dim: int) -> ArmTimes:
        """The arm of a width; 0: the dense control."""
        return next(arm for arm in self.arms if arm.adapter_dim == adapter_dim)


@dataclass
class Arm:
    """A model ready to be trained."""

    adapter_dim: int
    model: Any
    optimizer: torch.optim.Optimizer
    head: Any
    recorder: RouterRecorder | None
    seconds: list[float] = field(default_factory=list)
    peaks: list[int] = field(default_factory=list)
    loss: float = 0.0

    @property
    def own_bytes(self) -> int:
        """What this arm alone keeps between steps: trained weights and the optimizer's states, without paged ones (no memory of torch's)."""
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        states = [
            value
            for state in self.optimizer.state.values()
            for value in state.values()
            if isinstance(value, torch.Tensor) and not getattr(value, "is_paged", False)
        ]
        return sum(tensor.numel() * tensor.element_size() for tensor in (*trained, *states))


def measure_step(settings: StepSettings) -> StepTimes:
    """Train the dense control and each width in turn on the same batch.  Raises RecipeError, ModelError for what cannot be built."""
    arms = _make_arms(settings)
    batch = packed_batch(arms[0].model.config.vocab_size, settings)
    memory = Memory(settings.device)
    for turn in range(settings.rounds + 1):
        for arm in arms[turn % len(arms) :] + arms[: turn % len(arms)]:  # nobody is always the first
            memory.start()
            seconds = run_step(arm, [batch], settings.device)
            if turn:  # the first warms up, and makes the optimizer's states
                arm.seconds.append(seconds)
                arm.peaks.append(memory.peak() - sum(other.own_bytes for other in arms if other is not arm))
            arm.optimizer.zero_grad(set_to_none=True)  # not in the next arm's peak
    flops = [flops_per_token(arm, batch, settings) for arm in arms]
    rows = []
    for arm, arm_flops in zip(arms, flops, strict=True):
        seconds = median(arm.seconds)
        parts = share_by_part(arm.model, lambda arm=arm: run_step(arm, [batch], settings.device), arm.optimizer, settings.device)
        rows.append(
            ArmTimes(
                arm.adapter_dim, seconds, batch["tokens"] / seconds, median_ratio(arm, arms[0]), arm_flops / flops[0], max(arm.peaks), arm.loss,
                _dispatch(arm.adapter_dim), parts,
            )
        )  # fmt: skip
    name = torch.cuda.get_device_name() if settings.device.startswith("cuda") else settings.device
    return StepTimes(settings, name, torch.get_num_threads(), batch["tokens"], tuple(rows))


def _make_arms(settings: StepSettings) -> list[Arm]:
    base = base_model(settings.model, settings.shape, settings.layers, settings.dtype, settings.device)
    base.requires_grad_(False)
    sparse = [widened(base, PescConfig(settings.experts, settings.top_k, width)) for width in settings.adapter_dims]
    return [make_arm(model, width, settings) for model, width in zip([base, *sparse], (DENSE, *settings.adapter_dims), strict=True)]


def make_arm(model: Any, adapter_dim: int, settings: StepSettings) -> Arm:
    """LoRA on the projections, bank and router in full, and an optimizer, as `train` makes them."""
    from peft import get_peft_model

    from pesc.train.config import TrainConfig
    from pesc.train.head import LossHead
    from pesc.train.modeling import checkpoint_activations, peft_config
    from pesc.train.optimizer import make_optimizer

    config = TrainConfig(optimizer="paged_adamw_8bit" if settings.device.startswith("cuda") else "adamw_torch")
    checkpoint_activations(model, settings.checkpointing)
    head = LossHead.of(model)
    torch.manual_seed(0)
    wrapped = get_peft_model(model, peft_config(config), autocast_adapter_dtype=False)
    for _, parameter in sparse_parameters(wrapped):
        parameter.requires_grad_(True)
    trained = [(name, parameter) for name, parameter in wrapped.named_parameters() if parameter.requires_grad]
    for _, parameter in trained:
        parameter.data = parameter.data.to(settings.dtype)
    optimizer = make_optimizer(config, trained, settings.device.partition(":")[0])
    return Arm(adapter_dim, wrapped.train(), optimizer, head, RouterRecorder(wrapped) if adapter_dim else None)


def packed_batch(vocabulary: int, settings: StepSettings) -> dict[str, Any]:
    """Blocks of random rows of 64 to 900 tokens, each three quarters supervised."""
    import numpy as np

    from pesc.train.collator import NO_LOSS, Collator

    random = np.random.default_rng(0)
    items, rows = [], []
    for _ in range(settings.micro_batch):
        left, lengths = settings.sequence, []
        while left:
            lengths.append(min(left, int(random.integers(64, 900))))
            left -= lengths[-1]
        positions = np.concatenate([np.arange(length) for length in lengths])
        ids = random.integers(vocabulary, size=settings.sequence)
        starts = np.repeat([length // 4 for length in lengths], lengths)
        items.append({"input_ids": ids, "labels": np.where(positions < starts, NO_LOSS, ids), "position_ids": positions, "position": 0})
        rows += lengths
    return {**Collator(flatten=uses_flash(settings.device))(items), "row_lengths": rows}


def uses_flash(device: str) -> bool:
    """Whether packed blocks are read one behind the other."""
    from pesc.train.modeling import pick_attention

    return pick_attention(device) == "flash_attention_2"


def run_step(arm: Arm, batches: Sequence[dict[str, Any]], device: str) -> float:
    """Seconds of one optimizer step over some micro-batches; the arm's `loss` is then the mean over their supervised tokens."""
    from pesc.train.head import batch_cross_entropy

    moved = [_moved(batch, device) for batch in batches]
    share = torch.full((), 1 / max(1, sum(batch["supervised"] for batch in batches)), device=device)
    torch.manual_seed(0)
    wait(device)
    started = time.perf_counter()
    arm.optimizer.zero_grad(set_to_none=True)
    losses = []
    for batch in moved:
        if arm.recorder is None:
            loss = total = batch_cross_entropy(arm.model, arm.head, batch, share)
        else:
            with arm.recorder:
                loss = batch_cross_entropy(arm.model, arm.head, batch, share)
            total = loss + 0.01 * arm.recorder.balance_loss(batch["valid"]) / len(moved)
            arm.recorder.clear()
        total.backward()
        losses.append(loss.detach())
    arm.optimizer.step()
    wait(device)
    seconds = time.perf_counter() - started
    arm.loss = torch.stack(losses).double().sum().item()
    return seconds


def _moved(batch: dict[str, Any], device: str) -> dict[str, Any]:
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


def flops_per_token(arm: Arm, batch: dict[str, Any], settings: StepSettings) -> float:
    """See the module's head."""
    from pesc.train.flops import cost_of_token

    config, tokens, again = arm.model.config, batch["tokens"], RECOMPUTED[settings.checkpointing]
    maps = cost_of_token(arm.model, settings.top_k, settings.experts, again).hardware
    width = config.num_attention_heads * (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    attention = 4 * config.num_hidden_layers * width * sum(length**2 / 2 for length in batch["row_lengths"]) / tokens
    vocabulary = 4 * config.vocab_size * config.hidden_size * batch["supervised"] / tokens
    return maps + (3.5 + again) * attention + vocabulary


def median_ratio(arm: Arm, control: Arm) -> float:
    """Of the turns' ratios, so that a machine whose speed drifts moves both sides of each."""
    return median([mine / other for mine, other in zip(arm.seconds, control.seconds, strict=True)])


def _dispatch(adapter_dim: int) -> str:
    return next((c["path"] for c in reversed(export_choices()) if c["adapter_dim"] == adapter_dim and c["gradients"]), "")


def render(times: StepTimes) -> str:
    """The table, a line an arm, and where the time goes."""
    settings = times.settings
    name = str(settings.model) if settings.model is not None else f"{settings.shape} (random weights)"
    layers = f", {settings.layers} layers" if settings.layers else ""
    lines = [
        f"{name}{layers}, NF4, {str(settings.dtype).removeprefix('torch.')} on {times.device} with {times.threads} threads; "
        f"{times.tokens} packed tokens, E={settings.experts} K={settings.top_k}, checkpointing {settings.checkpointing}",
        f"{'arm':<13}{'ms':>9}{'tokens/s':>10}{'ratio':>7}{'FLOPs alone':>13}{'peak MB':>9}  dispatch",
    ]
    for arm in times.arms:
        label = f"PESC R={arm.adapter_dim}" if arm.adapter_dim else "dense"
        lines.append(
            f"{label:<13}{arm.seconds * 1e3:>9.1f}{arm.tokens_per_second:>10.0f}{arm.ratio:>7.3f}{arm.flops_ratio:>13.3f}"
            f"{arm.peak_bytes / 1e6:>9.0f}  {arm.dispatch}"
        )
    lines.append("share of a step's time")
    names: Sequence[str] = list(times.arms[0].parts)
    lines.append(f"{'arm':<13}" + "".join(f"{name:>13}" for name in names))
    for arm in times.arms:
        label = f"PESC R={arm.adapter_dim}" if arm.adapter_dim else "dense"
        lines.append(f"{label:<13}" + "".join(f"{arm.parts[name]:>13.1%}" for name in names))
    return "\n".join(lines)
