"""What `pesc fit` prints: a table of each arm on a terminal, the same lines without colour elsewhere, and JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from pesc.devices import PRICES_OF
from pesc.fit.planner import ArmFit, Option, Question
from pesc.fit.speed import UTILISATION
from pesc.markdown import markdown_table
from pesc.train.memory.need import CONTEXT_BYTES, FRAGMENTATION, NCCL_BYTES
from pesc.train.memory.trained import count_parameters

_NAMES = {
    "base": "frozen base",
    "lora": "LoRA weights",
    "bank": "bank weights",
    "router": "router weights",
    "dense": "other weights",
    "masters": "fp32 masters",
    "optimizer": "optimizer states",
    "logits": "loss chunk",
    "buckets": "DeepSpeed's buckets",
}
Row = tuple[str, str, str]


def as_json(recipe: str, fits: Sequence[ArmFit], question: Question) -> dict[str, Any]:
    """Everything, in bytes, seconds and dollars."""
    device = {"name": question.device.name, "count": question.gpus, "memory": question.device.memory}
    arms = {fit.arm: _arm_json(fit) for fit in fits}
    return {"recipe": recipe, "device": device, "blocks": question.blocks, "blocks_from": question.blocks_from, "arms": arms}


def _arm_json(fit: ArmFit) -> dict[str, Any]:
    return {
        "method": fit.run.config.method,
        "tokens": fit.tokens,
        "trained": count_parameters(fit.run.tensors),
        "usable_bytes": fit.usable,
        "fits": fit.fits,
        "largest_micro_batch": fit.largest,
        "as_set": _option_json(fit.as_set),
        "recommended": _option_json(fit.best) if fit.best else None,
        "instead": list(fit.instead),
    }


def _option_json(option: Option) -> dict[str, Any]:
    return {
        **asdict(option.layout),
        "bytes": option.need.groups(),
        "total_bytes": option.need.total,
        **{name: list(value) for name, value in asdict(option.speed).items()},
    }


def rows_of(fit: ArmFit) -> list[Row]:
    """Label, as the recipe is set, recommended."""
    options = [fit.as_set, *([fit.best] if fit.best else [])]

    def row(label: str, cells: Sequence[str]) -> Row:
        return label, cells[0], cells[1] if len(cells) > 1 else "-"

    groups = [option.need.groups() for option in options]
    names = list(dict.fromkeys(name for group in groups for name in group))
    layouts = [option.layout for option in options]
    return [
        row("ZeRO stage", [str(layout.zero_stage) for layout in layouts]),
        row("gradient checkpointing", [layout.checkpointing for layout in layouts]),
        row("micro-batch", [str(layout.micro_batch) for layout in layouts]),
        *(row(_NAMES.get(name, name), [_gigabytes(group.get(name, 0)) for group in groups]) for name in names),
        row("in all, a GPU", [_gigabytes(option.need.total) for option in options]),
        row("left", [_gigabytes(fit.usable - option.need.total) for option in options]),
        row("tokens of the run", [f"{fit.tokens / 1e6:,.1f} M" if fit.tokens >= 1e6 else f"{fit.tokens:,}"] * len(options)),
        row("tokens/s, all GPUs", [_range(_rounded(option.speed.tokens_per_second), ",.0f") for option in options]),
        row("hours", [_small(option.speed.hours, 0.01, ",.1f" if option.speed.hours[0] >= 1 else ".2g") for option in options]),
        row("US dollars", [_small(option.speed.dollars, 1, ",.0f") for option in options]),
    ]


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:,.2f} GB" if abs(size) >= 1e8 or not size else f"{size / 1e6:,.1f} MB"


def _small(ends: tuple[float, float], least: float, style: str) -> str:
    """The range, or that it is under what anybody counts."""
    return _range(ends, style) if max(ends) >= least else f"under {least:g}"


def _rounded(ends: tuple[float, float]) -> tuple[float, float]:
    """The ends to three digits where they differ: an assumption says no more."""
    low, high = ends
    return ends if low == high else (float(f"{low:.3g}"), float(f"{high:.3g}"))


def _range(ends: tuple[float, float], style: str) -> str:
    low, high = (format(end, style) for end in ends)
    return low if low == high else f"{low} - {high}"


def head_of(recipe: str, fit: ArmFit, question: Question) -> str:
    """Which arm, what it trains, and on what."""
    counts = ", ".join(f"{name} {count / 1e6:,.1f} M" for name, count in count_parameters(fit.run.tensors).items())
    device = f"{question.gpus} x {question.device.name} ({question.device.memory / 1e9:.1f} GB, {fit.usable / 1e9:.1f} to plan with)"
    return f"{recipe}, arm {fit.arm}: method {fit.run.config.method} on {device}; trained: {counts}"


def verdict_of(fit: ArmFit) -> str:
    """Whether it fits, and what to set."""
    layout = fit.as_set.layout
    here = f"ZeRO-{layout.zero_stage} and checkpointing {layout.checkpointing}"
    if fit.fits:
        said = f"Fits as set; the largest micro-batch with {here} is {fit.largest}."
    elif fit.largest:
        said = f"Does not fit as set; with {here} micro-batches up to {fit.largest} do."
    else:
        said = f"Does not fit as set, nor with any micro-batch under {here}."
    if fit.best is None:
        other = f" {' or '.join(fit.instead)} would do." if fit.instead else ""
        return f"{said} Nothing on this device does.{other}"
    if fit.best.layout == layout:
        return f"{said} Nothing is estimated to be faster."
    best = fit.best.layout
    return (
        f"{said} Recommended: train.micro_batch_size={best.micro_batch} execution.zero_stage={best.zero_stage} "
        f"execution.gradient_checkpointing={best.checkpointing}"
    )


def notes_of(fits: Sequence[ArmFit], question: Question) -> Iterator[str]:
    """Where the numbers are from."""
    yield "Exact: weights, masters, gradients, optimizer states. Estimated by formula: activations, loss chunk, workspace, buckets."
    if any(fit.run.config.optimizer.startswith("paged") for fit in fits):
        yield "Paged optimizer states move to the host's memory when the GPU's is short; they are counted here as if they never did."
    yield (
        f"Allowed: {CONTEXT_BYTES / 1e9:g} GB for CUDA's context, {NCCL_BYTES / 1e9:g} GB for NCCL with several GPUs, {FRAGMENTATION:.0%} of the "
        "memory for fragmentation. Attention by SDPA with a mask; flash attention needs less."
    )
    if question.measured is None:
        low, high = UTILISATION
        yield (
            f"Speed is an assumption: {low:.0%} to {high:.0%} of {question.device.tflops:g} TFLOP/s (dense bf16), and NF4 unpacked at half "
            f"of {question.device.bandwidth / 1e12:g} TB/s; nothing of it is measured (--tokens-per-second)."
        )
    if question.price is None:
        yield f"Prices: typical on-demand clouds, {PRICES_OF}, {_range(question.device.price, 'g')} dollars a GPU and hour (--price)."
    yield f"Blocks of an epoch: {question.blocks:,}, from {question.blocks_from}."


def fits_markdown(recipe: str, fits: Sequence[ArmFit], question: Question) -> str:
    """The same as a page: memory by group, speed and cost of each arm, then what the numbers stand on."""
    parts = [f"# Training of {recipe}: does it fit?"]
    for fit in fits:
        head, _, trained = head_of(recipe, fit, question).partition("; ")
        parts += [f"## {fit.arm}", f"{head.partition(': ')[2]}; {trained}.", f"**{verdict_of(fit)}**"]
        parts += [markdown_table(("of one GPU", "as set", "recommended"), rows_of(fit), numbers=(1, 2))]
    return "\n\n".join([*parts, "## Where the numbers are from", "\n".join(f"- {note}" for note in notes_of(fits, question))])


def print_fits(recipe: str, fits: Sequence[ArmFit], question: Question, console: Console | None = None) -> None:
    """A table an arm, then what the numbers stand on."""
    console = console or Console(soft_wrap=True, highlight=False)
    for fit in fits:
        console.print(head_of(recipe, fit, question), markup=False)
        if console.is_terminal:
            console.print(_table(fit))
        else:
            for label, as_set, best in (("", "as set", "recommended"), *rows_of(fit)):
                console.print(f"  {label:<24}{as_set:>22}{best:>22}", markup=False)
        console.print(f"{verdict_of(fit)}\n", markup=False)
    for note in notes_of(fits, question):
        console.print(note, markup=False, style="dim")


def _table(fit: ArmFit) -> Table:
    table = Table("", "as set", "recommended")
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows_of(fit):
        table.add_row(*row, style="bold" if row[0] in ("in all, a GPU", "tokens/s, all GPUs") else "")
    return table
