"""Writing the published layouts, for programs that read those alone: Camelidae, Qwen2idae, sparsetral.

    pesc export MODEL_DIR --format camelidae --out OUT_DIR        llama as camelidae, qwen2 as qwen2idae; pickles
    pesc export MODEL_DIR --format sparsetral --out OUT_DIR       mistral; safetensors

The inverse of `pesc.models.published`: importing the result gives the same tensors and the same sparse settings (but for `seed` and `dispatch`,
which those layouts cannot say and which change no trained model).

Contract: what the layout or the reference code cannot express is refused by name, never dropped.  One shard is in memory at a time.

Pitfalls
- `auto_map` names the modeling code of the published repositories, which is not written: put their `modeling_*.py` and `configuration_*.py` there.
- The reference code of Camelidae computes with a RoPE base of 10000 whatever config.json says (see the warning).
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pesc.errors import ModelError
from pesc.models.nf4_files import is_quantized
from pesc.models.pickle_files import PICKLE_INDEX_NAME, write_pickle
from pesc.models.tensor_files import TensorDirectory, TensorSpec, dtype_name, link_companions, plan_shards, write_sharded
from pesc.models.upcycle import check_complete, read_config, write_config

if TYPE_CHECKING:
    import torch

    from pesc.moe.config import PescConfig

logger = logging.getLogger(__name__)

MAX_SHARD_BYTES = 2_000_000_000
"""Largest file, and about what an export needs of memory."""
_EXPRESSED = {"num_experts", "top_k", "adapter_dim", "scaling"}
_HARMLESS = {"seed", "dispatch"}
"""Sparse settings that no published layout has, and that do not change what a trained model computes."""


@dataclass(frozen=True)
class Layout:
    """One published layout."""

    model_type: str
    expert: str
    """Name of an expert, with its number as {}."""
    architecture: str
    auto_map: Mapping[str, str]
    rope_types: tuple[str, ...]
    """Scalings of RoPE that the layout's modeling code knows."""
    pickled: bool


def _auto_map(name: str, config: str, dense: str) -> dict[str, str]:
    return {
        "AutoConfig": f"configuration_{name}.{config}",
        "AutoModel": f"modeling_{name}.{dense}Model",
        "AutoModelForCausalLM": f"modeling_{name}.{dense}ForCausalLM",
    }


LAYOUTS: dict[str, dict[str, Layout]] = {
    "camelidae": {
        "llama": Layout(
            "camelidae", "expert_{}", "modeling_camelidae.LlamaForCausalLM", _auto_map("camelidae", "CamelidaeConfig", "Llama"),
            ("default", "linear", "dynamic"), pickled=True,
        ),
        "qwen2": Layout(
            "qwen2idae", "expert_{}", "Qwen2ForCausalLM", _auto_map("qwen2idae", "Qwen2idaeConfig", "Qwen2"), ("default",), pickled=True
        ),
    },
    "sparsetral": {
        "mistral": Layout(
            "sparsetral", "{}", "modeling_sparsetral.MistralForCausalLM", _auto_map("sparsetral", "SparsetralConfig", "Mistral"),
            ("default",), pickled=False,
        ),
    },
}  # fmt: skip
"""Format -> dense architecture -> layout."""


def export_published(
    model_dir: Path,
    out_dir: Path,
    format_name: str,
    progress: Callable[..., None] = lambda *_args, **_kwargs: None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Layout:
    """Write the sparse model in `model_dir` in a published layout to the empty `out_dir`.

    Raises ModelError for a model that is not whole, not sparse, of an architecture that the format has no layout for, or that uses what
    the layout cannot express.
    """
    fields = read_config(model_dir)
    layout = choose_layout(fields, format_name, model_dir)
    if is_quantized(fields):
        raise ModelError(
            f"The weights of {model_dir} are quantised ({fields['quantization_config'].get('quant_method')}), which no published layout is: merge with "
            "merge.dtype bfloat16, or use --format remote-code, which keeps them as they are."
        )
    block = _read_block(fields, model_dir)
    _check_dense_options(fields, model_dir)
    source = TensorDirectory(model_dir)
    check_complete(fields, source.specs, model_dir)
    origins = _map_back(source.specs, layout, block.num_experts)
    specs = {name: spec for name, (_, _, spec) in origins.items()}
    config = published_config(fields, block, layout, source.specs, model_dir)
    _check_nothing_lost(fields, config, layout, model_dir)
    done = iter(range(1, len(specs) + 1))

    def make(name: str) -> torch.Tensor:
        progress(next(done), len(specs), unit="tensors", message=name)
        origin, expert, _ = origins[name]
        if expert is None:
            return source.read(origin)
        matrix = source.read_row(origin, expert)
        return matrix.T.contiguous() if origin.endswith("up") else matrix

    if layout.pickled:
        _write_pickled(out_dir, specs, max_shard_bytes, make)
    else:
        write_sharded(out_dir, specs, max_shard_bytes, make)
    write_config(out_dir, config)
    link_companions(model_dir, out_dir, code=False)
    return layout


def choose_layout(fields: Mapping[str, Any], format_name: str, where: Path) -> Layout:
    """The layout of a format for a model's architecture.  Raises ModelError naming what is possible."""
    model_type = str(fields.get("model_type"))
    if "pesc" not in fields:
        raise ModelError(f"{where} is a dense {model_type} model: a published layout has experts; run `pesc upcycle` first.")
    dense_type = model_type.removeprefix("pesc_")
    if dense_type not in LAYOUTS[format_name]:
        possible = [f"{dense} as {layout.model_type} (--format {name})" for name, rows in LAYOUTS.items() for dense, layout in rows.items()]
        raise ModelError(
            f"{where} is a {dense_type} model, which has no {format_name} layout: possible are {', '.join(possible)}; "
            "--format remote-code works for every architecture."
        )
    return LAYOUTS[format_name][dense_type]


def _read_block(fields: Mapping[str, Any], where: Path) -> PescConfig:
    """The sparse settings; all that the layouts cannot say are at their defaults."""
    from pesc.moe.config import PescConfig

    try:
        block = PescConfig.from_dict(fields["pesc"])
    except (ValueError, TypeError) as error:
        raise ModelError(f"{where / 'config.json'} cannot be used: {error}.") from error
    for field in dataclasses.fields(PescConfig):
        value = getattr(block, field.name)
        if field.name not in _EXPRESSED | _HARMLESS and value != field.default:
            raise ModelError(
                f"{where} has pesc.{field.name} {value!r}, which no published layout can express (their code computes with {field.default!r}): "
                "use --format remote-code."
            )
    return block


def published_config(
    fields: Mapping[str, Any], block: PescConfig, layout: Layout, specs: Mapping[str, TensorSpec], where: Path
) -> dict[str, Any]:
    """The config.json of the layout: the dense fields by their names of then, and the sparse settings at the top level."""
    own = {"pesc", "model_type", "architectures", "auto_map", "rope_parameters", "rope_scaling", "dtype", "torch_dtype", "layer_types"}
    kept = {name: value for name, value in fields.items() if name not in own}
    bank = next(spec for name, spec in specs.items() if name.endswith(".adapters.down"))
    return {
        **kept,
        **_rope_fields(fields, layout, where),
        "model_type": layout.model_type,
        "architectures": [layout.architecture],
        "auto_map": dict(layout.auto_map),
        "torch_dtype": fields.get("dtype") or fields.get("torch_dtype"),
        "num_experts": block.num_experts,
        "topk": block.top_k,
        "adapter_dim": block.adapter_dim,
        "moe_scaling": block.scaling,
        "moe_dtype": dtype_name(bank.dtype),
        "output_router_logits": False,
    }


def _check_dense_options(fields: Mapping[str, Any], where: Path) -> None:
    """The modeling code of the published models has no biases where its bases have none, and computes the width of a head."""
    for name in ("attention_bias", "mlp_bias"):
        if fields.get(name):
            raise ModelError(f"{where} has {name}, which no published layout can express: use --format remote-code.")
    width = fields["hidden_size"] // fields["num_attention_heads"]
    if (fields.get("head_dim") or width) != width:
        raise ModelError(
            f"{where} has head_dim {fields['head_dim']}, but the published layouts compute it as {width}: use --format remote-code."
        )


def _check_nothing_lost(fields: Mapping[str, Any], config: Mapping[str, Any], layout: Layout, where: Path) -> None:
    """The config, read back, describes the same dense model: whatever else the layout cannot express shows here."""
    from pesc.models.factory import architecture
    from pesc.models.published import convert_config

    classes = architecture(fields["model_type"])
    before, after = (classes.config.from_dict(dict(f)).to_dict() for f in (fields, convert_config(config, where)))
    (after.get("rope_parameters") or {}).pop("type", None)  # the old name of rope_type
    for name in classes.dense_config().to_dict().keys() - {"_name_or_path", "architectures", "model_type", "transformers_version"}:
        if before.get(name) != after.get(name):
            raise ModelError(
                f"{where} has {name} {before.get(name)!r}, which the {layout.model_type} layout cannot express (it would be read as "
                f"{after.get(name)!r}): use --format remote-code."
            )


def _rope_fields(fields: Mapping[str, Any], layout: Layout, where: Path) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling`, as transformers had them before 5."""
    rope = dict(fields.get("rope_parameters") or {})
    scaling = {**(fields.get("rope_scaling") or {}), **rope}
    theta = float(scaling.pop("rope_theta", fields.get("rope_theta", 10_000.0)))
    kind = scaling.pop("rope_type", scaling.pop("type", "default"))
    scaling.pop("type", None)
    if kind not in layout.rope_types:
        raise ModelError(
            f"{where} has RoPE of the type {kind!r}, but the {layout.model_type} layout has {', '.join(layout.rope_types)} alone: "
            "use --format remote-code."
        )
    if theta != 10_000.0 and layout.model_type == "camelidae":
        logger.warning("%s has rope_theta %g, but the modeling code of Camelidae computes with 10000: mend it there.", where, theta)
    said = {"rope_theta": theta} if rope or "rope_theta" in fields else {}
    return {**said, "rope_scaling": None if kind == "default" else {"type": kind, **scaling}}


def _map_back(specs: Mapping[str, TensorSpec], layout: Layout, num_experts: int) -> dict[str, tuple[str, int | None, TensorSpec]]:
    """Published name -> (our tensor, the expert's number in it or None, spec), each layer's experts after its FFN."""
    found: dict[str, tuple[str, int | None, TensorSpec]] = {}
    for name, spec in specs.items():
        if ".mlp.adapters." in name or ".mlp.router." in name:
            continue
        found[name] = (name, None, spec)
        if name.endswith(".mlp.down_proj.weight"):
            mlp = name.removesuffix(".down_proj.weight")
            found[f"{mlp}.moe_adapter.router.weight"] = (f"{mlp}.router.weight", None, specs[f"{mlp}.router.weight"])
            for expert in range(num_experts):
                for part in ("down", "up"):
                    bank = specs[f"{mlp}.adapters.{part}"]
                    shape = bank.shape[:0:-1] if part == "up" else bank.shape[1:]
                    key = f"{mlp}.moe_adapter.experts.{layout.expert.format(expert)}.adapter_{part}.weight"
                    found[key] = (f"{mlp}.adapters.{part}", expert, TensorSpec(bank.dtype, shape))
    return found


def _write_pickled(out_dir: Path, specs: Mapping[str, TensorSpec], max_bytes: int, make: Callable[[str], torch.Tensor]) -> None:
    shards = plan_shards(specs, max_bytes)
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"pytorch_model-{number:05}-of-{len(shards):05}.bin"
        write_pickle(out_dir / file, {name: make(name) for name in shard})
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": sum(spec.num_bytes for spec in specs.values())}, "weight_map": dict(sorted(weight_map.items()))}
    (out_dir / PICKLE_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
