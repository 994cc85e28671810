"""Packed against padded training: one process, the same rows, the arms in turn.

    pesc bench packing                                          rows of random tokens, at the lengths of the real ones
    pesc bench packing --model DIR --rows slimorca.jsonl --rows metamathqa.jsonl --layers 6

    packed          blocks of best-fit packed rows, isolated by their positions, as `train` reads them; a block a micro-batch
    longest         micro-batches of some rows in random order, each padded to the longest of the micro-batch
    max_length      each row padded to the block's length (`padding="max_length"`); a row a micro-batch, the same size as a block

The padded arms get an attention mask; positions without a target meet the vocabulary in no arm, so that padding costs them the layers
alone.  All have the same model, start weights, training step and rows.  tokens/s: real tokens of a whole step (all micro-batches and the
optimizer) over its median time.  losses: the step's cross-entropy by supervised token at the start weights: one number, up to rounding.

The rows stand at the middles of equal shares of the lengths' distribution: a handful has the lengths of them all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from pesc.bench.models import base_model, widened
from pesc.bench.step import Arm, StepSettings, make_arm, median_ratio, run_step, uses_flash
from pesc.data.encoding import TokenRow
from pesc.data.packing import pack_rows
from pesc.errors import DataError
from pesc.moe.config import PescConfig
from pesc.train.collator import NO_LOSS, Collator

PACKED, LONGEST, MAX_LENGTH = "packed", "longest", "max_length"

LENGTHS = (77, 139, 166, 194, 219, 244, 263, 292, 320, 345, 374, 411, 447, 479, 513, 542, 597, 650, 801, 993, 2723)
"""Tokens of a row at each twentieth of the distribution: 300 rows of SlimOrca, 100 of Magicoder and 100 of MetaMathQA, the proportions of the
paper's mixture, with SmolLM2's tokenizer and template.  Their mean is 442."""
SUPERVISED_SHARE = 0.47
"""Of their tokens."""


@dataclass(frozen=True)
class PackingSettings:
    """What is measured.  step: the model and the block's length (its first adapter width counts); blocks: of a step, packed."""

    step: StepSettings = field(default_factory=lambda: StepSettings(layers=6, adapter_dims=(64,), rounds=3))
    blocks: int = 2
    rows_together: int = 4
    """Rows of a micro-batch that is padded to its longest."""


@dataclass(frozen=True)
class PackingArm:
    """One arm.  positions: of all its tensors of a step, padding included; ratio: the packed arm's tokens/s over this one's."""

    name: str
    micro_batches: int
    positions: int
    seconds: float
    tokens_per_second: float
    ratio: float
    loss: float


@dataclass(frozen=True)
class PackingTimes:
    """All of a run."""

    settings: PackingSettings
    device: str
    threads: int
    rows: int
    tokens: int
    supervised: int
    arms: tuple[PackingArm, ...]

    def arm(self, name: str) -> PackingArm:
        """The arm of a name."""
        return next(arm for arm in self.arms if arm.name == name)


def measure_packing(settings: PackingSettings, rows: Sequence[TokenRow] | None = None) -> PackingTimes:
    """Train on the same rows packed and padded.  rows: real ones to choose from; None: random tokens at LENGTHS.

    Raises DataError when there are too few rows, RecipeError and ModelError for a model that cannot be built.
    """
    step = settings.step
    base = base_model(step.model, step.shape, step.layers, step.dtype, step.device)
    base.requires_grad_(False)
    made = rows is None
    chosen = choose_rows(random_rows(base.config.vocab_size) if made else rows, settings.blocks, step.sequence)
    batches = make_batches(chosen, settings)
    arms = {name: _make_arm(base, step) for name in batches}
    losses: dict[str, float] = {}
    for turn in range(step.rounds + 1):
        for name, arm in arms.items():
            seconds = run_step(arm, batches[name], step.device)
            losses.setdefault(name, arm.loss)
            if turn:  # the first warms up, and makes the optimizer's states
                arm.seconds.append(seconds)
    tokens, supervised = (sum(batch[count] for batch in batches[PACKED]) for count in ("tokens", "supervised"))
    measured = tuple(
        PackingArm(
            name, len(batches[name]), sum(batch["input_ids"].numel() for batch in batches[name]), median(arm.seconds),
            tokens / median(arm.seconds), median_ratio(arm, arms[PACKED]), losses[name],
        )
        for name, arm in arms.items()
    )  # fmt: skip
    device = torch.cuda.get_device_name() if step.device.startswith("cuda") else step.device
    return PackingTimes(settings, device, torch.get_num_threads(), len(chosen), tokens, supervised, measured)


def _make_arm(base: Any, step: StepSettings) -> Arm:
    width = step.adapter_dims[0]
    return make_arm(widened(base, PescConfig(step.experts, step.top_k, width)), width, step)


# ---- rows


def read_token_rows(files: Sequence[Path], model: Path, sequence: int) -> list[TokenRow]:
    """The rows of data files with a model's tokenizer and template, cut at `sequence` tokens.  Raises DataError."""
    from pesc.data.config import TokenizeConfig
    from pesc.data.conversation import detect_format, parse_row
    from pesc.data.encoding import RowEncoder, load_tokenizer
    from pesc.data.rows import read_rows

    encoder = RowEncoder(load_tokenizer(model), TokenizeConfig(context_length=sequence))
    conversations = []
    for file in files:
        for number, row in read_rows(file):
            row_format = detect_format(row)
            if row_format is None:
                raise DataError(f"{file}, row {number} is no row of a known format: give files that the data stages read.")
            conversations.append(list(parse_row(row, row_format).messages))
    return encoder.encode(conversations).rows


def random_rows(vocabulary: int, count: int = 500, seed: int = 0) -> list[TokenRow]:
    """Rows of random tokens whose lengths are distributed as LENGTHS; the end of each is supervised."""
    random = np.random.default_rng(seed)
    shares = (np.arange(count) + 0.5) / count
    lengths = np.interp(shares, np.linspace(0, 1, len(LENGTHS)), LENGTHS).astype(int)
    rows = []
    for length in random.permutation(lengths).tolist():
        prompt = length - round(SUPERVISED_SHARE * length)
        rows.append(TokenRow(random.integers(vocabulary, size=length, dtype=np.int32), ((prompt, length),)))
    return rows


def choose_rows(rows: Sequence[TokenRow], blocks: int, sequence: int, seed: int = 0) -> list[TokenRow]:
    """As many rows as go into `blocks` blocks, at evenly spaced places of the order of lengths, shuffled; longer ones are cut.

    Raises DataError when there are not enough to choose from.
    """
    by_length = sorted((_cut(row, sequence) for row in rows), key=lambda row: len(row.ids))
    by_length = [row for row in by_length if row.supervised]
    lengths = np.array([len(row.ids) for row in by_length])
    if lengths.sum() <= blocks * sequence:
        raise DataError(f"the rows have {lengths.sum()} tokens, too few to choose {blocks} blocks of {sequence} from: give more rows.")
    count = max(1, int(2 * blocks * sequence / lengths.mean()))
    while len(pack_rows(lengths[_evenly(len(lengths), count)], sequence)) > blocks:
        count -= 1
    places = np.random.default_rng(seed).permutation(_evenly(len(lengths), count))
    return [by_length[place] for place in places]


def _evenly(size: int, count: int) -> np.ndarray:
    return np.minimum(((np.arange(count) + 0.5) * size / count).astype(int), size - 1)


def _cut(row: TokenRow, sequence: int) -> TokenRow:
    if len(row.ids) <= sequence:
        return row
    return TokenRow(row.ids[:sequence], tuple((start, min(end, sequence)) for start, end in row.supervised if start < sequence))


# ---- batches


def make_batches(rows: Sequence[TokenRow], settings: PackingSettings) -> dict[str, list[dict[str, Any]]]:
    """Each arm's micro-batches of one step."""
    step = settings.step
    blocks = pack_rows([len(row.ids) for row in rows], step.sequence)
    collate = Collator(flatten=uses_flash(step.device))
    together = [rows[start : start + settings.rows_together] for start in range(0, len(rows), settings.rows_together)]
    return {
        PACKED: [collate([_block([rows[number] for number in block])]) for block in blocks],
        LONGEST: [padded_batch(part, max(len(row.ids) for row in part)) for part in together],
        MAX_LENGTH: [padded_batch([row], step.sequence) for row in rows],
    }


def _block(rows: Sequence[TokenRow]) -> dict[str, Any]:
    """Rows behind one another, as a packed block of `tokenize`."""
    return {
        "input_ids": np.concatenate([row.ids for row in rows]).astype(np.int64),
        "labels": np.concatenate([row.labels() for row in rows]).astype(np.int64),
        "position_ids": np.concatenate([np.arange(len(row.ids)) for row in rows]),
        "position": 0,
    }


def padded_batch(rows: Sequence[TokenRow], length: int) -> dict[str, Any]:
    """One row a line, padded at its end: an attention mask, no loss on padding, positions that go on."""
    tokens = [len(row.ids) for row in rows]
    items = [
        {
            "input_ids": np.pad(row.ids.astype(np.int64), (0, length - size)),
            "labels": np.pad(row.labels().astype(np.int64), (0, length - size), constant_values=NO_LOSS),
            "position_ids": np.arange(length),
            "position": 0,
        }
        for row, size in zip(rows, tokens, strict=True)
    ]
    batch = Collator()(items)
    valid_BS = torch.arange(length)[None, :] < torch.tensor(tokens)[:, None]
    return {**batch, "valid": valid_BS, "attention_mask": valid_BS.long(), "tokens": sum(tokens)}


def render(times: PackingTimes) -> str:
    """The table, a line an arm."""
    settings, step = times.settings, times.settings.step
    name = str(step.model) if step.model is not None else f"{step.shape} (random weights)"
    layers = f", {step.layers} layers" if step.layers else ""
    lines = [
        f"{name}{layers}, NF4, E={step.experts} K={step.top_k} R={step.adapter_dims[0]}, {str(step.dtype).removeprefix('torch.')} on "
        f"{times.device} with {times.threads} threads",
        f"{times.rows} rows of {times.tokens / times.rows:.0f} tokens on average, {times.tokens} in all, {times.supervised} supervised; "
        f"blocks of {step.sequence}, {times.tokens / (settings.blocks * step.sequence):.1%} full",
        f"{'arm':<12}{'micro-batches':>14}{'positions':>11}{'real':>8}{'ms':>10}{'tokens/s':>10}{'packed is':>11}  {'loss':<10}",
    ]
    for arm in times.arms:
        lines.append(
            f"{arm.name:<12}{arm.micro_batches:>14}{arm.positions:>11}{times.tokens / arm.positions:>8.1%}{arm.seconds * 1e3:>10.1f}"
            f"{arm.tokens_per_second:>10.0f}{f'{arm.ratio:.2f} ×':>11}  {arm.loss:<10.6f}"
        )
    return "\n".join(lines)
