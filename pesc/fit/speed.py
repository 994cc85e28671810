"""How fast and how dear: FLOPs of a token, a range of tokens a second, hours and cost.

    FLOPs a token = (4 + 2·c)·P + (6 + 2·c)·trained + (3.5 + c)·4·L·A·row/2 + 4·V·H·s        as `pesc bench step` counts them

P frozen projections, c the recomputed share of the layers, L layers, A attention width, row the mean length of a packed row, s the
supervised share.  Trained: LoRA, router, and K of the bank's E adapters.
"""

from __future__ import annotations

from dataclasses import dataclass

from pesc.devices import Device
from pesc.stage import RECOMPUTED
from pesc.train.memory.need import Layout, Run
from pesc.train.memory.states import dtype_bytes
from pesc.train.memory.trained import count_parameters

UTILISATION = (0.25, 0.45)
"""Share of the peak rate that a training step is assumed to reach, recomputation counted; none of it is measured.  Published: LoRA of 8B on an
H100 41 %, of 32B and 70B on eight 30 to 32 %."""
DEQUANTISATION = 0.5
"""Share of the memory's bandwidth that unpacking NF4 is assumed to reach."""
BETWEEN_NODES, NODE = 0.92, 8
"""Published share of the rate that is left beyond one node of eight GPUs."""
ROW_TOKENS, SUPERVISED = 400, 0.6
"""Mean tokens of a row, and the share of them that is learned, where the data is not tokenized yet."""


@dataclass(frozen=True)
class Speed:
    """Ranges, low to high."""

    tokens_per_second: tuple[float, float]
    """Of all GPUs together."""
    hours: tuple[float, float]
    dollars: tuple[float, float]


def flops_per_token(run: Run, checkpointing: str) -> float:
    """See the module's head."""
    shape, counts, again = run.shape, count_parameters(run.tensors), RECOMPUTED[checkpointing]
    active = counts.get("lora", 0) + counts.get("router", 0) + counts.get("dense", 0)
    if run.block and (bank := counts.get("bank", 0)):
        everyone = 2 * run.block.shared_adapter_dim * shape.hidden * shape.layers
        active += everyone + (bank - everyone) * run.block.top_k / run.block.num_experts
    if run.config.method == "upcycle-full":
        active -= shape.embedding_parameters
        frozen, vocabulary = 0, 6 * shape.vocab * shape.hidden * SUPERVISED
    else:
        frozen, vocabulary = shape.linear_parameters, 4 * shape.vocab * shape.hidden * SUPERVISED
    attention = 4 * shape.layers * shape.heads * shape.head_dim * min(ROW_TOKENS, run.sequence) / 2
    return (4 + 2 * again) * frozen + (6 + 2 * again) * active + (3.5 + again) * attention + vocabulary


def seconds_per_micro_batch(run: Run, layout: Layout, device: Device, utilisation: float) -> float:
    """One micro-batch of one GPU: its FLOPs, and the base out of NF4 once a pass."""
    tokens = layout.micro_batch * run.sequence
    computing = tokens * flops_per_token(run, layout.checkpointing) / (device.tflops * 1e12 * utilisation)
    passes = 2 + RECOMPUTED[layout.checkpointing]
    unpacked = run.shape.linear_parameters * (0.516 + dtype_bytes(run.config)) if run.config.quantization == "nf4" else 0
    gathering = 0.0
    if layout.zero_stage == 3 and layout.ranks > 1:
        packed = run.shape.linear_parameters * (0.516 if run.config.quantization == "nf4" else dtype_bytes(run.config))
        gathering = passes * packed / (device.link * DEQUANTISATION)
    return computing + passes * unpacked / (device.bandwidth * DEQUANTISATION) + gathering


def tokens_per_second(run: Run, layout: Layout, device: Device) -> tuple[float, float]:
    """All GPUs together, by the low and the high end of `UTILISATION`."""
    scale = layout.ranks * (BETWEEN_NODES if layout.ranks > NODE else 1.0)
    tokens = layout.micro_batch * run.sequence
    low, high = (scale * tokens / seconds_per_micro_batch(run, layout, device, share) for share in UTILISATION)
    return low, high


def speed_of(run: Run, layout: Layout, device: Device, tokens: int, measured: float | None = None, price: float | None = None) -> Speed:
    """Of a run over so many tokens.  measured: tokens a second of all GPUs; price: dollars a GPU and hour."""
    low, high = (measured, measured) if measured else tokens_per_second(run, layout, device)
    cheap, dear = (price, price) if price is not None else device.price
    hours = (tokens / high / 3600, tokens / low / 3600)
    return Speed((low, high), hours, (hours[0] * layout.ranks * cheap, hours[1] * layout.ranks * dear))
