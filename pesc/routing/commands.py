"""`pesc routing`: what the routers of a model do.

pesc routing 'demo:merge[pesc]' --out routing                     on the recipe's held-out rows; numbers and pictures
pesc routing 'demo:merge[pesc]' 'demo:upcycle[pesc]'              and how far it agrees with the model before training
pesc routing out/merged --texts rows.jsonl --layer 15 --json      on texts of your own: {"text": ..., "domain": ...}

Nothing here imports torch before the command runs.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pesc.errors import CancelledError, DataError, ModelError
from pesc.models.placement import Device
from pesc.routing.config import RoutingConfig
from pesc.settings import store_root

if TYPE_CHECKING:
    from pesc.model_argument import ModelPlace
    from pesc.routing.counts import Observation
    from pesc.routing.results import Agreement, RoutingResult
    from pesc.routing.rows import Row

_DEFAULTS = RoutingConfig()


class DType(StrEnum):
    """Type of the weights in memory."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


class Tokens(StrEnum):
    """Which tokens of held-out blocks count."""

    ALL = "all"
    ANSWERS = "answers"


@dataclass(frozen=True)
class _Source:
    """Where the rows come from: blocks of a tokenize object, or texts."""

    blocks: Path | None
    texts: Path | None
    tokens: str
    max_tokens: int


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command("routing")(routing)


def routing(
    model: Annotated[str, typer.Argument(help="Directory of a sparse model, or RECIPE:ADDRESS, e.g. 'demo:merge[pesc]'.", metavar="MODEL")],
    other: Annotated[str | None, typer.Argument(help="Another one, to compare the routing with.", metavar="[OTHER]")] = None,
    texts: Annotated[
        Path | None, typer.Option("--texts", help="JSON lines with `text` or `messages`, and `domain`.", metavar="F.jsonl")
    ] = None,
    blocks: Annotated[
        Path | None,
        typer.Option("--blocks", help="What `tokenize` wrote; its held-out rows are read. Default: the recipe's own.", metavar="DIR"),
    ] = None,
    layer: Annotated[int | None, typer.Option("--layer", min=0, help="Layer of the pictures by expert. Default: the middle one.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="New directory for routing.json, routing.md and the pictures.", metavar="DIR")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Everything as JSON on standard output.")] = False,
    tokens: Annotated[Tokens, typer.Option("--tokens", help="Of blocks: count all tokens, or those of answers alone.")] = Tokens.ALL,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Of texts: longer ones are cut.")] = 4096,
    permutations: Annotated[int, typer.Option(min=99, help="Shuffles of the rows' domains.")] = _DEFAULTS.permutations,
    seed: Annotated[int, typer.Option(min=0, help="Of the shuffles.")] = _DEFAULTS.seed,
    device: Annotated[Device, typer.Option("--device", help="auto: a GPU where there is one.")] = Device.AUTO,
    dtype: Annotated[DType, typer.Option("--dtype", help="Type of the weights in memory.")] = DType.FLOAT32,
    store: Annotated[Path | None, typer.Option("--store", help="Directory of the store. Default: $PESC_STORE or ./store.")] = None,
) -> None:
    """Say how a sparse model's experts are used: load, dead experts, who works together, and whether they take to a domain.

    With OTHER, also how often the two choose the same experts for the same tokens.
    """
    from pesc.model_argument import find_model

    root = store or store_root()
    places = [find_model(name, root) for name in ([model, other] if other else [model])]
    for place in places:
        _require_sparse(place)
    _check_layer(places[0], layer)
    source = _source(places[0], root, texts, blocks, str(tokens), max_tokens)
    if out is not None:
        from pesc.models.new_directory import check_free

        check_free(out)
    config = RoutingConfig(tokens=tokens.value, permutations=permutations, seed=seed, dtype=dtype.value)
    try:
        _run(places, source, config, str(device), layer, out, as_json)
    except KeyboardInterrupt:
        raise CancelledError("Interrupted.") from None


def _run(
    places: list[ModelPlace], source: _Source, config: RoutingConfig, device: str, layer: int | None, out: Path | None, as_json: bool
) -> None:
    from pesc.routing.agreement import compare_routing
    from pesc.routing.measures import measure

    rows = _read_rows(places, source)
    seen = [_observe(place, rows, config, device) for place in places]
    result, *others = [measure(one, config) for one in seen]
    before = (places[1].name, others[0]) if others else None
    if layer is not None and layer not in (there := [entry.layer for entry in result.layers]):
        raise ModelError(f"--layer is {layer}, but {places[0].name} has routers in the layers {_ranges(there)}.")
    agreement = compare_routing(seen[0], seen[1], places[0].name, places[1].name, config.seed) if len(seen) > 1 else None
    if out is not None:
        _write(out, places[0].name, result, before, agreement, layer)
    if as_json:
        found = {"routing": result, "other": before and before[1], "agreement": agreement}
        print(json.dumps({key: value and value.model_dump(mode="json") for key, value in found.items()}, ensure_ascii=False))
    else:
        _print(result, before, agreement)
        if out is not None:
            print(f"\n{out}")


def _require_sparse(place: ModelPlace) -> None:
    """A dense model is told before torch is imported; what config.json does not say, the routers will."""
    if "pesc" not in place.fields and place.fields.get("model_type") != "mixtral":
        raise ModelError(
            f"{place.name} is dense: it has no router, so there is no routing to look at. Give a sparse model, such as 'demo:merge[pesc]'."
        )


def _check_layer(place: ModelPlace, layer: int | None) -> None:
    """The same for a layer that the model has not."""
    layers = place.fields.get("num_hidden_layers")
    if layer is not None and isinstance(layers, int) and layer >= layers:
        raise ModelError(f"--layer is {layer}, but {place.name} has the layers 0 to {layers - 1}.")


def _source(place: ModelPlace, root: Path, texts: Path | None, blocks: Path | None, tokens: str, max_tokens: int) -> _Source:
    if texts is not None and blocks is not None:
        raise DataError("--texts and --blocks are both given: one of them.")
    if texts is not None and tokens == "answers":
        raise DataError("--tokens answers needs --blocks: texts do not say which of their tokens are an answer.")
    if texts is None and blocks is None:
        blocks = _own_blocks(place, root)
    return _Source(blocks, texts, tokens, max_tokens)


def _own_blocks(place: ModelPlace, root: Path) -> Path:
    """The tokenize object of the model's recipe."""
    from pesc.plan import make_plan
    from pesc.store import Store

    if place.recipe is None:
        raise DataError("There are no rows to route: give texts with --texts, or what `tokenize` wrote with --blocks.")
    store = Store(root)
    action = next(action for action in make_plan(place.recipe, store) if action.address == "tokenize")
    if action.manifest is None:
        raise DataError(
            f"tokenize of recipe {place.recipe.name!r} is not in the store {root} ({action.reason}): run `pesc run {place.recipe.name} --until "
            "tokenize`, or give texts with --texts."
        )
    return store.open(action.manifest.ref)


def _read_rows(places: list[ModelPlace], source: _Source) -> list[Row]:
    import sys

    from pesc.routing import rows

    if source.blocks is not None:
        return rows.read_blocks(source.blocks, source.tokens, blocks_per_domain=_DEFAULTS.blocks_per_domain)
    assert source.texts is not None
    from pesc.routing.loading import load_tokenizer

    tokenizers = [load_tokenizer(place.directory, place.name) for place in places]
    if any(tokenizer.get_vocab() != tokenizers[0].get_vocab() for tokenizer in tokenizers[1:]):
        raise ModelError(f"{places[0].name} and {places[1].name} have other tokens than one another: their routing cannot be compared.")
    found, cut = rows.read_texts(source.texts, tokenizers[0], source.max_tokens)
    if cut:
        print(f"{cut} of {len(found)} texts are cut to {source.max_tokens} tokens.", file=sys.stderr)
    return found


def _observe(place: ModelPlace, rows: list[Row], config: RoutingConfig, device: str) -> Observation:
    from pesc.console import progress_bar
    from pesc.routing.counts import observe
    from pesc.routing.loading import load_model

    with progress_bar(f"routing {place.name}") as progress:
        return observe(load_model(place.directory, place.name, config.dtype, device), rows, place.name, progress)


def _write(
    out: Path, name: str, result: RoutingResult, before: tuple[str, RoutingResult] | None, agreement: Agreement | None, layer: int | None
) -> None:
    from pesc.figures import png_bytes, svg_text
    from pesc.markdown import markdown_table
    from pesc.models.new_directory import new_directory
    from pesc.routing import plots, tables
    from pesc.routing.results import write_result

    figures = plots.draw(result, layer, before) | ({"agreement": plots.plot_agreement(agreement)} if agreement else {})
    with new_directory(out) as folder:
        write_result(folder, result)
        text = tables.routing_markdown({name: result, **dict([before] if before else [])}, level=1)
        if agreement:
            (folder / "agreement.json").write_text(agreement.model_dump_json() + "\n", encoding="utf-8")
            table = markdown_table(tables.AGREEMENT_HEAD, tables.agreement_rows(agreement), numbers=range(len(tables.AGREEMENT_HEAD)))
            text += f"\n## Agreement with {agreement.other}, % of the tokens\n\n{table}\n"
        (folder / "routing.md").write_text(text, encoding="utf-8")
        for stem, figure in figures.items():
            (folder / f"{stem}.svg").write_text(svg_text(figure), encoding="utf-8")
            (folder / f"{stem}.png").write_bytes(png_bytes(figure))


def _print(result: RoutingResult, before: tuple[str, RoutingResult] | None, agreement: Agreement | None) -> None:
    from pesc.routing import tables

    print("\n".join(tables.sentences(result)))
    print(f"\n{tables.plain_table(tables.HEAD, tables.layer_rows(result))}\n\n" + "\n".join(tables.NOTES))
    if before and agreement:
        print(f"\n{before[0]}: " + " ".join(tables.sentences(before[1])[1:]))
        print(f"\nAgreement of the two, % of the tokens\n\n{tables.plain_table(tables.AGREEMENT_HEAD, tables.agreement_rows(agreement))}")


def _ranges(numbers: list[int]) -> str:
    """`0-3, 5`."""
    runs: list[list[Any]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{a}-{b}" if a != b else str(a) for a, b in runs)
