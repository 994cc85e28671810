"""The commands that convert models: `pesc upcycle`, `pesc import`, `pesc export`.

pesc upcycle llama-2-7b --out llama-8x7b                                 a dense model, with adapters that change nothing yet
pesc import Camelidae-8x7B --out camelidae                               a published checkpoint
pesc import checkpoint-1000 --base llama-2-7b --top-k 2 --scaling 1 --out mine    a training checkpoint of the reference code
pesc export camelidae --format remote-code --out to-share                back, for others

Contract: OUT appears whole or not at all (`pesc.models.new_directory`).  Nothing here imports torch before a command runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import ValidationError

from pesc.errors import ModelError
from pesc.models.config import UpcycleConfig

if TYPE_CHECKING:
    pass

FORMATS = ("camelidae", "sparsetral", "remote-code")
_DEFAULTS = UpcycleConfig()

Out = Annotated[Path, typer.Option("--out", help="Directory to make; it must be new or empty.", metavar="DIR")]
_LABELS = {
    "dense_parameters": "dense parameters",
    "added_parameters": "added parameters",
    "total_parameters": "total parameters",
    "active_parameters": "active parameters",
}


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    app.command("upcycle")(upcycle)
    app.command("import")(import_checkpoint)
    app.command("export")(export)


def upcycle(
    model: Annotated[Path, typer.Argument(help="Directory of a dense Hugging Face model.", metavar="MODEL")],
    out: Out,
    num_experts: Annotated[int, typer.Option(help="Adapters on each shared FFN (E).")] = _DEFAULTS.num_experts,
    top_k: Annotated[int, typer.Option(help="Adapters that a token uses (K).")] = _DEFAULTS.top_k,
    adapter_dim: Annotated[int, typer.Option(help="Width of an adapter (R).")] = _DEFAULTS.adapter_dim,
    scaling: Annotated[float, typer.Option(help="Factor on the adapters' sum.")] = _DEFAULTS.scaling,
    seed: Annotated[int, typer.Option(help="Seed of the start values.")] = _DEFAULTS.seed,
    dtype: Annotated[str, typer.Option(help="Type of the added tensors: bfloat16 or float32.")] = _DEFAULTS.dtype,
    dispatch: Annotated[str, typer.Option(help="How the adapters run: auto, dense, grouped, segments or reference.")] = _DEFAULTS.dispatch,
    adapter_input: Annotated[str, typer.Option(help="What the adapters read: ffn_output or ffn_input.")] = _DEFAULTS.adapter_input,
    layer_experts: Annotated[str | None, typer.Option(help="Adapters of each layer, with commas; 0 leaves a layer dense.")] = None,
    shared_adapter_dim: Annotated[
        int, typer.Option(help="Width of one more adapter that every token uses.")
    ] = _DEFAULTS.shared_adapter_dim,
) -> None:
    """Make a dense model sparse.  Its weights are linked, not copied; at first both compute the same."""
    from pesc.console import progress_bar
    from pesc.models.new_directory import new_directory
    from pesc.models.published import is_published
    from pesc.models.upcycle import read_config, upcycle_directory

    config = _upcycle_config(
        {
            "num_experts": num_experts,
            "top_k": top_k,
            "adapter_dim": adapter_dim,
            "scaling": scaling,
            "seed": seed,
            "dtype": dtype,
            "dispatch": dispatch,
            "adapter_input": adapter_input,
            "shared_adapter_dim": shared_adapter_dim,
            "layer_experts": layer_experts.split(",") if layer_experts else None,
        }
    )
    if is_published(read_config(model)):
        raise ModelError(f"{model} is a trained sparse model already: read it with `pesc import {model} --out {out}`.")
    with progress_bar("upcycle") as progress, new_directory(out) as building:
        counts = upcycle_directory(model, building, config, progress)
    experts = f"{min(filter(None, config.layer_experts))} to {max(config.layer_experts)}" if config.layer_experts else str(num_experts)
    _print_model(counts, f"{top_k} of {experts} experts", out)


def _upcycle_config(values: Mapping[str, Any]) -> UpcycleConfig:
    try:
        return UpcycleConfig.model_validate(values)
    except ValidationError as error:
        parts = []
        for item in error.errors():
            option = f"--{str(item['loc'][0]).replace('_', '-')} {item['input']}: " if item["loc"] else ""
            parts.append(option + item["msg"].removeprefix("Value error, "))
        raise ModelError(f"These settings cannot be used: {'; '.join(parts)}.") from None


def import_checkpoint(
    checkpoint: Annotated[Path, typer.Argument(help="A published checkpoint, or a checkpoint-N of the reference code.", metavar="CKPT")],
    out: Out,
    base: Annotated[Path | None, typer.Option(help="Dense base of a training checkpoint.", metavar="DENSE_DIR")] = None,
    top_k: Annotated[int | None, typer.Option(help="Adapters that a token uses; training checkpoints do not say it.")] = None,
    scaling: Annotated[float | None, typer.Option(help="Factor on the adapters' sum; training checkpoints do not say it.")] = None,
) -> None:
    """Read a Camelidae, Qwen2idae or sparsetral checkpoint, or a training checkpoint of the reference code over its dense base."""
    from pesc.console import progress_bar
    from pesc.models.new_directory import new_directory
    from pesc.models.published import import_published
    from pesc.models.training_checkpoint import import_training, is_training_checkpoint
    from pesc.models.upcycle import count_directory

    if is_training_checkpoint(checkpoint):
        dense, used, factor = _training_options(checkpoint, base, top_k, scaling)
        with progress_bar("import") as progress, new_directory(out) as building:
            done = import_training(checkpoint, dense, building, used, factor, progress)
            counts = count_directory(building)
        print("LoRA folded into {folded} weights, {copied} copied, {stacked} routers and banks".format(**done))
        _print_model(counts, f"{used} experts", out)
        return
    _check_published(checkpoint, base, top_k, scaling)
    with progress_bar("import") as progress, new_directory(out) as building:
        block = import_published(checkpoint, building, progress)
        counts = count_directory(building)
    _print_model(counts, f"{block['top_k']} of {block['num_experts']} experts", out)


def _training_options(checkpoint: Path, base: Path | None, top_k: int | None, scaling: float | None) -> tuple[Path, int, float]:
    """What a training checkpoint does not hold.  Raises ModelError naming what is not given."""
    if base is not None and top_k is not None and scaling is not None:
        return base, top_k, scaling
    given = {"--base": base, "--top-k": top_k, "--scaling": scaling}
    missing = [option for option, value in given.items() if value is None]
    raise ModelError(
        f"{checkpoint} is a training checkpoint of the reference code, which does not hold its dense base, the number of experts of a token or the "
        f"factor on their sum: give {', '.join(missing)} (that code's training script has topk 2, scaling 1 and adapter_dim 64; its merge script "
        "assumes scaling 0.25 and adapter_dim 512)."
    )


def _check_published(checkpoint: Path, base: Path | None, top_k: int | None, scaling: float | None) -> None:
    from pesc.models.published import is_published
    from pesc.models.upcycle import read_config

    fields = read_config(checkpoint)
    if "pesc" in fields:
        raise ModelError(f"{checkpoint} is in this package's layout already: there is nothing to import.")
    if not is_published(fields):
        raise ModelError(
            f"{checkpoint} is no sparse checkpoint: its config.json has no adapter_dim and num_experts, and it holds no moe_model.bin; a dense "
            "model becomes sparse with `pesc upcycle`."
        )
    if base is not None or top_k is not None or scaling is not None:
        raise ModelError(f"{checkpoint} says itself what it is: leave out --base, --top-k and --scaling.")


def export(
    model: Annotated[
        str, typer.Argument(help="Directory of a sparse model, or RECIPE:ADDRESS in the store, e.g. 'demo:merge[pesc]'.", metavar="MODEL")
    ],
    out: Out,
    format_name: Annotated[str, typer.Option("--format", help="camelidae, sparsetral or remote-code.", metavar="FORMAT")],
    store: Annotated[Path | None, typer.Option("--store", help="Directory of the store. Default: $PESC_STORE or ./store.")] = None,
) -> None:
    """Write a sparse model for others: in a published layout, or with its own code (`trust_remote_code=True`).

    A model of the store gets its model card (README.md).
    """
    from pesc.console import progress_bar
    from pesc.model_argument import find_model
    from pesc.model_card import write_model_card
    from pesc.models.new_directory import new_directory
    from pesc.settings import store_root
    from pesc.store import Store

    if format_name == "gguf":
        raise ModelError(
            "There is no GGUF of a sparse model: llama.cpp has no architecture with adapters on the FFN's output, and would run the file as the dense "
            "model, without its experts and without a word; serve it with `pesc serve`, or export it with --format remote-code."
        )
    if format_name not in FORMATS:
        raise ModelError(f"There is no format {format_name!r}: it must be one of {', '.join(FORMATS)}.")
    with progress_bar("export") as progress, new_directory(out) as building:
        place = find_model(model, store or store_root())
        if format_name == "remote-code":
            from pesc.models.export import export_remote_code

            export_remote_code(place.directory, building)
        else:
            from pesc.models.export_published import export_published

            export_published(place.directory, building, format_name, progress)
        if place.recipe is not None:
            write_model_card(place.recipe, place.address, Store(store or store_root()), building)
    print(out)


def _print_model(counts: Mapping[str, Any], used: str, out: Path) -> None:
    for name, label in _LABELS.items():
        print(f"{label:<18} {counts[name]:>18,}" + (f"  ({used})" if name == "active_parameters" else ""))
    print(out)
