"""The `upcycle` stage: a dense model directory becomes a sparse one without touching a dense weight.

    pesc upcycle DENSE_DIR --out SPARSE_DIR

The dense shards are hard links, `bank.safetensors` holds every router and bank, the index names both, config.json becomes the sparse
model's.  The `up` projections are zero, so that the sparse model is the dense model exactly.  The bank is drawn and written in small
pieces: memory does not grow with the model.  The zeros of `up` are holes in its file.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pesc.errors import ModelError
from pesc.models.config import UpcycleConfig
from pesc.models.nf4_files import weight_specs
from pesc.models.published import convert_config, import_published, is_derived, is_published
from pesc.models.tensor_files import (
    SINGLE_NAME,
    TensorDirectory,
    TensorSpec,
    dtype_code,
    link_companions,
    link_file,
    write_chunks,
    write_index,
)
from pesc.stage import BuildResult, StageContext

if TYPE_CHECKING:
    import torch

    from pesc.moe.config import PescConfig

logger = logging.getLogger(__name__)

BANK_NAME = "bank.safetensors"
_WRITE_ELEMENTS = 1 << 19
"""Values of the bank in one write."""
DENSE_NAME = "model-00001-of-00001.safetensors"
"""Name of a single dense shard in the sparse directory: transformers would read `model.safetensors` alone and never see the bank."""


def build(ctx: StageContext) -> BuildResult:
    """Build the sparse directory of `ctx.inputs["model"]` in `ctx.out`."""
    from pesc.models.mixtral import upcycle_whole

    upcycle = upcycle_whole if ctx.config.kind == "whole" else upcycle_directory
    metrics = upcycle(ctx.inputs["model"], ctx.out, ctx.config, progress=ctx.progress)
    return BuildResult(metrics=metrics)


def upcycle_directory(model_dir: Path, out_dir: Path, config: UpcycleConfig, progress=lambda *_args, **_kwargs: None) -> dict[str, Any]:
    """Write the sparse form of the dense model in `model_dir` to the empty `out_dir`; returns parameter counts.

    Raises ModelError for a model that is sparse or quantised already, of an unknown architecture, or whose files are not complete.
    """
    if is_published(read_config(model_dir)):
        return _import_checked(model_dir, out_dir, config, progress)
    dense = TensorDirectory(model_dir)
    fields = sparse_config_fields(model_dir, config)
    bank = bank_specs(fields["num_hidden_layers"], fields["hidden_size"], config, model_dir)
    check_complete(fields, {**dense.specs, **bank}, model_dir)

    files = {}
    for file in sorted(set(dense.files.values())):
        target = DENSE_NAME if file == SINGLE_NAME else file
        if target == BANK_NAME:
            raise ModelError(f"{model_dir} has a shard named {BANK_NAME}, which is where the bank goes: rename it, there and in the index.")
        link_file(model_dir / file, out_dir / target)
        files |= {name: target for name, source in dense.files.items() if source == file}
    _write_bank(out_dir / BANK_NAME, bank, config, progress)
    files |= dict.fromkeys(bank, BANK_NAME)
    write_index(out_dir, files, sum(spec.num_bytes for spec in (*dense.specs.values(), *bank.values())))
    write_config(out_dir, fields)
    link_companions(model_dir, out_dir)
    return count_parameters(dense.specs, bank, config)


def _import_checked(model_dir: Path, out_dir: Path, config: UpcycleConfig, progress) -> dict[str, Any]:
    """A published sparse checkpoint is converted, not upcycled; the settings must say what it is, as they are what the run records."""
    fields = read_config(model_dir)
    found = convert_config(fields, model_dir)["pesc"]
    for name in ("num_experts", "top_k", "adapter_dim", "scaling"):
        if found[name] != getattr(config, name):
            raise ModelError(
                f"{model_dir} is a trained sparse model with {name} {found[name]}, not {getattr(config, name)}: set upcycle.{name}={found[name]}."
            )
    plain = UpcycleConfig()
    for name in ("adapter_input", "layer_experts", "shared_adapter_dim"):
        if getattr(config, name) != getattr(plain, name):
            raise ModelError(
                f"{model_dir} is a trained sparse model of the paper's kind: upcycle.{name} cannot be {getattr(config, name)}; leave it out."
            )
    import_published(model_dir, out_dir, progress)
    written = read_config(out_dir)
    write_config(out_dir, written | {"pesc": written["pesc"] | {"dispatch": config.dispatch}})
    return count_directory(out_dir)


def sparse_config_fields(model_dir: Path, config: UpcycleConfig) -> dict[str, Any]:
    """The sparse config.json: the dense one field by field, another model_type, and the `pesc` block."""
    from pesc.models.factory import architecture_of, is_sparse

    fields = read_config(model_dir)
    if is_sparse(fields):
        raise ModelError(f"{model_dir} is a sparse model already ({fields['model_type']}): upcycle its dense base instead.")
    if fields.get("quantization_config"):
        raise ModelError(
            f"{model_dir} is quantised ({fields['quantization_config'].get('quant_method')}): upcycle the unquantised model instead."
        )
    classes = architecture_of(fields)
    for name in ("num_hidden_layers", "hidden_size"):
        if not isinstance(fields.get(name), int):
            raise ModelError(f"{model_dir / 'config.json'} does not say {name}: download the model again.")
    for name in ("_name_or_path", "auto_map", "transformers_version"):
        fields.pop(name, None)
    return fields | {"model_type": classes.model_type, "architectures": [classes.causal_lm.__name__], "pesc": config.block().to_dict()}


def read_config(model_dir: Path) -> dict[str, Any]:
    """config.json of a model directory.  Raises ModelError when there is none or it is not JSON."""
    path = model_dir / "config.json"
    if not path.is_file():
        raise ModelError(f"{model_dir} has no config.json: give the directory of a Hugging Face model.")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} is not JSON ({error}): download the model again.") from error
    if not isinstance(fields, dict):
        raise ModelError(f"{path} must hold a map of settings, not {type(fields).__name__}: download the model again.")
    return fields


def write_config(out_dir: Path, fields: dict[str, Any]) -> None:
    """Write config.json, sorted, so that equal settings are equal bytes."""
    (out_dir / "config.json").write_text(json.dumps(fields, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def bank_specs(num_layers: int, hidden_size: int, config: UpcycleConfig, where: Path) -> dict[str, TensorSpec]:
    """Name -> spec of every tensor that the sparse model has and the dense one lacks, in layer order.

    Raises ModelError when `layer_experts` does not name each layer once.
    """
    if config.layer_experts is not None and len(config.layer_experts) != num_layers:
        raise ModelError(f"layer_experts names {len(config.layer_experts)} layers, but {where} has {num_layers}: give one number a layer.")
    dtype, width, shared, block = dtype_code(config.dtype), config.adapter_dim, config.shared_adapter_dim, config.block()
    specs = {}
    for layer in range(num_layers):
        experts = block.experts_of(layer)
        shapes: dict[str, tuple[int, ...]] = {
            "adapters.down": (experts, width, hidden_size),
            "adapters.up": (experts, width, hidden_size),
            "adapters.shared_down": (shared, hidden_size),
            "adapters.shared_up": (shared, hidden_size),
            "router.weight": (experts, hidden_size),
        }
        specs |= {f"model.layers.{layer}.mlp.{part}": TensorSpec(dtype, shape) for part, shape in shapes.items() if experts and shape[0]}
    return specs


def _write_bank(path: Path, specs: dict[str, TensorSpec], config: UpcycleConfig, progress) -> None:
    import torch

    from pesc.moe.initial import draw_initial_chunks, starts_at_zero

    dtype, count = getattr(torch, config.dtype), iter(range(1, len(specs) + 1))

    def draw(name: str) -> Iterator[torch.Tensor]:
        buffer, used = torch.empty(_WRITE_ELEMENTS, dtype=dtype), 0
        for piece in draw_initial_chunks(name.removeprefix("model."), specs[name].shape, config.seed):
            buffer[used : used + len(piece)].copy_(piece)
            used += len(piece)
            if used + len(piece) > len(buffer):
                yield buffer[:used]
                used = 0
        yield buffer[:used]

    def chunks(name: str) -> Iterator[torch.Tensor] | None:
        return None if starts_at_zero(name) else draw(name)

    write_chunks(path, specs, chunks, done=lambda name: progress(next(count), len(specs), unit="tensors", message=name))


def expected_specs(fields: dict[str, Any], where: Path) -> dict[str, tuple[tuple[int, ...], bool]]:
    """Name -> shape, and whether it may be absent (tied to another), of every tensor that a model of this config has; allocates nothing."""
    import torch

    from pesc.models.factory import causal_lm_of

    try:
        with torch.device("meta"):
            model = causal_lm_of(fields)
    except ModelError:
        raise
    except Exception as error:  # whatever the architecture makes of a wrong value
        reason = " ".join(str(error).split()) or repr(error)
        raise ModelError(f"{where / 'config.json'} does not describe a model that transformers can build: {reason}") from error
    return {name: (tuple(tensor.shape), name in model.all_tied_weights_keys) for name, tensor in model.state_dict().items()}


def check_complete(fields: dict[str, Any], specs: dict[str, TensorSpec], where: Path) -> None:
    """Every tensor of the architecture is there in its shape, and no other is.  Raises ModelError naming the first that is not so."""
    expected = expected_specs(fields, where)
    for name, (shape, optional) in expected.items():
        if name not in specs:
            if optional:
                continue
            raise ModelError(f"{where} lacks the tensor {name}, which a {fields['model_type']} of this config.json must have.")
        if specs[name].shape != shape:
            raise ModelError(f"{where} has {name} as {list(specs[name].shape)}, but config.json says {list(shape)}.")
    for name in specs:
        if name not in expected and not is_derived(name):
            raise ModelError(
                f"{where} has the tensor {name}, which a {fields['model_type']} of this config.json does not have: it would be lost in silence."
            )


def count_directory(sparse_dir: Path) -> dict[str, Any]:
    """The counts of a sparse directory of this package."""
    from pesc.moe.config import PescConfig

    specs = weight_specs(TensorDirectory(sparse_dir))
    bank = {name: spec for name, spec in specs.items() if ".mlp.adapters." in name or ".mlp.router." in name}
    dense = {name: spec for name, spec in specs.items() if name not in bank}
    bank = {name: spec for name, spec in bank.items() if not name.endswith(".bias_steps")}  # counted, not trained: no parameters
    return count_parameters(dense, bank, PescConfig.from_dict(read_config(sparse_dir)["pesc"]))


def count_parameters(dense: dict[str, TensorSpec], bank: dict[str, TensorSpec], config: UpcycleConfig | PescConfig) -> dict[str, Any]:
    """Parameters of the dense model, added ones, all, and those that one token uses."""
    added = sum(spec.num_elements for spec in bank.values())
    routed = [spec for name, spec in bank.items() if name.endswith((".adapters.down", ".adapters.up"))]
    idle = sum(spec.num_elements // spec.shape[0] * (spec.shape[0] - config.top_k) for spec in routed)
    base = sum(spec.num_elements for spec in dense.values())
    return {"dense_parameters": base, "added_parameters": added, "total_parameters": base + added, "active_parameters": base + added - idle}
