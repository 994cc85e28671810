"""Reading published PESC checkpoints: Camelidae, Qwen2idae, sparsetral.

    pesc import CHECKPOINT_DIR --out OUT_DIR

They are dense directories with extra tensors in each layer, one pair an expert:

    model.layers.{l}.mlp.moe_adapter.router.weight                                     [E, H]
    model.layers.{l}.mlp.moe_adapter.experts.expert_{e}.adapter_down.weight            [R, H]    (sparsetral: experts.{e}.)
    model.layers.{l}.mlp.moe_adapter.experts.expert_{e}.adapter_up.weight              [H, R]    stored transposed to this package's bank

E experts, R adapter width, H hidden.  The shape is in top-level fields of config.json: num_experts, topk, adapter_dim, moe_scaling.

Contract: no code of a checkpoint runs.  Every tensor is accounted for: one that is lost, extra or of another shape is named and refused
(`rotary_emb.inv_freq` alone is dropped, which every model computes from its config).

Pitfalls
- `top_k` in those configs is a leftover of generation (50); the experts of a token are `topk`.
- Re-saved checkpoints say model_type "llama": they are recognised by `adapter_dim` and `num_experts`.
- The reference code ignores rope_theta; this package uses the config's, or 10000 where it has none.  Check a Yi-based checkpoint by its
  perplexity.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pesc.errors import ModelError
from pesc.models.pickle_files import PickleDirectory
from pesc.models.tensor_files import INDEX_NAME, SINGLE_NAME, TensorDirectory, TensorSpec, link_companions, write_sharded

if TYPE_CHECKING:
    import torch

_EXPERT = re.compile(r"(model\.layers\.\d+\.mlp)\.moe_adapter\.experts\.(?:expert_)?(\d+)\.adapter_(down|up)\.weight")
_ROUTER = re.compile(r"(model\.layers\.\d+\.mlp)\.moe_adapter\.router\.weight")
_DENSE_TYPES = {"camelidae": "llama", "qwen2idae": "qwen2", "sparsetral": "mistral"}
_SCALINGS = {"sparsetral": 1.0, "mistral": 1.0}
"""`moe_scaling` where the config does not say it: the default of the class that the checkpoint names (0.25 for all others)."""
MAX_SHARD_BYTES = 5_000_000_000
"""Largest safetensors file of a conversion."""


class TensorSource(Protocol):
    """Tensors by name, each read when it is asked for."""

    def read(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU."""
        ...


def is_published(fields: Mapping[str, Any]) -> bool:
    """Whether a config.json is of a checkpoint in the published layout."""
    return "adapter_dim" in fields and "num_experts" in fields and "pesc" not in fields


def is_derived(name: str) -> bool:
    """Whether a tensor of a checkpoint is a buffer that every model computes from its config: it may be there, and is not read."""
    return name.endswith("rotary_emb.inv_freq")


def open_weights(model_dir: Path) -> TensorDirectory | PickleDirectory:
    """The tensors of a directory: safetensors where there are any, else pickles."""
    named = any((model_dir / name).is_file() for name in (SINGLE_NAME, INDEX_NAME))
    return TensorDirectory(model_dir) if named or not any(model_dir.glob("pytorch_model*.bin")) else PickleDirectory(model_dir)


def import_published(model_dir: Path, out_dir: Path, progress: Callable[..., None] = lambda *_args, **_kwargs: None) -> dict[str, Any]:
    """Write a published checkpoint in this package's layout to the empty `out_dir`; returns the `pesc` block.

    Raises ModelError for an unknown base architecture, a missing field of the config, or a missing expert.
    """
    from pesc.models.upcycle import check_complete, read_config, write_config

    source = open_weights(model_dir)
    fields = convert_config(read_config(model_dir), model_dir)
    origins, specs = map_tensors(source.specs, fields["pesc"]["num_experts"], model_dir)
    check_complete(fields, specs, model_dir)
    done = iter(range(1, len(specs) + 1))

    def make(name: str) -> torch.Tensor:
        progress(next(done), len(specs), unit="tensors", message=name)
        return read_stacked(source, origins[name], name)

    write_sharded(out_dir, specs, MAX_SHARD_BYTES, make)
    write_config(out_dir, fields)
    link_companions(model_dir, out_dir, code=False)  # the checkpoint's own code does not run on current transformers
    return fields["pesc"]


def convert_config(fields: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """The sparse config.json of a published one: the dense fields that transformers knows, and the `pesc` block."""
    from pesc.models.factory import architecture
    from pesc.moe.config import PescConfig

    published_type = str(fields.get("model_type", ""))
    classes = architecture(_DENSE_TYPES.get(published_type, published_type))
    for name in ("num_experts", "adapter_dim", "topk"):
        if name not in fields:
            raise ModelError(f"{where / 'config.json'} does not say {name}: add it as the checkpoint's authors published it.")
    scaling = fields.get("moe_scaling", _SCALINGS.get(published_type, 0.25))
    try:
        block = PescConfig(fields["num_experts"], fields["topk"], fields["adapter_dim"], scaling)
    except ValueError as error:
        raise ModelError(f"{where / 'config.json'} cannot be used: {error} (there, top_k is topk and scaling is moe_scaling).") from error
    known = {*classes.dense_config().to_dict(), "rope_theta", "rope_scaling"} - {
        "architectures",
        "model_type",
        "transformers_version",
        "top_k",
    }
    kept = {name: value for name, value in fields.items() if name in known and value is not None}
    dtype = fields.get("dtype") or fields.get("torch_dtype")
    if dtype:
        kept["dtype"] = dtype
    return kept | {"model_type": classes.model_type, "architectures": [classes.causal_lm.__name__], "pesc": block.to_dict()}


def map_tensors(source: Mapping[str, TensorSpec], num_experts: int, where: Path) -> tuple[dict[str, list[str]], dict[str, TensorSpec]]:
    """Our name -> the tensors it is made of, and our name -> its spec; dense tensors in the checkpoint's order, then the bank.

    Raises ModelError for an expert that is lost, extra, there twice, or unlike the others.
    """
    origins: dict[str, list[str]] = {}
    experts: dict[str, dict[int, str]] = {}
    for name in source:
        if match := _EXPERT.fullmatch(name):
            by_index, index = experts.setdefault(f"{match[1]}.adapters.{match[3]}", {}), int(match[2])
            if index in by_index:
                raise ModelError(f"{where} has the same expert twice, as {by_index[index]} and as {name}: remove one of them.")
            by_index[index] = name
        elif match := _ROUTER.fullmatch(name):
            origins[f"{match[1]}.router.weight"] = [name]
        elif ".moe_adapter." in name:
            raise ModelError(f"{where} has {name}, a layout of experts that is not known: map it in pesc.models.published.")
        elif not is_derived(name):
            origins[name] = [name]
    specs = {name: source[parts[0]] for name, parts in origins.items()}
    for name, by_index in experts.items():
        specs[name] = _stacked_spec(source, name, by_index, num_experts, where)
        origins[name] = [by_index[index] for index in range(num_experts)]
    return origins, specs


def _stacked_spec(source: Mapping[str, TensorSpec], name: str, by_index: Mapping[int, str], num_experts: int, where: Path) -> TensorSpec:
    """The spec of a bank's tensor: all experts are there, and alike."""
    if sorted(by_index) != list(range(num_experts)):
        raise ModelError(
            f"{where} has experts {sorted(by_index)} in {name}, but there are {num_experts} of them: the checkpoint is not whole."
        )
    first = source[by_index[0]]
    for part in by_index.values():
        if source[part] != first:
            raise ModelError(
                f"{where} has {part} as {source[part].dtype} {list(source[part].shape)}, but {by_index[0]} as {first.dtype} {list(first.shape)}."
            )
    return TensorSpec(first.dtype, (num_experts, *(first.shape[::-1] if name.endswith("up") else first.shape)))


def read_stacked(source: TensorSource, parts: list[str], name: str) -> torch.Tensor:
    """The tensor `name` of this package, made of the tensors `parts` of a checkpoint."""
    import torch

    if ".mlp.adapters." not in name:
        return source.read(parts[0])
    return torch.stack([source.read(part).T if name.endswith("up") else source.read(part) for part in parts])
