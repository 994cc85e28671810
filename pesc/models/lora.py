"""A trained LoRA adapter on disk: what it changes, and whether it is all there.

I input features, O output features, R rank.  W' = W + scaling · B · A with A [R, I], B [O, R] (Hu et al. 2021).

Contract: every check that can be made without running the model is made here, and what is lost, extra, transposed, untrained or not a
number is named in a ModelError.  Nothing is skipped in silence.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pesc.errors import ModelError
from pesc.models.pickle_files import read_pickle, tensor_specs
from pesc.models.tensor_files import TensorSpec, read_header, read_tensor

if TYPE_CHECKING:
    import torch

_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])(\.default)?\.weight")
_UNSUPPORTED = {
    "use_dora": "DoRA",
    "fan_in_fan_out": "transposed layers",
    "modules_to_save": "fully trained modules",
    "rank_pattern": "ranks by layer",
    "alpha_pattern": "alphas by layer",
    "lora_bias": "a LoRA bias",
    "target_parameters": "LoRA on bare parameters",
    "trainable_token_indices": "trained tokens",
    "layer_replication": "replicated layers",
}
"""Options of PEFT that change what a merge must do, and their names for people."""


@dataclass(frozen=True)
class LoraAdapter:
    """One PEFT LoRA adapter directory, checked against the model it belongs to."""

    path: Path
    scaling: float
    rank: int
    num_parameters: int
    pairs: Mapping[str, tuple[str, str]]
    """Weight name in the model (`model.layers.0.self_attn.q_proj.weight`) -> keys of A and B in the file."""
    read: Callable[[str], torch.Tensor]
    """One tensor of the file by its key."""

    def matrices(self, weight: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A [R, I] and B [O, R] of one weight in fp32.  Raises ModelError when one is not a number or B was never trained."""
        key_a, key_b = self.pairs[weight]
        a_RI, b_OR = self.read(key_a).float(), self.read(key_b).float()
        for key, tensor in ((key_a, a_RI), (key_b, b_OR)):
            if not tensor.isfinite().all():
                raise ModelError(f"{self.path} has a value that is not a number in {key}: the training diverged; train again.")
        if not b_OR.any():
            raise ModelError(f"{self.path} has {key_b} all zero: {weight} was never trained; look for a frozen part in the training log.")
        return a_RI, b_OR

    def delta(self, weight: str) -> torch.Tensor:
        """Scaling · B · A of one weight, [O, I] in fp32."""
        a_RI, b_OR = self.matrices(weight)
        return self.scaling * (b_OR @ a_RI)

    def fold(self, weight: str, base_OI: torch.Tensor) -> torch.Tensor:
        """W + scaling · B · A in fp32."""
        return base_OI.float() + self.delta(weight)


def read_lora(adapter_dir: Path, model: Mapping[str, TensorSpec]) -> LoraAdapter:
    """The adapter in `adapter_dir`, for a model with these tensors.

    Raises ModelError for an adapter that uses what cannot be folded, lacks a pair, has one too many, or has one of another shape.
    """
    config = _read_config(adapter_dir)
    path, header, read = _open_weights(adapter_dir)
    sides = _group_keys(header, path)
    _check_targets(sides, config, model, path)
    rank = config["r"]
    pairs = {}
    for module, keys in sides.items():
        weight = f"{module}.weight"
        out_features, in_features = model[weight].shape
        _check_shape(path, keys["A"], header, (rank, in_features), weight)
        _check_shape(path, keys["B"], header, (out_features, rank), weight)
        pairs[weight] = (keys["A"], keys["B"])
    divisor = math.sqrt(rank) if config.get("use_rslora") else rank
    return LoraAdapter(path, config["lora_alpha"] / divisor, rank, sum(spec.num_elements for spec in header.values()), pairs, read)


def _open_weights(adapter_dir: Path) -> tuple[Path, Mapping[str, TensorSpec], Callable[[str], torch.Tensor]]:
    """The file of the matrices, its tensors, and how to read one.  PEFT before 0.7 wrote a pickle."""
    path, old = adapter_dir / "adapter_model.safetensors", adapter_dir / "adapter_model.bin"
    if not path.is_file() and old.is_file():
        tensors = read_pickle(old)
        return old, tensor_specs(tensors), tensors.__getitem__
    if not path.is_file():
        raise ModelError(f"{adapter_dir} has no adapter_model.safetensors: the training did not finish; run `train` again.")
    return path, read_header(path), partial(read_tensor, path)


def _read_config(adapter_dir: Path) -> dict[str, Any]:
    path = adapter_dir / "adapter_config.json"
    if not path.is_file():
        raise ModelError(f"{adapter_dir} has no adapter_config.json: it is not a PEFT adapter; run `train` again.")
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.get("peft_type") != "LORA":
        raise ModelError(f"{path} is of a {config.get('peft_type')} adapter; only LORA can be folded into the weights.")
    used = [words for field, words in _UNSUPPORTED.items() if config.get(field)]
    if config.get("bias", "none") != "none":
        used.append("trained biases")
    if used:
        raise ModelError(f"{path} asks for {', '.join(used)}, which this merge cannot fold: train with plain LoRA.")
    return config


def _group_keys(header: Mapping[str, TensorSpec], path: Path) -> dict[str, dict[str, str]]:
    """Module name -> {"A": key, "B": key}; both must be there."""
    sides: dict[str, dict[str, str]] = {}
    for key in header:
        match = _KEY.fullmatch(key)
        if not match:
            raise ModelError(f"{path} has the tensor {key}, which is no LoRA matrix of a module: nothing would be done with it.")
        sides.setdefault(match["module"], {})[match["side"]] = key
    for module, keys in sides.items():
        for side in "AB":
            if side not in keys:
                raise ModelError(f"{path} has lost lora_{side} of {module}: the adapter is not whole; run `train` again.")
    return sides


def _check_targets(sides: Mapping[str, Any], config: Mapping[str, Any], model: Mapping[str, TensorSpec], path: Path) -> None:
    """The modules with LoRA are exactly those that the adapter's config targets."""
    modules = [name.removesuffix(".weight") for name, spec in model.items() if name.endswith(".weight") and len(spec.shape) == 2]
    expected = {module for module in modules if _is_target(module, config)}
    for module in sorted(set(sides) - set(modules)):
        raise ModelError(f"{path} has LoRA for {module}, which the model does not have: the adapter belongs to another model.")
    for module in sorted(expected - set(sides)):
        raise ModelError(
            f"{path} has no LoRA for {module}, although its config targets it: a part of the adapter is lost; run `train` again."
        )
    for module in sorted(set(sides) - expected):
        raise ModelError(f"{path} has LoRA for {module}, although its config does not target it: config and weights are of different runs.")


def _is_target(module: str, config: Mapping[str, Any]) -> bool:
    """PEFT's rule: a regular expression over the whole name, or a list of names or of last components."""
    targets = config["target_modules"]
    if isinstance(targets, str):
        return re.fullmatch(targets, module) is not None
    return any(module == target or module.endswith(f".{target}") for target in targets)


def _check_shape(path: Path, key: str, header: Mapping[str, TensorSpec], expected: tuple[int, int], weight: str) -> None:
    found = header[key].shape
    if found == expected:
        return
    cause = "it is transposed" if found == expected[::-1] else "it belongs to another model or rank"
    raise ModelError(f"{path} has {key} as {list(found)}, but {weight} needs {list(expected)}: {cause}.")
