"""The `dedup` stage: one schema, filters, exact and near-duplicates, decontamination.

    read -> malformed -> filters -> exact -> near -> contaminated -> group cap -> kept

Writes rows.parquet (what is kept), removed.parquet (the ledger: what is not, and why) and stats.json.  Rows read = rows kept + ledger
rows is checked on each run.  What can be said of a row alone is said in workers, batch by batch (`prepare.py`); what needs all rows
is decided on arrays of their keys (`row_table.py`), while the texts stay on the disk.  Decontamination counts after duplicates on
purpose: a near-duplicate of a contaminated row is already gone, so nothing that resembles a benchmark question is left through the back
door.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pesc.data.config import DatasetConfig, DedupConfig, SemanticConfig
from pesc.data.decontaminate import BenchmarkIndex, ContaminationTable, Hit, Item, removing_hit
from pesc.data.exact_dedup import find_exact_duplicates, hex_of, survival_order
from pesc.data.filters import FILTER_REASONS
from pesc.data.functions import is_test_file
from pesc.data.ledger import Removal, count_reasons, to_table, write_ledger
from pesc.data.minhash import NearDuplicate, choose_bands, choose_survivors, find_groups
from pesc.data.prepare import TURN, Batch, Prepared, open_arrow, prepare_batch, shingle_sets
from pesc.data.row_table import RowTable, ShingleSets, Sketches
from pesc.data.rows import ROW_SUFFIXES, find_row_files, read_rows
from pesc.data.semantic import report_semantic
from pesc.data.shards import Shard, plan_shards
from pesc.errors import DataError
from pesc.stage import BuildResult, StageContext

log = logging.getLogger(__name__)
BATCH_BYTES = 32 << 20
_ROW_GROUP = 16_384
_REMEMBERED = 20_000
REASONS = ("malformed", *(f"filter_{name}" for name in FILTER_REASONS), "exact", "near", "contaminated", "group_cap")
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("dataset", pa.string()),
        ("domain", pa.string()),
        ("stratum", pa.string()),
        ("messages", pa.list_(TURN)),
        ("approximate_tokens", pa.int32()),
    ]
)


class Fate(NamedTuple):
    """Why a row goes."""

    reason: str
    kept: int | None = None
    score: float | None = None


class _Clock:
    """Seconds of each step, for the manifest."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 3)


def build(ctx: StageContext) -> BuildResult:
    """Fill `ctx.out` with rows.parquet, removed.parquet and stats.json.

    Raises DataError: no row files, too many malformed rows, a data set that loses too much to near-duplicates, or a benchmark
    without its field.
    """
    config: DedupConfig = ctx.config
    clock = _Clock()
    with clock.step("index"):
        items = list(_benchmark_items(ctx))
        index = _write_index(items, config, ctx.work / "benchmarks") if items else None
    with clock.step("prepare"):
        batches = list(_plan(ctx, index))
        read = _prepare(batches, ctx)
    rows, fates = RowTable(batches, sorted(config.datasets)), dict[int, Fate]()
    with clock.step("exact"):
        alive = _drop_exact(rows, fates)
    with clock.step("near"):
        alive = _drop_near(rows, alive, fates, ctx)
    with clock.step("decontaminate"):
        table = ContaminationTable(items)
        alive = _drop_contaminated(rows, alive, fates, table, items, config)
        alive = _cap_groups(rows, alive, fates, config)
    with clock.step("write"):
        ledger = _write_ledger(ctx.out / "removed.parquet", rows, fates)
        stats = _statistics(rows, alive, read, ledger, table, config)
        _write_rows(ctx.out / "rows.parquet", rows, alive, ctx)
        (ctx.out / "stats.json").write_text(json.dumps(stats, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
    total, more = stats["total"], {}
    if config.semantic:
        with clock.step("semantic"):
            more["semantic"] = _report_semantic(rows, alive, items, ctx)
    log.info("%d rows read, %d kept", total["read"], total["kept"])
    return BuildResult(metrics={"seconds": clock.seconds, **total, **more})


# --- benchmarks ----------------------------------------------------------------------------------------------------------------


def _benchmark_items(ctx: StageContext) -> Iterator[Item]:
    """The bare questions of every benchmark, each text once."""
    for name, benchmark in sorted(ctx.config.benchmarks.items()):
        root, what = ctx.inputs[benchmark.source], f"Benchmark {name!r}"
        texts: dict[str, None] = {}
        for file in find_row_files(root, benchmark.files, ROW_SUFFIXES, what):
            for number, raw in read_rows(root / file):
                missing = [key for key in benchmark.fields if not isinstance(raw, dict) or not isinstance(raw.get(key), str)]
                if missing:
                    raise DataError(f"{what}: {file}, row {number} has no text in the field {missing[0]!r}. Mend `fields` or the file.")
                texts.setdefault("\n".join(raw[key] for key in benchmark.fields))
        if not texts:
            raise DataError(f"{what} has no rows in {', '.join(benchmark.files)}. Check `files`.")
        yield from (Item(name, text) for text in texts)


def _write_index(items: list[Item], config: DedupConfig, folder: Path) -> Path:
    BenchmarkIndex.build(items, config.contamination_ngram, config.contamination_coverage).save(folder)
    return folder


# --- reading -------------------------------------------------------------------------------------------------------------------


def _plan(ctx: StageContext, index: Path | None) -> Iterator[Batch]:
    """Batches of about equal size.  Where they are cut does not show in the result."""
    for name, dataset in sorted(ctx.config.datasets.items()):
        files = _files_of(name, dataset, ctx.inputs[dataset.source])
        shards = plan_shards(ctx.inputs[dataset.source], files, BATCH_BYTES)
        for number, part in enumerate([shards] if dataset.max_rows else _group(shards)):
            out = ctx.work / "batches" / f"{name}-{number:05}-{_cut_of(part)}"
            yield Batch(name, tuple(part), tuple(files), dataset.max_rows, out, index)


def _cut_of(shards: list[Shard]) -> str:
    """Names what a batch holds, so that a resumed run never takes one that was cut otherwise."""
    cut = [(shard.file, shard.part, shard.start, shard.stop, shard.first) for shard in shards]
    return hashlib.blake2b(json.dumps(cut).encode(), digest_size=4).hexdigest()


def _files_of(name: str, dataset: DatasetConfig, root: Path) -> list[str]:
    code = dataset.format == "python_functions"
    files = find_row_files(root, dataset.files, (".py",) if code else ROW_SUFFIXES, f"Data set {name!r}")
    return sorted(file for file in files if not (code and is_test_file(file)))


def _group(shards: list[Shard]) -> Iterator[list[Shard]]:
    """Small shards together, up to the size of a batch."""
    part, held = list[Shard](), 0
    for shard in shards:
        size = _size_of(shard)
        if part and held + size > BATCH_BYTES:
            yield part
            part, held = [], 0
        part.append(shard)
        held += size
    yield part


def _size_of(shard: Shard) -> int:
    """Bytes of a shard, or a whole batch's for the parts of a table, which are counted in row groups."""
    if shard.kind in ("parquet", "arrow") and (shard.start or shard.stop is not None):
        return BATCH_BYTES
    return (shard.stop if shard.stop is not None else shard.path.stat().st_size) - shard.start


def _prepare(batches: list[Batch], ctx: StageContext) -> Counter[str]:
    """Prepare all batches; rows read by data set.  Raises DataError for a data set with no rows or too many malformed ones."""
    config: DedupConfig = ctx.config
    read: Counter[str] = Counter(dict.fromkeys(config.datasets, 0))
    prepared: dict[str, list[Prepared]] = {}
    for done, made in enumerate(ctx.map_shards(partial(prepare_batch, config), batches), start=1):
        prepared.setdefault(made.dataset, []).append(made)
        read[made.dataset] += made.counts["read"]
        ctx.progress(done, len(batches), "batches", f"filtering: {read.total()} rows read")
    for name, made in sorted(prepared.items()):
        _check_dataset(name, made, read[name], config)
    return read


def _check_dataset(name: str, prepared: list[Prepared], read: int, config: DedupConfig) -> None:
    if not read:
        dataset = config.datasets[name]
        raise DataError(f"Data set {name!r} has no rows in {', '.join(dataset.files)}. Check `files` and `format`.")
    removed = pa.concat_tables([open_arrow(made.out / "removed.arrow") for made in prepared])
    malformed = removed.filter(pc.match_like(removed["reason"], "malformed%"))  # pyright: ignore[reportAttributeAccessIssue]
    for line in malformed.filter(pc.match_like(malformed["reason"], "%breaks off%")).to_pylist():  # pyright: ignore[reportAttributeAccessIssue]
        log.warning(
            "%s: %s, row %d: %s. What follows in the file is lost: fetch it again.", name, line["file"], line["row"], line["reason"]
        )
    share = malformed.num_rows / read
    if share > config.filters.max_malformed_share:
        first = malformed.sort_by([("file", "ascending"), ("row", "ascending")]).slice(0, 1).to_pylist()[0]
        raise DataError(
            f"Data set {name!r}: {malformed.num_rows} of {read} rows ({share:.1%}) are not conversations, more than "
            f"filters.max_malformed_share allows ({config.filters.max_malformed_share:.1%}). The first: {first['file']}, row {first['row']}, "
            f"{first['reason'].removeprefix('malformed: ')}. Mend the file, choose another `format`, or raise the share."
        )


# --- removing ------------------------------------------------------------------------------------------------------------------


def _drop_exact(rows: RowTable, fates: dict[int, Fate]) -> np.ndarray:
    """Places that stay, in survival order."""
    order = survival_order(rows.keys)
    removed, survivors = find_exact_duplicates(rows.keys, order)
    fates.update((gone, Fate("exact", kept, 1.0)) for gone, kept in zip(removed.tolist(), survivors.tolist(), strict=True))
    return order[~np.isin(order, removed)]


def _drop_near(rows: RowTable, alive: np.ndarray, fates: dict[int, Fate], ctx: StageContext) -> np.ndarray:
    config: DedupConfig = ctx.config
    usable = alive[rows.keys["shingles"][alive] > 0]
    found = list(_near_duplicates(rows, usable, ctx)) if len(usable) > 1 else []
    candidates = Counter(rows.dataset[alive].tolist())
    lost = Counter(rows.dataset[[item.removed for item in found]].tolist() if found else [])
    for dataset, total in sorted(candidates.items()):
        if lost[dataset] > config.max_duplicate_share * total:
            pair = next(item for item in found if rows.dataset[item.removed] == dataset)
            raise DataError(
                f"Data set {rows.datasets[dataset]!r} would lose {lost[dataset]} of {total} rows ({lost[dataset] / total:.1%}) to "
                f"near-duplicates, more than max_duplicate_share allows ({config.max_duplicate_share:.1%}); templated sets do that. For "
                f"example {rows.where(pair.removed)} resembles {rows.where(pair.kept)} by {pair.score:.2f}. Raise near_duplicate_threshold, "
                "or max_duplicate_share if that is meant."
            )
    fates.update((item.removed, Fate("near", item.kept, item.score)) for item in found)
    return alive[~np.isin(alive, [item.removed for item in found])]


def _near_duplicates(rows: RowTable, usable: np.ndarray, ctx: StageContext) -> Iterator[NearDuplicate]:
    """Pairs of places, for places in survival order."""
    config: DedupConfig = ctx.config
    bands, _ = choose_bands(config.num_permutations, config.near_duplicate_threshold)
    found = find_groups(rows.band(number, usable) for number in range(bands))
    ctx.progress(0, max(1, len(found.places)), "rows", "near-duplicates: reading the rows that share a band")
    shared = usable[found.places]
    items = [(rows.batches[batch].out, local) for batch, local in rows.by_batch(shared)]
    for _ in ctx.map_shards(partial(shingle_sets, config.ngram_words), items):
        pass
    sets, sketches = ShingleSets(rows, shared), Sketches(rows)
    shingles_of = lru_cache(maxsize=_REMEMBERED)(lambda place: sets.of(int(usable[place])))
    report: Callable[[int, int], None] = lambda done, total: ctx.progress(done, max(1, total), "rows", "near-duplicates")  # noqa: E731
    for item in choose_survivors(
        found, config.near_duplicate_threshold, shingles_of, lambda places: sketches.of(usable[list(places)].tolist()), report
    ):
        yield NearDuplicate(int(usable[item.removed]), int(usable[item.kept]), item.score)


def _drop_contaminated(
    rows: RowTable, alive: np.ndarray, fates: dict[int, Fate], table: ContaminationTable, items: list[Item], config: DedupConfig
) -> np.ndarray:
    found: dict[int, tuple[str, list[Hit]]] = {}
    for number, batch in enumerate(rows.batches):
        places = np.flatnonzero(rows.batch == number)
        for local, (question, hits) in json.loads((batch.out / "hits.json").read_text()).items():
            found[int(places[int(local)])] = question, [Hit(*hit) for hit in hits]
    gone = []
    for place in (place for place in alive.tolist() if place in found):
        question, hits = found[place]
        table.add(rows.dataset_of(place), hex_of(rows.keys["id"][place]), question, hits)
        if hit := removing_hit(hits, config.number_twins):
            fates[place] = Fate(f"contaminated: {items[hit.item].benchmark}", None, hit.coverage)
            gone.append(place)
    return alive[~np.isin(alive, gone)]


def _cap_groups(rows: RowTable, alive: np.ndarray, fates: dict[int, Fate], config: DedupConfig) -> np.ndarray:
    """At most `max_per_group` rows of each group; which of them stay depends on their ids alone, that is, on chance."""
    gone: list[int] = []
    for number, name in enumerate(rows.datasets):
        limit = config.datasets[name].max_per_group
        places = alive[rows.dataset[alive] == number]
        if limit is None or not len(places):
            continue
        keys = rows.keys[places]
        order = np.lexsort((keys["id"][:, 1], keys["id"][:, 0], keys["group"][:, 1], keys["group"][:, 0]))
        group = keys["group"][order]
        is_first = np.concatenate(([True], (group[1:] != group[:-1]).any(axis=1)))
        starts = np.flatnonzero(is_first)
        rank = np.arange(len(order)) - starts[np.cumsum(is_first) - 1]
        gone += places[order[rank >= limit]].tolist()
    fates.update((place, Fate("group_cap")) for place in gone)
    return alive[~np.isin(alive, gone)]


# --- writing -------------------------------------------------------------------------------------------------------------------


def _write_ledger(path: Path, rows: RowTable, fates: dict[int, Fate]) -> pa.Table:
    places = np.array(sorted(fates), dtype=np.int64)
    texts = rows.gather(places, ["id", "excerpt"]).to_pylist()
    lines = []
    for place, text in zip(places.tolist(), texts, strict=True):
        fate = fates[place]
        kept = None if fate.kept is None else hex_of(rows.keys["id"][fate.kept])
        where = (rows.dataset_of(place), rows.file_of(place), int(rows.keys["row"][place]))
        lines.append(Removal(text["id"], *where, fate.reason, kept, fate.score, text["excerpt"]))
    earlier = [open_arrow(batch.out / "removed.arrow") for batch in rows.batches]
    return write_ledger(path, [*earlier, to_table(lines)])


def _statistics(
    rows: RowTable, alive: np.ndarray, read: Counter[str], ledger: pa.Table, table: ContaminationTable, config: DedupConfig
) -> dict[str, Any]:
    """The statistics, after the invariant: every row read is either kept or in the ledger."""
    kept = Counter(rows.datasets[number] for number in rows.dataset[alive].tolist())
    removed = count_reasons(ledger)
    per_dataset = {}
    for name in rows.datasets:
        counts = removed.get(name, Counter())
        if unknown := set(counts) - set(REASONS):
            raise RuntimeError(f"the ledger has the unknown reason {min(unknown)}")
        if read[name] != kept[name] + counts.total():
            raise RuntimeError(f"{name}: {read[name]} rows read, but {kept[name]} kept and {counts.total()} in the ledger")
        counted = {reason: counts[reason] for reason in REASONS}
        per_dataset[name] = {"domain": config.datasets[name].domain, "read": read[name], **counted, "kept": kept[name]}
    total = {key: sum(item[key] for item in per_dataset.values()) for key in ("read", *REASONS, "kept")}
    if not len(alive):
        first = ledger.slice(0, 1).to_pylist()[0]
        raise DataError(
            f"No row is left of {total['read']}: {', '.join(f'{key} {total[key]}' for key in REASONS if total[key])}. The first: "
            f"{first['dataset']}/{first['file']} row {first['row']}, {first['reason']}. Change dedup.filters (or the data set's own), or its `files`."
        )
    return {"datasets": per_dataset, "total": total, "contamination": table.summary({name: read[name] for name in rows.datasets})}


def _write_rows(path: Path, rows: RowTable, alive: np.ndarray, ctx: StageContext) -> None:
    """Rows by data set and id, a row group at a time."""
    ids = rows.keys["id"][alive]
    places = alive[np.lexsort((ids[:, 1], ids[:, 0], rows.dataset[alive]))]
    domains = [ctx.config.datasets[name].domain for name in rows.datasets]
    with pq.ParquetWriter(path, SCHEMA, compression="zstd") as writer:
        for start in range(0, len(places), _ROW_GROUP):
            part = places[start : start + _ROW_GROUP]
            table = rows.gather(part, ["id", "stratum", "messages", "approximate_tokens"])
            numbers = rows.dataset[part].tolist()
            table = table.append_column("dataset", pa.array([rows.datasets[number] for number in numbers], pa.string()))
            table = table.append_column("domain", pa.array([domains[number] for number in numbers], pa.string()))
            writer.write_table(table.select(SCHEMA.names), row_group_size=_ROW_GROUP)
            ctx.progress(start + len(part), len(places), "rows", "writing")


def _report_semantic(rows: RowTable, alive: np.ndarray, items: list[Item], ctx: StageContext) -> dict[str, Any]:
    """Similar pairs in a sample of the kept rows: those with the smallest ids, that is, a random one."""
    config: SemanticConfig = ctx.config.semantic
    ids = rows.keys["id"][alive]
    sample = alive[np.lexsort((ids[:, 1], ids[:, 0]))[: config.max_rows]]
    texts = []
    for place, row in zip(sample.tolist(), rows.gather(sample, ["id", "messages"]).to_pylist(), strict=True):
        turns = [turn for turn in row["messages"] if turn["role"] != "system"]
        whole = "\n".join(turn["content"] for turn in turns)
        texts.append({"id": row["id"], "dataset": rows.dataset_of(place), "text": whole, "question": turns[0]["content"]})
    report: Callable[[int, int], None] = lambda done, total: ctx.progress(done, total, "rows", "semantic pass")  # noqa: E731
    model = ctx.inputs[config.source] / config.directory
    return report_semantic(config, model, texts, [(item.benchmark, item.text) for item in items], ctx.work, report)
