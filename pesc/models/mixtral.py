"""Whole-FFN upcycling: a dense Llama or Mistral becomes transformers' own Mixtral, every expert a full copy of the dense FFN.

Komatsuzaki et al. 2023, the sparse upcycling that PESC is compared with: E times the FFN's parameters instead of adapters, all trained.
With equal experts, and weights that sum to 1, the new model computes what the dense one does.

On disk the tensors have the names that Mixtral checkpoints are published with, one matrix an expert (`w1` gate, `w3` up, `w2` down); in
memory transformers stacks them: `mlp.experts.gate_up_proj` [E, 2F, H], `mlp.experts.down_proj` [E, H, F], `mlp.gate.weight` [E, H].
E experts, F FFN width, H hidden.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pesc.errors import ModelError
from pesc.models.config import UpcycleConfig
from pesc.models.published import is_published
from pesc.models.tensor_files import TensorDirectory, TensorSpec, dtype_code, link_companions, write_sharded

if TYPE_CHECKING:
    import torch
    from torch import nn

DENSE_TYPES = ("llama", "mistral")
"""Architectures whose attention and FFN are Mixtral's."""
MODEL_TYPE = "mixtral"
WEIGHTS_NAME = "weights.safetensors"
"""All weights of a training in full, in the train stage's output."""
MAX_SHARD_BYTES = 5_000_000_000
_FFN = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_FROM_CONFIG = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "rope_parameters", "tie_word_embeddings", "sliding_window",
    "attention_dropout", "bos_token_id", "eos_token_id", "pad_token_id", "dtype",
)  # fmt: skip


def upcycle_whole(
    model_dir: Path, out_dir: Path, config: UpcycleConfig, progress: Callable[..., None] = lambda *_, **__: None
) -> dict[str, Any]:
    """Write the Mixtral of the dense model in `model_dir` to the empty `out_dir`; returns parameter counts.

    Weights pass through one tensor at a time.  Raises ModelError for an architecture that Mixtral's does not contain, or files that are
    not complete.
    """
    from pesc.models.upcycle import check_complete, read_config, write_config

    fields, dense = read_config(model_dir), TensorDirectory(model_dir)
    mixtral = mixtral_fields(fields, config, model_dir)
    check_complete(fields, dense.specs, model_dir)
    specs, origin = _plan(dense.specs, config, model_dir)
    made = iter(range(1, len(specs) + 1))

    def make(name: str) -> torch.Tensor:
        progress(next(made), len(specs), unit="tensors", message=name)
        return dense.read(origin[name]) if name in origin else _draw_router(name, specs[name], config)

    write_sharded(out_dir, specs, MAX_SHARD_BYTES, make)
    write_config(out_dir, mixtral)
    link_companions(model_dir, out_dir, code=False)
    return _count(dense.specs, specs, config)


def mixtral_fields(fields: Mapping[str, Any], config: UpcycleConfig, where: Path) -> dict[str, Any]:
    """config.json of the Mixtral.  Raises ModelError when the dense model's attention or FFN is not Mixtral's."""
    from transformers import MixtralConfig

    from pesc.models.factory import architecture_of

    kind = str(fields.get("model_type"))
    if kind not in DENSE_TYPES or is_published(dict(fields)) or architecture_of(dict(fields)).dense_type not in DENSE_TYPES:
        raise ModelError(
            f"{where} (model_type {kind}) has no whole-FFN upcycling: its sparse form is transformers' Mixtral, which holds the dense "
            f"architectures {' and '.join(DENSE_TYPES)}. Use one of those, or method pesc."
        )
    if fields.get("quantization_config"):
        raise ModelError(f"{where} is quantised: upcycle the unquantised model instead.")
    for name in ("attention_bias", "mlp_bias"):
        if fields.get(name):
            raise ModelError(f"{where} has {name}, for which Mixtral has no place: use another model, or method pesc.")
    resolved = architecture_of(dict(fields)).dense_config.from_dict(dict(fields)).to_dict()
    shared = {name: resolved[name] for name in _FROM_CONFIG if name in resolved}
    made = MixtralConfig(**shared, num_local_experts=config.num_experts, num_experts_per_tok=config.top_k).to_dict()
    for name in ("_name_or_path", "transformers_version"):
        made.pop(name, None)
    return made | {"architectures": ["MixtralForCausalLM"], "model_type": MODEL_TYPE}


def _plan(dense: Mapping[str, TensorSpec], config: UpcycleConfig, where: Path) -> tuple[dict[str, TensorSpec], dict[str, str]]:
    """Spec of every tensor of the Mixtral, and the dense tensor that it is a copy of (none for routers)."""
    specs, origin = {}, {}
    for name, spec in dense.items():
        ffn = re.fullmatch(r"(model\.layers\.\d+\.)mlp\.(gate_proj|up_proj|down_proj)\.weight", name)
        if not ffn:
            specs[name], origin[name] = spec, name
            continue
        part = next(short for short, long in _FFN.items() if long == ffn[2])
        moe = f"{ffn[1]}block_sparse_moe"
        for expert in range(config.num_experts):
            copy = f"{moe}.experts.{expert}.{part}.weight"
            specs[copy], origin[copy] = spec, name
        if part == "w1":
            specs[f"{moe}.gate.weight"] = TensorSpec(dtype_code(config.dtype), (config.num_experts, spec.shape[1]))
    if len(specs) == len(dense):
        raise ModelError(f"{where} has no FFN weights of the form model.layers.N.mlp.gate_proj.weight: there is nothing to copy.")
    return specs, origin


def _draw_router(name: str, spec: TensorSpec, config: UpcycleConfig) -> torch.Tensor:
    """The start of a router: the same values as the router of this layer has in an arm with adapters."""
    import torch

    from pesc.moe.initial import draw_initial

    layer = name.removeprefix("model.").removesuffix(".block_sparse_moe.gate.weight")
    return draw_initial(f"{layer}.mlp.router.weight", spec.shape, config.seed).to(getattr(torch, config.dtype))


def _count(dense: Mapping[str, TensorSpec], specs: Mapping[str, TensorSpec], config: UpcycleConfig) -> dict[str, Any]:
    base, total = (sum(spec.num_elements for spec in part.values()) for part in (dense, specs))
    experts = sum(spec.num_elements for name, spec in specs.items() if ".block_sparse_moe.experts." in name)
    idle = experts // config.num_experts * (config.num_experts - config.top_k)
    return {"dense_parameters": base, "added_parameters": total - base, "total_parameters": total, "active_parameters": total - idle}


def find_routers(model: nn.Module) -> dict[str, nn.Module]:
    """The routers of a Mixtral by name, in layer order; their first output is the logits [T, E]."""
    from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

    return {name: module for name, module in model.named_modules() if isinstance(module, MixtralTopKRouter)}


def to_published(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Parameters of the model in memory under the names, and in the pieces, of a published checkpoint."""
    return {name: tensor for held, stacked in tensors.items() for name, tensor in _pieces(held, stacked)}


def _pieces(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """One parameter's tensors on disk; for those of the experts they are views of it."""
    moe, _, part = name.partition(".mlp.")
    if part == "gate.weight":
        yield f"{moe}.block_sparse_moe.gate.weight", tensor
    elif part in ("experts.gate_up_proj", "experts.down_proj"):
        for expert, matrix in enumerate(tensor):
            split = zip(("w1", "w3"), matrix.chunk(2), strict=True) if part.endswith("gate_up_proj") else [("w2", matrix)]
            for short, piece in split:
                yield f"{moe}.block_sparse_moe.experts.{expert}.{short}.weight", piece
    else:
        yield name, tensor


def copy_published(model: nn.Module, read: Callable[[str], torch.Tensor]) -> None:
    """Set every parameter of a Mixtral in memory from tensors by their published names."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            for published, place in _pieces(name, parameter):
                place.copy_(read(published))
