"""The model that is trained: a frozen (4-bit) base, LoRA on its projections, and the bank and routers in full.

E experts, R adapter width, H hidden: bank `mlp.adapters.down|up` [E, R, H], router `mlp.router.weight` [E, H].
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

import pesc.models
from pesc.errors import ModelError
from pesc.models import mixtral
from pesc.models.nf4 import quantization_config
from pesc.moe.layer import sparse_parameters
from pesc.moe.router import find_routers
from pesc.remote_code import refuse_own_code
from pesc.train.config import TrainConfig
from pesc.train.order import derive_seed

logger = logging.getLogger(__name__)
PEFT_PREFIX = "base_model.model."
GROUPS: tuple[str, ...] = ("lora", "bank", "router", "dense")


@dataclass(frozen=True)
class TrainableGroup:
    """One line of the table of what is trained."""

    group: str
    tensors: int
    parameters: int


def load_trainable(model_dir: Path, config: TrainConfig, device: str, checkpointing: str) -> PeftModel | PreTrainedModel:
    """The model ready for training; equal on every rank.  With method upcycle-full it is the bare model and everything in it is trained.

    device: "cpu" or "cuda:N".  checkpointing: none, selective or full.
    Raises ModelError when the model does not fit the method, or a LoRA target names no projection.
    """
    base = _load_base(model_dir, config, device)
    _check_method(base, config, model_dir)
    checkpoint_activations(base, checkpointing)
    base.config.use_cache = False
    if config.method == "upcycle-full":
        return base.requires_grad_(True)
    _check_targets(base, config, model_dir)
    base.requires_grad_(False)
    torch.manual_seed(derive_seed("lora", config.seed))
    model = get_peft_model(base, peft_config(config), autocast_adapter_dtype=False)
    dtype = getattr(torch, config.compute_dtype)
    for _, parameter in sparse_parameters(model):
        parameter.requires_grad_(True)
    for module in find_routers(model).values():
        module.jitter = config.balance.jitter
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    return model


def peft_config(config: TrainConfig) -> PeftLoraConfig:
    """LoRA as PEFT knows it."""
    lora = config.lora
    return PeftLoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # pyright: ignore[reportArgumentType]  a float does as well
        lora_dropout=lora.dropout,
        target_modules=sorted(lora.targets),
        bias="none",
        task_type="CAUSAL_LM",
    )


def _load_base(model_dir: Path, config: TrainConfig, device: str) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    pesc.models.register()
    options: dict[str, Any] = {
        "config": _read_config(model_dir, config),
        "dtype": getattr(torch, config.compute_dtype),
        "device_map": {"": device},
        "attn_implementation": pick_attention(device),
        "trust_remote_code": False,
    }
    if config.quantization == "nf4":
        options["quantization_config"] = quantization_config(config.compute_dtype)
    try:
        return AutoModelForCausalLM.from_pretrained(model_dir, **options)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{model_dir} cannot be loaded as a causal language model: {' '.join(str(error).split())}") from error


def _read_config(model_dir: Path, config: TrainConfig) -> Any:
    """The model's config; balancing by bias gives the routers their bias."""
    from transformers import AutoConfig

    refuse_own_code(model_dir)
    try:
        read = AutoConfig.from_pretrained(model_dir, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{model_dir} cannot be loaded as a causal language model: {' '.join(str(error).split())}") from error
    if found := getattr(read, "quantization_config", None):
        method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", found)
        raise ModelError(
            f"{model_dir} is quantised already ({method}), and what is trained on it could not be merged: give the unquantised model; training "
            "makes its own 4-bit copy."
        )
    if config.balance.kind == "bias" and getattr(read, "pesc", None):
        before = read.pesc.get("bias_update_rate") or config.balance.bias_update_rate
        if before != config.balance.bias_update_rate:
            raise ModelError(
                f"{model_dir} was balanced in steps of {before}, which train.balance.bias_update_rate={config.balance.bias_update_rate} would "
                f"rescale: set it to {before}."
            )
        read.pesc = {**read.pesc, "bias_update_rate": config.balance.bias_update_rate}
    return read


def pick_attention(device: str) -> str:
    """Flash attention (variable length) where it is installed and runs, else torch's."""
    from transformers.utils.import_utils import is_flash_attn_2_available

    return "flash_attention_2" if device.startswith("cuda") and is_flash_attn_2_available() else "sdpa"


def checkpoint_activations(model: PreTrainedModel, policy: str) -> None:
    """Non-reentrant checkpointing of each layer (full), of every second one (selective) or of none.

    selective saves half of what full recomputes for half of what it frees.  Keeping the attention's outputs in every layer instead would
    save less (at 2,048 positions attention is 4 % of a 7B layer's forward pass) and put a dispatch mode around each operation.
    """
    if policy == "none":
        return
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if policy == "selective":
        for layer in layers[1::2]:
            layer.gradient_checkpointing = False


def _check_method(model: PreTrainedModel, config: TrainConfig, model_dir: Path) -> None:
    is_sparse = next(sparse_parameters(model), None) is not None
    if config.method == "pesc" and not is_sparse:
        raise ModelError(
            f"method is pesc, but {model_dir} (model_type {model.config.model_type}) has no bank: upcycle it first, or train with method qlora."
        )
    if config.method == "upcycle-full" and model.config.model_type != mixtral.MODEL_TYPE:
        raise ModelError(
            f"method is upcycle-full, but {model_dir} is of model_type {model.config.model_type}: it trains the Mixtral that `upcycle` with kind "
            "whole makes of a dense model."
        )
    if config.method in ("qlora", "lora") and is_sparse:
        raise ModelError(
            f"method is {config.method}, but {model_dir} is a sparse model: the control is trained on the dense model, or use method pesc."
        )


def _check_targets(model: nn.Module, config: TrainConfig, model_dir: Path) -> None:
    """PEFT leaves out in silence a target that names nothing while another one does."""
    names = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if missing := [target for target in config.lora.targets if target not in names]:
        raise ModelError(
            f"lora.targets names {missing[0]!r}, but {model_dir} has no such projection; there are: {', '.join(sorted(names))}."
        )


def selection_biases(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and values of the routers' biases: trained by counting, not by gradients."""
    return ((f"{name}.bias_steps", router.bias_steps) for name, router in find_routers(model).items() if router.bias_steps is not None)


def trainable_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and parameters of everything that is trained, in the model's order."""
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def group_of(name: str) -> str:
    """lora, bank (also the experts of a Mixtral), router, or dense (all else of a model that is trained in full, which is outside PEFT).

    Raises ModelError for a name that should not be trained at all.
    """
    if not name.startswith(PEFT_PREFIX):
        return "router" if name.endswith(".mlp.gate.weight") else "bank" if ".mlp.experts." in name else "dense"
    if ".lora_" in name:
        return "lora"
    if re.search(r"\.mlp\.adapters\.(shared_)?(down|up)$", name):
        return "bank"
    if name.endswith((".mlp.router.weight", ".mlp.router.bias_steps")):
        return "router"
    raise ModelError(f"{name} is trainable, but belongs to neither LoRA, bank nor router.")


def count_trainable(model: nn.Module) -> list[TrainableGroup]:
    """The table of what is trained; also right when ZeRO-3 has partitioned the parameters away."""
    counts: dict[str, tuple[int, int]] = dict.fromkeys(GROUPS, (0, 0))
    for name, parameter in trainable_parameters(model):
        tensors, parameters = counts[group_of(name)]
        counts[group_of(name)] = (tensors + 1, parameters + getattr(parameter, "ds_numel", parameter.numel()))
    return [TrainableGroup(group, *counts[group]) for group in GROUPS if counts[group][0]]


def log_trainable(model: nn.Module) -> None:
    """A line a group, and their sum: tensors, parameters, share of all the model's parameters, dtypes."""
    groups, dtypes = count_trainable(model), dict[str, set[str]]()
    for name, parameter in trainable_parameters(model):
        dtypes.setdefault(group_of(name), set()).add(str(parameter.dtype).removeprefix("torch."))
    whole = max(1, sum(_count_parameters(parameter) for parameter in model.parameters()))
    total = TrainableGroup("all", sum(g.tensors for g in groups), sum(g.parameters for g in groups))
    for row in (*groups, total):
        dtype = "+".join(sorted(set.union(*dtypes.values()) if row is total else dtypes[row.group]))
        logger.info(
            "trainable %-6s %5d tensors %15s parameters %7.3f %% of the model  %s",
            *(row.group, row.tensors, f"{row.parameters:,}", 100 * row.parameters / whole, dtype),
        )


def _count_parameters(parameter: nn.Parameter) -> int:
    """Parameters, whatever 4-bit packing or ZeRO-3 has made of them."""
    state = getattr(parameter, "quant_state", None)
    return state.shape.numel() if state is not None else getattr(parameter, "ds_numel", parameter.numel())
