"""The row-wise half of `dedup`: everything that can be said of a row without looking at another one.

A batch of input (`Batch`, some 32 MB of files) becomes a directory, in whichever worker is free:

    rows.arrow       rows that passed: id, stratum, messages, approximate_tokens, excerpt
    keys.npy         their KEYS: what exact duplicates and the order of survival are decided by
    values.npy       their MinHash values            bands.npy    their band keys, [bands, N]
    hits.json        {row: [start of the question, [[item, coverage, kind], …]]}: benchmark questions in their user turns
    removed.arrow    the ledger of rows that did not pass

The directory appears at once (built beside, renamed), so a stage that was killed goes on with the batches that it has, and a batch that a
cluster runs twice is as good as one that ran once.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pesc.data.config import DedupConfig, filters_of
from pesc.data.conversation import BadRow, Conversation, RowError, conversation_id, parse_row
from pesc.data.decontaminate import BenchmarkIndex
from pesc.data.exact_dedup import KEYS, content_key, halves
from pesc.data.filters import reason_to_drop
from pesc.data.ledger import Removal, to_table
from pesc.data.minhash import band_keys, choose_bands, hash_shingles, sketch
from pesc.data.shards import Shard, read_shard
from pesc.data.text import approximate_tokens, excerpt

TURN = pa.struct([("role", pa.string()), ("content", pa.string())])
ROWS = pa.schema(
    [
        ("id", pa.string()),
        ("stratum", pa.string()),
        ("messages", pa.list_(TURN)),
        ("approximate_tokens", pa.int32()),
        ("excerpt", pa.string()),
    ]
)
_SKETCHED = 4096
"""Rows whose shingles are in memory at one time."""


@dataclass(frozen=True)
class Batch:
    """Input of one call: shards of one data set.

    limit: rows to read at most (`max_rows`).  files: names of all files of the data set, sorted; a row's file is an index into it.
    """

    dataset: str
    shards: tuple[Shard, ...]
    files: tuple[str, ...]
    limit: int | None
    out: Path
    benchmarks: Path | None


@dataclass
class Prepared:
    """What a batch came to; `counts` has read, and kept (rows that passed)."""

    out: Path
    dataset: str
    counts: dict[str, int]


@dataclass
class _Rows:
    """Rows of a batch on their way into its directory."""

    passed: list[Conversation] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)
    removed: list[Removal] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)


def prepare_batch(config: DedupConfig, batch: Batch) -> Prepared:
    """Make a batch's directory, or find it made."""
    done = batch.out / "counts.json"
    if not done.is_file():
        batch.out.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=f"{batch.out.name}.", dir=batch.out.parent))
        rows = _read_batch(config, batch)
        _write_batch(building, rows, config, batch)
        (building / "counts.json").write_text(json.dumps({"read": rows.counts["read"], "kept": len(rows.passed)}))
        try:
            building.rename(batch.out)
        except OSError:  # a cluster has run this batch twice, and the other one was first
            if not done.is_file():
                raise
            shutil.rmtree(building)
    return Prepared(batch.out, batch.dataset, json.loads(done.read_text()))


def _read_batch(config: DedupConfig, batch: Batch) -> _Rows:
    dataset, filters, rows = config.datasets[batch.dataset], filters_of(config, batch.dataset), _Rows()
    for file, number, raw in _raw_rows(batch):
        rows.counts["read"] += 1
        try:
            row = _as_conversation(raw, config, batch.dataset, file, number)
        except RowError as error:
            rows.removed.append(_malformed(raw, batch.dataset, file, number, str(error)))
            continue
        if reason := reason_to_drop(row, filters):
            rows.removed.append(Removal(row.id, row.dataset, file, number, f"filter_{reason}", None, None, excerpt(row.prompt)))
        else:
            rows.passed.append(row)
            rows.groups.append(_group_of(raw, dataset.group_by) or row.id)
    return rows


def _raw_rows(batch: Batch) -> Iterator[tuple[str, int, Any]]:
    left = batch.limit
    for shard in batch.shards:
        for number, raw in read_shard(shard):
            if left is not None:
                if not left:
                    return
                left -= 1
            yield shard.file, number, raw


def _as_conversation(raw: Any, config: DedupConfig, name: str, file: str, number: int) -> Conversation:
    dataset = config.datasets[name]
    messages, questions = parse_row(raw, dataset.format)
    stratum = ""
    if dataset.stratify_by in raw:
        stratum = str(raw[dataset.stratify_by])
    elif dataset.stratify_by == "system":
        stratum = messages[0].content if messages[0].role == "system" else ""
    elif dataset.stratify_by:
        raise RowError(dataset.stratify_by, "is missing (stratify_by)")
    if dataset.group_by and dataset.group_by not in raw:
        raise RowError(dataset.group_by, "is missing (group_by)")
    return Conversation(conversation_id(name, messages), name, dataset.domain, _printable(stratum), messages, questions, file, number)


def _group_of(raw: Mapping[str, Any], group_by: str | None) -> str:
    """What a row is grouped by; "" for a row that belongs to no group: null or an empty text."""
    return (
        "" if group_by is None or raw[group_by] in (None, "") else json.dumps(raw[group_by], ensure_ascii=True, sort_keys=True, default=str)
    )


def _malformed(raw: Any, dataset: str, file: str, number: int, problem: str) -> Removal:
    shown = raw.reason if isinstance(raw, BadRow) else _shown(raw)
    row_id = hashlib.sha256(f"{dataset}\0{file}\0{number}\0{shown}".encode("utf-8", "backslashreplace")).hexdigest()[:32]
    return Removal(row_id, dataset, file, number, f"malformed: {_printable(problem)}", None, None, _printable(excerpt(shown)))


def _shown(raw: Any) -> str:
    try:
        return json.dumps(raw, ensure_ascii=True, sort_keys=True, default=str)
    except (ValueError, TypeError, RecursionError):  # keys that do not compare, loops, depth
        return f"a {type(raw).__name__} that cannot be shown"


def _printable(text: str) -> str:
    """Text that an Arrow file can hold."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


# --- writing -------------------------------------------------------------------------------------------------------------------


def _write_batch(folder: Path, rows: _Rows, config: DedupConfig, batch: Batch) -> None:
    passed = rows.passed
    columns = [
        pa.array([row.id for row in passed], pa.string()),
        pa.array([row.stratum for row in passed], pa.string()),
        _messages_array(passed),
        pa.array([sum(approximate_tokens(message.content) for message in row.messages) for row in passed], pa.int32()),
        pa.array([excerpt(row.prompt) for row in passed], pa.string()),
    ]
    write_arrow(folder / "rows.arrow", pa.Table.from_arrays(columns, schema=ROWS))
    write_arrow(folder / "removed.arrow", to_table(rows.removed))
    keys = _keys_of(rows, batch)
    bands, width = choose_bands(config.num_permutations, config.near_duplicate_threshold)
    values = np.zeros((len(passed), bands * width), dtype=np.uint32)
    for start in range(0, len(passed), _SKETCHED):
        part = slice(start, start + _SKETCHED)
        hashes = hash_shingles((row.text for row in passed[part]), config.ngram_words)
        values[part] = sketch(hashes, bands * width)
        keys["shingles"][part] = np.diff(hashes.offsets)
    np.save(folder / "keys.npy", keys)
    np.save(folder / "values.npy", values)
    np.save(folder / "bands.npy", band_keys(values, bands, width))
    (folder / "hits.json").write_text(json.dumps(_find_hits(rows, batch)))


def _messages_array(rows: list[Conversation]) -> pa.ListArray:
    """The turns as one column, without a dictionary for each."""
    offsets = np.cumsum([0, *(len(row.messages) for row in rows)], dtype=np.int32)
    parts = [pa.array([getattr(turn, name) for row in rows for turn in row.messages], pa.string()) for name in ("role", "content")]
    return pa.ListArray.from_arrays(
        pa.array(offsets), pa.StructArray.from_arrays(parts, fields=list(TURN)), type=ROWS.field("messages").type
    )


def _keys_of(rows: _Rows, batch: Batch) -> np.ndarray:
    keys = np.zeros(len(rows.passed), dtype=KEYS)
    keys["id"] = halves([bytes.fromhex(row.id) for row in rows.passed])
    keys["content"] = halves([content_key(row) for row in rows.passed])
    keys["group"] = halves([hashlib.blake2b(group.encode(), digest_size=16).digest() for group in rows.groups])
    ties = [f"{row.stratum}\0{group}".encode() for row, group in zip(rows.passed, rows.groups, strict=True)]
    keys["tie"] = halves([hashlib.blake2b(tie, digest_size=16).digest() for tie in ties])
    keys["chars"] = [row.chars for row in rows.passed]
    number_of = {file: number for number, file in enumerate(batch.files)}
    keys["file"] = [number_of[row.file] for row in rows.passed]
    keys["row"] = [row.row for row in rows.passed]
    return keys


@lru_cache(maxsize=2)
def _load_index(folder: Path) -> BenchmarkIndex:
    return BenchmarkIndex.load(folder)


def _find_hits(rows: _Rows, batch: Batch) -> dict[int, tuple[str, list[list[Any]]]]:
    if batch.benchmarks is None:
        return {}
    found = _load_index(batch.benchmarks).find([row.questions for row in rows.passed])
    return {
        place: (excerpt(row.questions[0]), [list(hit) for hit in hits])
        for place, (row, hits) in enumerate(zip(rows.passed, found, strict=True))
        if hits
    }


def write_arrow(path: Path, table: pa.Table) -> None:
    """An Arrow IPC file of one record batch, uncompressed, to be memory-mapped."""
    table = table.combine_chunks()
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        for part in table.to_batches() or [pa.RecordBatch.from_pylist([], schema=table.schema)]:
            writer.write_batch(part)


def open_arrow(path: Path) -> pa.Table:
    """The table of `write_arrow`, memory-mapped."""
    with pa.memory_map(str(path)) as source:
        return pa.ipc.open_file(source).read_all()


def shingle_sets(ngram: int, item: tuple[Path, np.ndarray]) -> Path:
    """For the rows `places` of a batch's directory: their sorted sets of n-gram hashes, in shingles.npy and shingle_offsets.npy."""
    folder, places = item
    messages = open_arrow(folder / "rows.arrow").column("messages").combine_chunks()
    flat, offsets = [], [0]
    for start in range(0, len(places), _SKETCHED):
        turns = messages.take(pa.array(places[start : start + _SKETCHED])).to_pylist()
        hashes = hash_shingles(("\n".join(t["content"] for t in row if t["role"] != "system") for row in turns), ngram)
        for number in range(len(hashes)):
            flat.append(hashes.of(number))
            offsets.append(offsets[-1] + len(flat[-1]))
    save_array(folder / "shingles.npy", np.concatenate(flat) if flat else np.zeros(0, np.uint64))
    save_array(folder / "shingle_offsets.npy", np.array(offsets, dtype=np.int64))
    return folder


def save_array(path: Path, array: np.ndarray) -> None:
    """Write an npy file that appears whole, also when a cluster runs its shard twice."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, delete=False) as stream:
        np.save(stream, array)
    Path(stream.name).replace(path)
