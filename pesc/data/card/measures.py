"""Lengths, turns and samples, measured on the mixture and on the packed blocks.  Light columns only; texts of the samples alone."""

# pyright: reportAttributeAccessIssue=false
# (pyarrow.compute makes its functions when it is imported)
from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

SAMPLES = 3
"""Rows shown of each domain, of different data sets where there are some."""


@dataclass
class DomainMeasures:
    """What is measured on the rows of one domain."""

    lengths: np.ndarray
    """Of each row, in `MixtureMeasures.unit`s."""
    turns: Counter[int] = field(default_factory=Counter)
    """User turns -> rows."""
    with_system: int = 0


@dataclass
class MixtureMeasures:
    """All domains, by name."""

    domains: dict[str, DomainMeasures]
    unit: str
    """`tokens, approximately` or `characters`, for rows without a token count."""
    samples: dict[str, list[dict[str, Any]]]
    """domain -> rows with dataset, stratum and messages."""


def measure_mixture(mix: Path) -> MixtureMeasures:
    """Measure mixture.parquet."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(mix / "mixture.parquet") as file:
        counted = "approximate_tokens" in file.schema_arrow.names
        leaves = [file.schema.column(number).path for number in range(len(file.schema))]
        leaves = [
            path for path in leaves if path.startswith("messages.") and path.endswith((".role",) if counted else (".role", ".content"))
        ]
        lengths: dict[str, list[np.ndarray]] = {}
        turns: dict[str, Counter[int]] = {}
        systems: Counter[str] = Counter()
        for batch in file.iter_batches(batch_size=8192, columns=["domain", *leaves, *(["approximate_tokens"] if counted else [])]):
            users, system, length = _batch_measures(batch, counted)
            names = np.array(batch.column("domain").to_pylist(), dtype=object)
            for domain in sorted(set(names)):
                own = names == domain
                lengths.setdefault(domain, []).append(length[own])
                turns.setdefault(domain, Counter()).update(users[own].tolist())
                systems[domain] += int(system[own].sum())
        samples = _samples(file, set(lengths))
    domains = {name: DomainMeasures(np.concatenate(lengths[name]), turns[name], systems[name]) for name in sorted(lengths)}
    return MixtureMeasures(domains, "tokens, approximately" if counted else "characters", samples)


def _batch_measures(batch: Any, counted: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(user turns, has a system turn, length) of each row."""
    import pyarrow.compute as pc

    messages = batch.column("messages")
    turns = messages.flatten()
    sizes = pc.list_value_length(messages).fill_null(0).to_numpy(zero_copy_only=False)
    row = np.repeat(np.arange(len(sizes)), sizes)
    roles = turns.field("role")
    users = np.bincount(row, weights=pc.equal(roles, "user").fill_null(False).to_numpy(zero_copy_only=False), minlength=len(sizes))
    system = np.bincount(row, weights=pc.equal(roles, "system").fill_null(False).to_numpy(zero_copy_only=False), minlength=len(sizes)) > 0
    if counted:
        return users.astype(int), system, batch.column("approximate_tokens").fill_null(0).to_numpy(zero_copy_only=False)
    chars = pc.utf8_length(turns.field("content")).fill_null(0).to_numpy(zero_copy_only=False)
    return users.astype(int), system, np.bincount(row, weights=chars, minlength=len(sizes)).astype(int)


def _samples(file: Any, domains: set[str]) -> dict[str, list[dict[str, Any]]]:
    """The first rows of each domain: the mixture is shuffled, so they are a random choice that stays the same."""
    found: dict[str, list[dict[str, Any]]] = {domain: [] for domain in sorted(domains)}
    spare: dict[str, list[dict[str, Any]]] = {domain: [] for domain in domains}
    for read, batch in enumerate(file.iter_batches(batch_size=256, columns=["domain", "dataset", "stratum", "messages"])):
        for row in batch.to_pylist():
            chosen = found[row["domain"]]
            if len(chosen) < SAMPLES and row["dataset"] not in {item["dataset"] for item in chosen}:
                chosen.append(row)
            elif len(spare[row["domain"]]) < SAMPLES:
                spare[row["domain"]].append(row)
        if read >= 16 or all(len(chosen) == SAMPLES for chosen in found.values()):
            break
    return {domain: (chosen + spare[domain])[:SAMPLES] for domain, chosen in found.items()}


def packed_lengths(tokenize: Path) -> tuple[np.ndarray, np.ndarray] | None:
    """(tokens of each packed row, tokens of each block) from blocks*.arrow; None when there are no such files."""
    rows, blocks = [], []
    for path in sorted(tokenize.rglob("blocks*.arrow")):
        for batch in _batches(path):
            for name, read in (("seq_lens", _from_lengths), ("cu_seqlens", _from_bounds), ("position_ids", _from_positions)):
                if name in batch.schema.names:
                    lengths = read(batch.column(name))
                    rows.append(lengths)
                    break
            blocks.append(np.diff(_offsets(batch.column("input_ids"))))
    return (np.concatenate(rows), np.concatenate(blocks)) if rows else None


def _batches(path: Path) -> Iterator[Any]:
    """Record batches of an Arrow stream or file, mapped into memory."""
    import pyarrow as pa

    with pa.memory_map(str(path)) as source:
        try:
            yield from pa.ipc.open_stream(source)
        except pa.ArrowInvalid:
            file = pa.ipc.open_file(source)
            yield from (file.get_batch(number) for number in range(file.num_record_batches))


def _offsets(column: Any) -> np.ndarray:
    return column.offsets.to_numpy()


def _from_lengths(column: Any) -> np.ndarray:
    return column.flatten().to_numpy()


def _from_bounds(column: Any) -> np.ndarray:
    """Differences of cumulative lengths, block by block."""
    values, offsets = column.flatten().to_numpy(), _offsets(column)
    first = np.zeros(len(values), dtype=bool)
    first[(offsets - offsets[0])[:-1]] = True
    return np.diff(values)[~first[1:]]


def _from_positions(column: Any) -> np.ndarray:
    """Rows begin where the position is 0."""
    values = column.flatten().to_numpy()
    return np.diff(np.append(np.flatnonzero(values == 0), len(values)))
