"""The commands under `pesc bench`; each is a thin call into a module of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pesc.errors import RecipeError

bench = typer.Typer(no_args_is_help=True, help="Measure speed and memory on this machine.")


@bench.command()
def convert(
    directory: Annotated[
        Path | None, typer.Option("--dir", help="Where to write, on the disk to measure. Default: the temporary directory.", metavar="DIR")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Tiny shapes: seconds instead of minutes.")] = False,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each shape; the median is shown.")] = 3,
) -> None:
    """Conversion of 0.5B, 2B and 7B shapes: time against a plain write of the same bytes, and peak memory."""
    from pesc.bench.convert import QUICK_SHAPES, SHAPES, measure, render
    from pesc.console import progress_bar

    with progress_bar("bench convert") as progress:
        rows = measure(QUICK_SHAPES if quick else SHAPES, directory, repeats, progress)
    print(render(rows))


@bench.command()
def merge(
    directory: Annotated[
        Path | None, typer.Option("--dir", help="Where to write, on the disk to measure. Default: the temporary directory.", metavar="DIR")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Tiny shapes: seconds instead of minutes.")] = False,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each shape; the median is shown.")] = 1,
) -> None:
    """Merging of 0.5B, 2B and 7B shapes (40 GB of disk): throughput against a plain copy of the same bytes, and peak memory."""
    from pesc.bench.convert import QUICK_SHAPES, SHAPES
    from pesc.bench.merge import measure, render
    from pesc.console import progress_bar

    with progress_bar("bench merge") as progress:
        rows = measure(QUICK_SHAPES if quick else SHAPES, directory, repeats, progress)
    print(render(rows))


Dtype = Annotated[str, typer.Option(help="float32 or bfloat16.")]
Device = Annotated[str, typer.Option(help="cpu or cuda. Default: cuda when there is a GPU.")]


@bench.command()
def layer(
    tokens: Annotated[int, typer.Option(min=1)] = 2048,
    hidden: Annotated[int, typer.Option(min=1)] = 1024,
    ffn: Annotated[int, typer.Option(min=1)] = 2816,
    experts: Annotated[int, typer.Option(min=1)] = 8,
    top_k: Annotated[int, typer.Option(min=1)] = 2,
    dims: Annotated[str, typer.Option(help="Adapter widths, with commas.")] = "16,64,128,256,512",
    dtype: Dtype = "float32",
    device: Device = "",
    rounds: Annotated[int, typer.Option(min=1, help="The best round of each counts.")] = 5,
) -> None:
    """The bank of adapters against the frozen FFN, forward and backward, path by path."""
    if top_k > experts:
        raise RecipeError(f"--top-k is {top_k}, but there are {experts} experts: a token cannot use more than there are.")
    widths = _whole_numbers(dims)
    from pesc.bench.device import device_named, dtype_named
    from pesc.bench.layer import LayerShape, measure_layer, render

    shape = LayerShape(tokens, hidden, ffn, experts, top_k)
    print(render(measure_layer(shape, widths, dtype_named(dtype), device_named(device), rounds)))


@bench.command()
def decode(
    model: Annotated[
        str, typer.Argument(help="A dense model's directory, or smollm2-135m, llama-2-7b, yi-34b with random weights.")
    ] = "smollm2-135m",
    experts: Annotated[int, typer.Option(min=1)] = 8,
    top_k: Annotated[int, typer.Option(min=1)] = 2,
    adapter_dim: Annotated[int, typer.Option(min=1)] = 64,
    dtype: Dtype = "float32",
    device: Device = "",
    rounds: Annotated[int, typer.Option(min=1, help="Stretches of each; the median token counts.")] = 5,
) -> None:
    """Greedy decoding at batch 1 of the sparse model against the dense one."""
    from pesc.moe.config import PescConfig

    try:
        shape = PescConfig(experts, top_k, adapter_dim)
    except ValueError as error:
        raise RecipeError(f"{error}.") from None
    from pesc.bench.decode import measure_decode, render
    from pesc.bench.device import device_named, dtype_named

    print(render(measure_decode(model, shape, dtype_named(dtype), device_named(device), rounds=rounds)))


def _whole_numbers(text: str, option: str = "--dims") -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise RecipeError(f"{option} is {text!r}: write whole numbers above 0 with commas, such as 64,512.")
    return [int(part) for part in parts]


def _check_checkpointing(policy: str) -> None:
    if policy not in ("none", "selective", "full"):
        raise RecipeError(f"--checkpointing is {policy!r}: choose none, selective or full.")


@bench.command()
def data(
    rows_directory: Annotated[Path, typer.Argument(metavar="ROWS", help="Directory with some real rows of each of the four sets.")],
    benchmarks: Annotated[Path, typer.Option(help="Directory of benchmark questions, *.jsonl with the hub's columns.")],
    model: Annotated[Path | None, typer.Option(help="Model directory whose tokenizer is used. Without it: dedup and mix alone.")] = None,
    rows: Annotated[int, typer.Option(min=1000, help="Rows to make and to read.")] = 1_100_000,
    mixture: Annotated[int, typer.Option(min=100, help="Rows of the mixture.")] = 520_000,
    workers: Annotated[int, typer.Option(min=1)] = 2,
    directory: Annotated[Path | None, typer.Option("--dir", help="Where to work: some GB. Default: the temporary directory.")] = None,
) -> None:
    """The data stages at full scale: seconds, rows a second and memory, and what they found of what was planted."""
    from pesc.bench.data import measure_data, render
    from pesc.console import progress_bar

    with progress_bar("bench data") as progress:
        times = measure_data(rows_directory, benchmarks, model, rows, mixture, workers, directory, progress)
    print(render(times))


@bench.command()
def step(
    model: Annotated[Path | None, typer.Option(help="A dense model's directory. Default: random weights of --shape.")] = None,
    shape: Annotated[str, typer.Option(help="smollm2-135m, 7b, 13b, 34b or tiny: random NF4 weights.")] = "smollm2-135m",
    layers: Annotated[int | None, typer.Option(min=1, help="Only the first layers.")] = None,
    adapter_dim: Annotated[str, typer.Option(help="Adapter widths, with commas.")] = "64,512",
    experts: Annotated[int, typer.Option(min=1)] = 8,
    top_k: Annotated[int, typer.Option(min=1)] = 2,
    sequence: Annotated[int, typer.Option(min=8, help="Tokens of a packed block.")] = 2048,
    micro_batch: Annotated[int, typer.Option(min=1, help="Blocks of a step.")] = 1,
    checkpointing: Annotated[str, typer.Option(help="none, selective or full.")] = "none",
    dtype: Dtype = "float32",
    device: Device = "",
    rounds: Annotated[int, typer.Option(min=1, help="Steps of each arm; the median counts.")] = 5,
    quick: Annotated[bool, typer.Option("--quick", help="Tiny shapes: seconds instead of minutes.")] = False,
) -> None:
    """A training step of PESC against the dense control's: tokens a second, ratio, memory and where the time goes."""
    _check_checkpointing(checkpointing)
    if top_k > experts:
        raise RecipeError(f"--top-k is {top_k}, but there are {experts} experts: a token cannot use more than there are.")
    widths = tuple(_whole_numbers(adapter_dim, "--adapter-dim"))
    from pesc.bench.device import device_named, dtype_named
    from pesc.bench.step import StepSettings, measure_step, render

    if quick:
        shape, layers, sequence, rounds = "tiny", 2, 64, 1
    settings = StepSettings(
        model, shape, layers, widths, experts, top_k, sequence, micro_batch, dtype_named(dtype), device_named(device), checkpointing, rounds
    )
    print(render(measure_step(settings)))


@bench.command()
def packing(
    model: Annotated[Path | None, typer.Option(help="A dense model's directory. Default: random weights of --shape.")] = None,
    rows: Annotated[
        list[Path] | None, typer.Option(help="Data files; needs --model. Default: random tokens at the lengths of real rows.")
    ] = None,
    shape: Annotated[str, typer.Option(help="smollm2-135m, 7b, 13b, 34b or tiny: random NF4 weights.")] = "smollm2-135m",
    layers: Annotated[int | None, typer.Option(min=1, help="Only the first layers.")] = None,
    adapter_dim: Annotated[int, typer.Option(min=1, help="Adapter width.")] = 64,
    sequence: Annotated[int, typer.Option(min=16, help="Tokens of a packed block, and of a padded row.")] = 2048,
    blocks: Annotated[int, typer.Option(min=1, help="Packed blocks of a step.")] = 2,
    rows_together: Annotated[int, typer.Option(min=1, help="Rows of a micro-batch that is padded to its longest.")] = 4,
    checkpointing: Annotated[str, typer.Option(help="none, selective or full.")] = "none",
    dtype: Dtype = "float32",
    device: Device = "",
    rounds: Annotated[int, typer.Option(min=1, help="Steps of each arm; the median counts.")] = 3,
    quick: Annotated[bool, typer.Option("--quick", help="Tiny shapes: seconds instead of minutes.")] = False,
) -> None:
    """Packed against padded training on the same rows: real tokens a second, and the loss."""
    _check_checkpointing(checkpointing)
    if rows and model is None:
        raise RecipeError("--rows needs --model, whose tokenizer and chat template make tokens of them.")
    from pesc.bench.device import device_named, dtype_named
    from pesc.bench.packing import PackingSettings, measure_packing, read_token_rows, render
    from pesc.bench.step import StepSettings

    if quick:
        shape, layers, rounds = "tiny", 2, 1
    step = StepSettings(
        model, shape, layers, (adapter_dim,), 8, 2, sequence, 1, dtype_named(dtype), device_named(device), checkpointing, rounds
    )
    read = read_token_rows(rows, model, sequence) if rows and model is not None else None
    print(render(measure_packing(PackingSettings(step, blocks, rows_together), read)))
