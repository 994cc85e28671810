"""What a micro-batch keeps for its backward pass, by formula: an estimate, unlike the bytes of weights and states.

T tokens of a micro-batch, S of a block, H hidden, F FFN width, A width of attention (heads · head_dim), R adapter width, b bytes of a number.

A layer keeps, for each token,
    norms        H in fp32 each, and the inverse root mean square
    attention    q, k, v and the result (k and v repeated to all heads), its log-sum-exp, its row of the mask [S]; flash attention: no mask
    FFN          gate, silu(gate), up
    LoRA         of each projection its input behind dropout, the dropout's mask, and r numbers
    router       its input; bank: y and three times the adapters' activations, all of them (dense) or of the chosen (grouped)
Checkpointing keeps a layer's input instead, and all of the above for the one layer that is being recomputed.
"""

from __future__ import annotations

from dataclasses import dataclass

from pesc.moe.config import PescConfig
from pesc.train.config import TrainConfig
from pesc.train.memory.shapes import ModelShape
from pesc.train.memory.states import dtype_bytes

CHUNK_ELEMENTS, LEAST_ROWS = 12 << 20, 32
"""Of the loss's chunks: `pesc.train.loss`."""
CHANGES_LOGITS = ("gemma2", "granite")


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank, and where it runs."""

    blocks: int
    sequence: int
    device: str = "cuda"
    """cuda or cpu; the CPU's dropout keeps a mask of the compute dtype, CUDA's one of bytes."""
    flash: bool = False

    @property
    def tokens(self) -> int:
        """T."""
        return self.blocks * self.sequence


@dataclass(frozen=True)
class ActivationBytes:
    """Peak of a forward and backward pass."""

    layers: int
    """Kept for the backward pass by all layers, and by the layer that is being recomputed."""
    logits: int
    """Chunk of the loss, and the gradient of the hidden states that it leaves."""
    workspace: int
    """One projection out of NF4, and the gradients on their way through a layer."""

    @property
    def total(self) -> int:
        """All of it; the loss's chunk is gone when the backward pass begins."""
        return self.layers + max(self.logits, self.workspace)


def activation_bytes(shape: ModelShape, block: PescConfig | None, config: TrainConfig, batch: Batch, checkpointing: str) -> ActivationBytes:
    """Of one micro-batch.  checkpointing: none, selective or full."""
    return ActivationBytes(
        kept_bytes(shape, block, config, batch, checkpointing) + recomputed_bytes(shape, block, config, batch, checkpointing),
        logits_bytes(shape, config, batch),
        _workspace(shape, config, batch),
    )


def kept_bytes(shape: ModelShape, block: PescConfig | None, config: TrainConfig, batch: Batch, checkpointing: str) -> int:
    """What is there when the forward pass has ended, without the loss's part."""
    inputs = batch.tokens * shape.hidden * dtype_bytes(config)
    total = 4 * batch.tokens * (shape.hidden + 1)  # the last norm
    total += inputs if config.method == "upcycle-full" else 0  # and its result, for its weight
    for layer in range(shape.layers):
        total += inputs if _is_checkpointed(layer, checkpointing) else _layer_bytes(shape, block, config, batch, layer)
    return total


def recomputed_bytes(shape: ModelShape, block: PescConfig | None, config: TrainConfig, batch: Batch, checkpointing: str) -> int:
    """The largest layer that the backward pass makes again."""
    layers = [layer for layer in range(shape.layers) if _is_checkpointed(layer, checkpointing)]
    return max((_layer_bytes(shape, block, config, batch, layer) for layer in layers), default=0)


def logits_bytes(shape: ModelShape, config: TrainConfig, batch: Batch) -> int:
    """A chunk of logits in the compute dtype and in fp32, its gradient, and the gradient of the hidden states, all positions supervised.

    Models that change their logits, and Mixtrals, have them whole, with their gradient.
    """
    size = dtype_bytes(config)
    rows = min(batch.tokens, max(LEAST_ROWS, CHUNK_ELEMENTS // shape.vocab))
    chunk = rows * shape.vocab * (4 + 2 * size) + 2 * batch.tokens * shape.hidden * size
    is_whole = config.method == "upcycle-full" or shape.model_type in CHANGES_LOGITS
    return chunk + (3 * batch.tokens * shape.vocab * size if is_whole else 0)


def _is_checkpointed(layer: int, policy: str) -> bool:
    return policy == "full" or (policy == "selective" and layer % 2 == 0)


def _layer_bytes(shape: ModelShape, block: PescConfig | None, config: TrainConfig, batch: Batch, layer: int) -> int:
    """Saved tensors of one layer."""
    experts = block.experts_of(layer) if block and config.method == "pesc" else 0
    per_token = _norms(shape) + _attention(shape, config, batch)
    if config.method == "upcycle-full":
        per_token += _whole_layer(shape, block.top_k if block else 1, dtype_bytes(config))
    else:
        per_token += 3 * shape.ffn * dtype_bytes(config) + _lora(shape, config, batch, reads_input=bool(experts))
    if block and experts:
        per_token += _bank(shape, block, config, experts)
    return batch.tokens * per_token


def _norms(shape: ModelShape) -> int:
    return shape.norms * 4 * (shape.hidden + 1) + 4 * sum(shape.qk_norm_sizes)


def _attention(shape: ModelShape, config: TrainConfig, batch: Batch) -> int:
    size, width, kv_width = dtype_bytes(config), shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    keys = 2 * (kv_width if batch.flash else width)
    mask = 0 if batch.flash else batch.sequence * size
    return (2 * width + keys) * size + 4 * shape.heads + mask


def _lora(shape: ModelShape, config: TrainConfig, batch: Batch, reads_input: bool) -> int:
    """Inputs of the adapted projections.  Without dropout those that read one tensor share it, also with the router."""
    size = dtype_bytes(config)
    targets = {name: inputs for name, (inputs, _) in shape.projections.items() if name in config.lora.targets}
    ranks = len(targets) * config.lora.rank * size
    router = shape.hidden * size if reads_input else 0
    if config.lora.dropout:
        mask = 1 if batch.device == "cuda" else size
        return ranks + router + sum(inputs * (size + mask) for inputs in targets.values())
    attention = {name for name in targets if name in ("q_proj", "k_proj", "v_proj", "qkv_proj")}
    mlp = {name for name in targets if name in ("gate_proj", "up_proj", "gate_up_proj")}
    shared = (shape.hidden * size if attention else 0) + (shape.hidden * size if mlp or reads_input else 0)
    alone = sum(inputs * size for name, inputs in targets.items() if name in ("o_proj", "down_proj"))
    return ranks + shared + alone


def _bank(shape: ModelShape, block: PescConfig, config: TrainConfig, experts: int) -> int:
    """The larger of what dense and grouped dispatch keep, unless one of them is pinned."""
    size, chosen = dtype_bytes(config), block.top_k
    dense = size * (shape.hidden + 3 * experts * block.adapter_dim + 2 * experts)
    grouped = size * (chosen * shape.hidden + 3 * chosen * block.adapter_dim) + 24 * chosen
    by_path = {"dense": dense, "grouped": grouped, "segments": grouped}
    routing = experts * (size + 8) + chosen * 16
    shared = 2 * block.shared_adapter_dim * size
    return by_path.get(block.dispatch, max(dense, grouped)) + routing + shared


def _whole_layer(shape: ModelShape, chosen: int, size: int) -> int:
    """A Mixtral layer in full: inputs of all projections, the norms' results, and the chosen experts' FFNs."""
    width = shape.heads * shape.head_dim
    return size * (2 * shape.hidden + width + chosen * (2 * shape.hidden + 4 * shape.ffn) + 2 * shape.hidden)


def _workspace(shape: ModelShape, config: TrainConfig, batch: Batch) -> int:
    size = dtype_bytes(config)
    largest = max(inputs * outputs for inputs, outputs in shape.projections.values())
    unpacked = size * largest if config.quantization == "nf4" else 0
    return unpacked + batch.tokens * (3 * shape.ffn * size + 3 * shape.hidden * (size + 4))
