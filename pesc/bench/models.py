"""Models to measure training steps on: a slice of a real one, or random 4-bit weights made one projection at a time; dense, and widened.

dense = base_model(directory, shape, layers, dtype, device)  one of the two below: the directory's if there is one
dense = load_slice(directory, layers, dtype, device)         the first layers of a dense model, base in NF4
dense = random_model(shape, layers, dtype, device)           no more than one projection exists outside NF4 at any time
sparse = widened(dense, PescConfig(8, 2, 64))                shares every dense weight
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pesc.bench.decode import SHAPES
from pesc.errors import RecipeError
from pesc.moe.config import PescConfig

STEP_SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": SHAPES["smollm2-135m"],
    "7b": SHAPES["llama-2-7b"],
    "13b": SHAPES["llama-2-7b"]
    | {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40, "num_key_value_heads": 40},
    "34b": SHAPES["yi-34b"],
    "tiny": SHAPES["smollm2-135m"]
    | {
        "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}  # fmt: skip
"""Shapes that can be measured without weights."""


def base_model(directory: Path | None, shape: str, layers: int | None, dtype: torch.dtype, device: str) -> Any:
    """`load_slice` of a directory, or without one `random_model` of a shape; raises what they raise."""
    if directory is not None:
        return load_slice(directory, layers, dtype, device)
    return random_model(shape, layers, dtype, device)


def load_slice(directory: Path, layers: int | None, dtype: torch.dtype, device: str) -> Any:
    """The first layers of a dense model's directory, the base in NF4.  Raises ModelError or RecipeError for what is no dense model."""
    from transformers import AutoModelForCausalLM

    from pesc.models.factory import architecture_of, is_sparse
    from pesc.models.nf4 import quantization_config
    from pesc.models.upcycle import read_config
    from pesc.train.modeling import pick_attention

    fields = read_config(directory)
    if is_sparse(fields):
        raise RecipeError(f"--model {directory} is a sparse model: give its dense base; the adapters are added here.")
    config = architecture_of(fields).dense_config.from_dict(_cut(fields, layers))
    return AutoModelForCausalLM.from_pretrained(
        directory, config=config, dtype=dtype, device_map={"": device}, quantization_config=quantization_config(str(dtype).removeprefix("torch.")),
        attn_implementation=pick_attention(device), trust_remote_code=False,
    )  # fmt: skip


def random_model(shape: str, layers: int | None, dtype: torch.dtype, device: str) -> Any:
    """A dense model of a shape with random weights.  Raises RecipeError for a shape that is not in the table."""
    from pesc.models.factory import architecture_of
    from pesc.train.modeling import pick_attention

    if shape not in STEP_SHAPES:
        raise RecipeError(f"--shape is {shape!r}: choose one of {', '.join(STEP_SHAPES)}.")
    classes = architecture_of(STEP_SHAPES[shape])
    config = classes.dense_config.from_dict(_cut(STEP_SHAPES[shape], layers))
    config._attn_implementation = pick_attention(device)
    torch.manual_seed(0)
    with torch.device("meta"):
        model: Any = classes.dense_causal_lm(config)
    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and module is not head:
            holder, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(holder), attribute, _random_4bit(module, dtype, device))
    _fill_rest(model, dtype, device)
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config).to(device)
    model.tie_weights()
    model.is_loaded_in_4bit = True  # what PEFT asks
    return model


def _cut(fields: dict[str, Any], layers: int | None) -> dict[str, Any]:
    cut = {**fields, "use_cache": False}
    if layers is not None:
        cut["num_hidden_layers"] = min(layers, fields["num_hidden_layers"])
        if cut.get("layer_types"):
            cut["layer_types"] = cut["layer_types"][: cut["num_hidden_layers"]]
    return cut


def _random_4bit(module: nn.Linear, dtype: torch.dtype, device: str) -> nn.Module:
    """A quantised projection of the same size."""
    from bitsandbytes.nn.modules import Linear4bit, Params4bit

    made = Linear4bit(
        module.in_features, module.out_features, bias=False, compute_dtype=dtype, quant_type="nf4", quant_storage=dtype, device="meta"
    )
    values = torch.randn(module.out_features, module.in_features, dtype=dtype, device=device) / module.in_features**0.5
    make: Any = Params4bit  # whose arguments are those of its __new__
    weight = make(values, requires_grad=False, quant_type="nf4", quant_storage=dtype, module=made)
    made.weight = weight.to(device)
    return made


def _fill_rest(model: nn.Module, dtype: torch.dtype, device: str) -> None:
    """Norms of ones, small random embeddings."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                empty = torch.empty(parameter.shape, dtype=dtype, device=device)
                setattr(module, name, nn.Parameter(empty.fill_(1.0) if empty.ndim == 1 else empty.normal_(0, 0.02), requires_grad=False))


def widened(dense: Any, pesc: PescConfig) -> Any:
    """A sparse model that shares the dense one's weights; its bank is filled, so that every adapter really adds something."""
    from pesc.moe.layer import sparse_parameters, widen_mlp

    shared = {id(tensor): tensor for tensor in (*dense.parameters(), *dense.buffers())}
    sparse = copy.deepcopy(dense, memo=shared)
    embedding = dense.get_input_embeddings().weight
    with torch.device(embedding.device):
        for number, layer in enumerate(sparse.model.layers):
            widen_mlp(layer.mlp, pesc, dense.config.hidden_size, number)
    generator = torch.Generator(device=embedding.device).manual_seed(1)
    for _, parameter in sparse_parameters(sparse):
        parameter.data = parameter.data.to(embedding.dtype).normal_(0, parameter.shape[-1] ** -0.5, generator=generator)
    return sparse
