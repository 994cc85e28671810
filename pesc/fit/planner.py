"""A recipe's trained arms on a device: what they need as they are set, and what would be better."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pesc.devices import DEVICES, Device
from pesc.errors import RecipeError
from pesc.fit.speed import ROW_TOKENS, Speed, speed_of, tokens_per_second
from pesc.recipe import Recipe
from pesc.store import Store
from pesc.train.config import TrainConfig
from pesc.train.memory.need import (
    Layout,
    Need,
    Run,
    fitting_layouts,
    largest_micro_batch,
    micro_batches,
    need_of,
    smallest_need,
    usable_bytes,
)
from pesc.train.memory.shapes import KNOWN_BASES, ModelShape, known_shape, read_shape, unknown_shape
from pesc.train.order import check_batch, count_steps

COUNTS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Option:
    """A layout, what it needs, and how fast it would be."""

    layout: Layout
    need: Need
    speed: Speed


@dataclass(frozen=True)
class ArmFit:
    """One arm on the device."""

    arm: str
    run: Run
    tokens: int
    """Of all its steps."""
    usable: int
    """Bytes that one GPU's plan may have."""
    as_set: Option
    largest: int
    """Micro-batch with the recipe's ZeRO stage and checkpointing; 0 when none fits."""
    best: Option | None
    """The fastest that fits; None when none does."""
    instead: tuple[str, ...]
    """Devices that would do, where none fits."""

    @property
    def fits(self) -> bool:
        """Whether the recipe's own settings fit."""
        return self.as_set.need.total <= self.usable


@dataclass(frozen=True)
class Question:
    """What was asked beside the recipe."""

    device: Device
    gpus: int
    blocks: int
    """Packed blocks of an epoch."""
    blocks_from: str
    """Where that number is from."""
    measured: float | None = None
    price: float | None = None


def base_shape(recipe: Recipe, store: Store | None, shape: str | None, model: Path | None) -> ModelShape:
    """The dense model: of --model, of --shape, as it was downloaded, or as its name says.  Raises RecipeError, ModelError."""
    if model is not None:
        return read_shape(model)
    if shape is not None:
        if found := known_shape(f":{shape}"):
            return found
        raise RecipeError(f"--shape is {shape!r}: choose one of {', '.join(KNOWN_BASES)}, or give --model DIR.")
    if store and (place := _built(recipe, store, f"download[{recipe.base}]")):
        return read_shape(place[0])
    uri = recipe.sources[recipe.base].uri
    if found := known_shape(uri):
        return found
    if (Path(uri) / "config.json").is_file():
        return read_shape(Path(uri))
    raise unknown_shape(uri)


def count_blocks(recipe: Recipe, store: Store | None, given: int | None) -> tuple[int, str]:
    """Packed blocks of an epoch, and where the number is from: --tokens, the tokenized mixture, or rows times a guess."""
    context = recipe.tokenize.context_length
    if given:
        return -(-given // context), "--tokens, of an epoch"
    if store and (found := _built(recipe, store, "tokenize")):
        return int(found[1]["blocks"]), "the tokenized mixture"
    if not (rows := recipe.mix.total or 0):
        raise RecipeError(
            "How many tokens an epoch has is not known before `pesc run RECIPE --until tokenize`: give --tokens, such as --tokens 200e6."
        )
    return -(-rows * ROW_TOKENS // context), f"{rows:,} rows of {ROW_TOKENS} tokens, a guess (--tokens)"


def count_tokens(config: TrainConfig, blocks: int, context: int) -> int:
    """Tokens of all steps of a run over so many blocks an epoch."""
    return count_steps(blocks, config.global_batch_size, config.epochs, config.max_steps) * config.global_batch_size * context


def _built(recipe: Recipe, store: Store, address: str) -> tuple[Path, dict] | None:
    from pesc.plan import Selection, make_plan

    action = next(a for a in make_plan(recipe, store, Selection(until=(address,))) if a.address == address)
    return (store.open(action.manifest.ref), action.manifest.metrics) if action.manifest else None


def fit_recipe(recipe: Recipe, shape: ModelShape, question: Question, arms: Sequence[str] = ()) -> list[ArmFit]:
    """Every trained arm, or those named.  Raises RecipeError for an arm that is not trained, or a batch that the GPUs cannot share."""
    trained = [name for name, arm in recipe.arms.items() if arm.method != "dense"]
    if unknown := [arm for arm in arms if arm not in trained]:
        raise RecipeError(f"Recipe {recipe.name!r} trains no arm {unknown[0]!r}. It trains: {', '.join(trained)}.")
    return [_fit_arm(recipe, shape, question, arm) for arm in arms or trained]


def _fit_arm(recipe: Recipe, shape: ModelShape, question: Question, arm: str) -> ArmFit:
    config, is_sparse = recipe.train_of(arm), recipe.arms[arm].method in ("pesc", "upcycle-full")
    if not micro_batches(config.global_batch_size, question.gpus):
        raise RecipeError(
            f"train.global_batch_size is {config.global_batch_size}, which {question.gpus} GPUs cannot share evenly: add "
            f"train.global_batch_size={-(-config.global_batch_size // question.gpus) * question.gpus} to the command."
        )
    check_batch(config, question.gpus)
    tokens = count_tokens(config, question.blocks, recipe.tokenize.context_length)
    run = Run(shape, recipe.upcycle_of(arm).block() if is_sparse else None, config, recipe.tokenize.context_length)
    usable, execution = usable_bytes(question.device.memory), recipe.execution
    layout = Layout(question.gpus, execution.zero_stage, execution.gradient_checkpointing, config.micro_batch_size)
    best = _fastest(run, question, usable)
    return ArmFit(
        arm, run, tokens, usable, _option(run, layout, question, tokens), largest_micro_batch(run, layout, usable),
        _option(run, best, question, tokens) if best else None, () if best else tuple(_devices_that_do(run, question)),
    )  # fmt: skip


def _fastest(run: Run, question: Question, usable: int) -> Layout | None:
    """Among what fits with ZeRO-2 (or, where nothing does, 3): the most tokens a second; of equals the least recomputation."""
    for stage in (2, 3):
        layouts = list(fitting_layouts(run, question.gpus, usable, (stage,)))
        if layouts:
            return max(layouts, key=lambda layout: sum(tokens_per_second(run, layout, question.device)))
    return None


def _option(run: Run, layout: Layout, question: Question, tokens: int) -> Option:
    speed = speed_of(run, layout, question.device, tokens, question.measured, question.price)
    return Option(layout, need_of(run, layout), speed)


def _devices_that_do(run: Run, question: Question) -> list[str]:
    """More of the same GPU, and as many of larger ones."""
    found = []
    for count in COUNTS:
        if count > question.gpus and smallest_need(run, count).total <= usable_bytes(question.device.memory):
            found.append(f"{question.device.name}:{count}")
            break
    least = smallest_need(run, question.gpus).total
    larger = sorted((d for d in DEVICES.values() if usable_bytes(d.memory) >= least), key=lambda d: (d.memory, d.price))
    return found + [f"{device.name}:{question.gpus}" for device in larger[:2]]
