"""Reading published PESC checkpoints: Camelidae, Qwen2idae, sparsetral.

    python -m pesc.models.published CHECKPOINT_DIR OUT_DIR

They are dense directories with extra tensors in each layer, one pair an expert:

    model.layers.{l}.mlp.moe_adapter.router.weight                                     [E, H]
    model.layers.{l}.mlp.moe_adapter.experts.expert_{e}.adapter_down.weight            [R, H]    (sparsetral: experts.{e}.)
    model.layers.{l}.mlp.moe_adapter.experts.expert_{e}.adapter_up.weight              [H, R]    stored transposed to this package's bank

E experts, R adapter width, H hidden.  The shape is in top-level fields of config.json: num_experts, topk, adapter_dim, moe_scaling.

Contract: pickles are read with `weights_only`, so that no code of a checkpoint runs.  Every expert of every layer must be there.

Pitfalls
- `top_k` in those configs is a leftover of generation (50); the experts of a token are `topk`.
- Re-saved checkpoints say model_type "llama": they are recognised by `adapter_dim` and `num_experts`.
- The reference code ignores rope_theta; this package uses the config's.  Check a Yi-based checkpoint by its perplexity.
"""

from __future__ import annotations

import argparse
import json
import pickle
import re
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pesc.errors import ModelError
from pesc.models.tensor_files import (
    INDEX_NAME,
    SINGLE_NAME,
    TensorDirectory,
    TensorSpec,
    dtype_code,
    link_companions,
    plan_shards,
    write_index,
    write_tensors,
)

if TYPE_CHECKING:
    import torch

_EXPERT = re.compile(r"(model\.layers\.\d+\.mlp)\.moe_adapter\.experts\.(?:expert_)?(\d+)\.adapter_(down|up)\.weight")
_ROUTER = re.compile(r"(model\.layers\.\d+\.mlp)\.moe_adapter\.router\.weight")
_DENSE_TYPES = {"camelidae": "llama", "qwen2idae": "qwen2", "sparsetral": "mistral"}
_SCALINGS = {"sparsetral": 1.0}
"""`moe_scaling` where the config does not say it: the default of the class that the checkpoint names (0.25 for all others)."""
_MAX_SHARD_BYTES = 5_000_000_000


class PickleDirectory:
    """The tensors of a directory with `pytorch_model*.bin`, with the interface of `TensorDirectory`; memory-mapped, never executed."""

    def __init__(self, directory: Path):
        self.directory = directory
        index, single = directory / "pytorch_model.bin.index.json", directory / "pytorch_model.bin"
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())) if index.is_file() else [single.name]
        for file in files:
            if not (directory / file).is_file():
                raise ModelError(f"{directory} lacks the shard {file}: download the model again.")
        self._names = files

    @cached_property
    def _tensors(self) -> dict[str, torch.Tensor]:
        import torch

        tensors: dict[str, torch.Tensor] = {}
        for file in self._names:
            try:
                tensors |= torch.load(self.directory / file, map_location="cpu", weights_only=True, mmap=True)
            except (pickle.UnpicklingError, RuntimeError) as error:
                raise ModelError(
                    f"{self.directory / file} is not a plain file of tensors, so it is not opened: {str(error).splitlines()[0]}"
                ) from error
        return tensors

    @cached_property
    def specs(self) -> dict[str, TensorSpec]:
        """Tensor name -> spec."""
        return {name: TensorSpec(dtype_code(str(t.dtype).removeprefix("torch.")), tuple(t.shape)) for name, t in self._tensors.items()}

    def read(self, name: str) -> torch.Tensor:
        """One tensor."""
        return self._tensors[name]


def is_published(fields: Mapping[str, Any]) -> bool:
    """Whether a config.json is of a checkpoint in the published layout."""
    return "adapter_dim" in fields and "num_experts" in fields and "pesc" not in fields


def import_published(model_dir: Path, out_dir: Path, progress: Callable[..., None] = lambda *_args, **_kwargs: None) -> dict[str, Any]:
    """Write a published checkpoint in this package's layout to the empty `out_dir`; returns the `pesc` block.

    Raises ModelError for an unknown base architecture, a missing field of the config, or a missing expert.
    """
    from pesc.models.upcycle import check_complete, read_config, write_config

    source = TensorDirectory(model_dir) if _has_safetensors(model_dir) else PickleDirectory(model_dir)
    fields = convert_config(read_config(model_dir), model_dir)
    origins, specs = _map_tensors(source.specs, fields["pesc"]["num_experts"], model_dir)
    check_complete(fields, specs, model_dir)
    done = iter(range(1, len(specs) + 1))

    def make(name: str) -> torch.Tensor:
        progress(next(done), len(specs), unit="tensors", message=name)
        return _read_stacked(source, origins[name], transpose=name.endswith("adapters.up"))

    shards = plan_shards(specs, _MAX_SHARD_BYTES)
    names = [SINGLE_NAME] if len(shards) == 1 else [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    for file, shard in zip(names, shards, strict=True):
        write_tensors(out_dir / file, shard, make)
    if len(shards) > 1:
        files = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        write_index(out_dir, files, sum(spec.num_bytes for spec in specs.values()))
    write_config(out_dir, fields)
    link_companions(model_dir, out_dir)
    for code in out_dir.glob("*.py"):
        code.unlink()  # the checkpoint's own modeling code; it does not run on current transformers
    return fields["pesc"]


def _has_safetensors(model_dir: Path) -> bool:
    named = any((model_dir / name).is_file() for name in (SINGLE_NAME, INDEX_NAME))
    return named or not any(model_dir.glob("pytorch_model*.bin"))


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
    block = PescConfig(fields["num_experts"], fields["topk"], fields["adapter_dim"], scaling)
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


def _map_tensors(source: Mapping[str, TensorSpec], num_experts: int, where: Path) -> tuple[dict[str, list[str]], dict[str, TensorSpec]]:
    """Our name -> the tensors it is made of, and our name -> its spec; dense tensors in the checkpoint's order, then the bank."""
    origins: dict[str, list[str]] = {}
    experts: dict[str, dict[int, str]] = {}
    for name in source:
        if match := _EXPERT.fullmatch(name):
            experts.setdefault(f"{match[1]}.adapters.{match[3]}", {})[int(match[2])] = name
        elif match := _ROUTER.fullmatch(name):
            origins[f"{match[1]}.router.weight"] = [name]
        elif ".moe_adapter." in name:
            raise ModelError(f"{where} has {name}, a layout of experts that is not known: map it in pesc.models.published.")
        elif not name.endswith("rotary_emb.inv_freq"):
            origins[name] = [name]
    specs = {name: source[parts[0]] for name, parts in origins.items()}
    for name, by_index in experts.items():
        if sorted(by_index) != list(range(num_experts)):
            raise ModelError(
                f"{where} has experts {sorted(by_index)} in {name}, but config.json says there are {num_experts}: the checkpoint is not whole."
            )
        parts = [by_index[index] for index in range(num_experts)]
        shape = source[parts[0]].shape
        specs[name] = TensorSpec(source[parts[0]].dtype, (num_experts, *(shape[::-1] if name.endswith("up") else shape)))
        origins[name] = parts
    return origins, specs


def _read_stacked(source: TensorDirectory | PickleDirectory, parts: list[str], transpose: bool) -> torch.Tensor:
    import torch

    if len(parts) == 1 and not transpose and "moe_adapter.experts" not in parts[0]:
        return source.read(parts[0])
    return torch.stack([source.read(part).T if transpose else source.read(part) for part in parts])


def main() -> None:
    """Command line of this module: convert one published checkpoint."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True)
    print(import_published(arguments.checkpoint, arguments.out))


if __name__ == "__main__":
    main()
