"""The data stages at full scale: seconds, rows a second and peak memory of each step, and what dedup found of what was planted.

    pesc bench data ROWS --benchmarks QUESTIONS --model MODEL --rows 1100000 --mixture 520000

ROWS holds some hundred real rows of each of the four sets (slimorca.jsonl, magicoder_evol_instruct.jsonl, magicoder_oss_instruct.jsonl,
metamathqa.jsonl); as many as wanted are made of them (`synthetic_rows.py`), in the proportions of the published sets.  QUESTIONS holds
benchmark files with the hub's columns; MODEL is a model directory, of which the tokenizer alone is used.  The stages are those of the
recipe camelidae-8x7b, run by its builders with the workers that `pesc run` has.

    peak memory    proportional set size of the stage's process and its workers together, sampled twice a second
    recall         planted pairs of a kind of which dedup removed at least one row
    false          rows removed as duplicates or contaminated that were neither planted nor the origin of a planted one
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pesc.bench.synthetic_rows import CHUNK, Planted, read_seeds, write_chunk
from pesc.data.config import DedupConfig
from pesc.data.conversation import parse_row
from pesc.data.decontaminate import BenchmarkIndex, Item
from pesc.data.rows import read_rows
from pesc.errors import DataError
from pesc.stage import Execution, StageConfig, StageContext

RECIPE = "camelidae-8x7b"
SETS = {
    "slimorca": ("slimorca.jsonl", "sharegpt", 517_982),
    "magicoder-evol": ("magicoder_evol_instruct.jsonl", "instruction_response", 111_183),
    "magicoder-oss": ("magicoder_oss_instruct.jsonl", "problem_solution", 75_197),
    "metamathqa": ("metamathqa.jsonl", "query_response", 395_000),
}
"""Data set of the recipe -> (file of seeds, format, published rows)."""
QUESTION_FIELDS = ("question_stem", "question", "problem", "prompt", "text", "goal", "sentence")
Progress = Callable[..., None]


@dataclass
class StepTimes:
    """One line of the table."""

    step: str
    rows: int
    seconds: float
    peak_bytes: int = 0

    @property
    def rows_per_second(self) -> float:
        """Rows a second."""
        return self.rows / self.seconds if self.seconds else 0.0


@dataclass
class DataTimes:
    """What a run came to."""

    rows: int
    workers: int
    steps: list[StepTimes] = field(default_factory=list)
    recall: dict[str, float] = field(default_factory=dict)
    false_share: float = 0.0
    fill: float = 0.0


def measure_data(
    seeds: Path, benchmarks: Path, model: Path | None, rows: int, mixture: int, workers: int, directory: Path | None, progress: Progress
) -> DataTimes:
    """Make the rows and run dedup, mix and (with a model) tokenize.  Raises DataError for a directory without the files."""
    times = DataTimes(rows, workers)
    with tempfile.TemporaryDirectory(prefix="pesc-bench-", dir=directory) as place:
        root = Path(place)
        planted = make_rows(seeds, benchmarks, root / "source", rows, workers, progress)
        shutil.copytree(benchmarks, root / "source" / "benchmarks")
        _run_stages(times, root, model, mixture, progress)
        _score(times, root / "dedup" / "out", planted)
    return times


# --- making the rows -----------------------------------------------------------------------------------------------------------


def make_rows(
    seeds: Path, benchmarks: Path, out: Path, rows: int, workers: int, progress: Progress
) -> dict[tuple[str, str], list[Planted]]:
    """Write the sets, MetaMathQA as one JSON array as it is published; {(data set, file): planted rows}."""
    from pesc.launch.pool import worker_pool

    total = sum(size for _, _, size in SETS.values())
    index, jobs = BenchmarkIndex.build([Item(*pair) for pair in _questions(benchmarks)]), []
    for name, (file, row_format, size) in SETS.items():
        if not (seeds / file).is_file():
            raise DataError(f"{seeds} has no file {file}: give a directory with real rows of the sets {', '.join(SETS)}.")
        known = _contaminated(index, seeds / file, row_format)
        left, number = round(rows * size / total), 0
        while left > 0:
            jobs.append((seeds / file, row_format, known, benchmarks, out / name / f"part-{number:04}.jsonl", min(CHUNK, left)))
            left, number = left - CHUNK, number + 1
    planted: dict[tuple[str, str], list[Planted]] = {}
    with worker_pool(Execution(num_workers=workers), "bench data") as map_shards:
        for done, (job, found) in enumerate(zip(jobs, map_shards(_write_job, jobs), strict=True), start=1):
            planted[job[4].parent.name, job[4].name] = found
            progress(done, len(jobs), unit="files", message="making rows")
    _join_array(out / "metamathqa", planted)
    return planted


def _contaminated(index: BenchmarkIndex, file: Path, row_format: str) -> frozenset[int]:
    """Numbers of the real rows that hold a benchmark question already: no seeds, or they would be counted as mistakes."""
    numbers, rows = zip(*((number, parse_row(row, row_format).questions) for number, row in read_rows(file)), strict=True)
    return frozenset(number for number, hits in zip(numbers, index.find(rows), strict=True) if hits)


def _write_job(job: tuple[Path, str, frozenset[int], Path, Path, int]) -> list[Planted]:
    file, row_format, known, benchmarks, out, rows = job
    out.parent.mkdir(parents=True, exist_ok=True)
    return write_chunk(out, read_seeds(file, row_format, known), _questions(benchmarks), rows, f"{out.parent.name}/{out.name}")


def _question_files(folder: Path) -> list[Path]:
    """Benchmark files but training splits, from which training rows may come."""
    return [path for path in sorted(folder.glob("*.jsonl")) if not path.stem.endswith("train")]


def _questions(benchmarks: Path) -> list[tuple[str, str]]:
    """(benchmark, question) of all files, those of at least eight words."""
    found = []
    for path in _question_files(benchmarks):
        for _, row in read_rows(path):
            text = next((row[key] for key in QUESTION_FIELDS if isinstance(row.get(key), str)), "")
            if len(text.split()) >= 8:
                found.append((path.stem, text))
    return found


def _join_array(folder: Path, planted: dict[tuple[str, str], list[Planted]]) -> None:
    """One JSON array of all parts; the rows' numbers go on from part to part."""
    together: list[Planted] = []
    number = 0
    with (folder / "MetaMathQA-395K.json").open("w", encoding="utf-8") as stream:
        stream.write("[\n")
        for part in sorted(folder.glob("part-*.jsonl")):
            first = number
            for line in part.read_text(encoding="utf-8").rstrip("\n").split("\n"):
                stream.write((",\n" if number else "") + line)
                number += 1
            for item in planted.pop((folder.name, part.name)):
                origin = str(first + int(item.origin)) if item.origin.isdigit() else item.origin
                together.append(Planted(first + item.row, item.kind, origin))
            part.unlink()
        stream.write("\n]\n")
    planted[folder.name, "MetaMathQA-395K.json"] = together


# --- running -------------------------------------------------------------------------------------------------------------------


def _run_stages(times: DataTimes, root: Path, model: Path | None, mixture: int, progress: Progress) -> None:
    from pesc.recipe import load_recipe

    recipe = load_recipe(RECIPE, [f"mix.total={mixture}"])
    sources = dict.fromkeys(SETS, root / "source")
    result = _run(times, "dedup", "pesc.data.dedup:build", _dedup_config(recipe.dedup, root / "source"), sources, root, progress)
    times.steps[-1:] = [StepTimes(f"dedup: {name}", times.rows, seconds) for name, seconds in result["seconds"].items()] + times.steps[-1:]
    _run(times, "mix", "pesc.data.mixture:build", recipe.mix, {"rows": root / "dedup" / "out"}, root, progress)
    if model is not None:
        inputs = {"mixture": root / "mix" / "out", "model": model}
        times.fill = _run(times, "tokenize", "pesc.data.tokenization:build", recipe.tokenize, inputs, root, progress, rows=mixture)["fill"]


def _dedup_config(config: DedupConfig, source: Path) -> DedupConfig:
    """The recipe's settings over the made files, which lack MetaMathQA's columns `type` and `original_question`."""
    settings = config.model_dump(mode="json")
    for name in SETS:
        settings["datasets"][name] |= {"files": [f"{name}/*"]}
    settings["datasets"]["metamathqa"] |= {"stratify_by": None, "group_by": None, "max_per_group": None}
    settings["benchmarks"] = {}
    for path in _question_files(source / "benchmarks"):
        row = next((row for _, row in read_rows(path)), {})
        if fields := [key for key in QUESTION_FIELDS if isinstance(row.get(key), str)]:
            name = path.stem.replace("_", "-")
            settings["benchmarks"][name] = {"source": "slimorca", "files": [f"benchmarks/{path.name}"], "fields": fields[:1]}
    return DedupConfig.model_validate(settings)


def _run(
    times: DataTimes, name: str, builder: str, config: StageConfig, inputs: dict[str, Path], root: Path, progress: Progress, rows: int = 0
) -> dict[str, Any]:
    """One stage in this process, with workers; its metrics."""
    import importlib

    from pesc.launch.pool import worker_pool

    module, _, function = builder.partition(":")
    build = getattr(importlib.import_module(module), function)
    out, work = root / name / "out", root / name / "work"
    out.mkdir(parents=True)
    work.mkdir()
    execution = Execution(num_workers=times.workers)
    report = lambda item: progress(item.done, item.total, unit=item.unit, message=f"{name}: {item.message}")  # noqa: E731
    with worker_pool(execution, name) as map_shards, _sampled_memory() as memory:
        started = time.perf_counter()
        metrics = build(StageContext(name, config, inputs, out, work, execution, report, map_shards)).metrics
        seconds = time.perf_counter() - started
    times.steps.append(StepTimes(name, rows or times.rows, seconds, memory["peak"]))
    shutil.rmtree(work)
    return metrics


@contextmanager
def _sampled_memory() -> Iterator[dict[str, int]]:
    """The largest sum of proportional set sizes of this process and its descendants."""
    found, stop = {"peak": 0}, threading.Event()

    def sample() -> None:
        while not stop.wait(0.5):
            found["peak"] = max(found["peak"], sum(map(_proportional_set_size, _family(os.getpid()))))

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        stop.set()
        thread.join()


def _family(pid: int) -> list[int]:
    """A process and its descendants."""
    members = [pid]
    for member in members:
        for path in Path(f"/proc/{member}/task").glob("*/children"):
            try:
                members += map(int, path.read_text().split())
            except OSError:
                continue
    return members


def _proportional_set_size(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:  # it has just ended
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)


# --- scoring -------------------------------------------------------------------------------------------------------------------


def _score(times: DataTimes, out: Path, planted: Mapping[tuple[str, str], Sequence[Planted]]) -> None:
    """Recall of each planted kind, and rows removed by mistake.  Rows that other filters removed are left out of the account."""
    import pyarrow.parquet as pq

    gone: dict[tuple[str, str], dict[int, str]] = {}
    columns = ("dataset", "file", "row", "reason")
    table = pq.read_table(out / "removed.parquet", columns=list(columns))
    for dataset, file, row, reason in zip(*(table[name].to_pylist() for name in columns), strict=True):
        gone.setdefault((dataset, Path(file).name), {})[row] = reason.partition(":")[0]
    found, counted, excused = Counter[str](), Counter[str](), set[tuple[str, str, int]]()
    for place, items in planted.items():
        reasons = gone.get(place, {})
        for item in items:
            pair = [item.row, *([int(item.origin)] if item.origin.isdigit() else [])]
            excused.update((*place, row) for row in pair)
            if any(reasons.get(row, "").startswith("filter") for row in pair):
                continue
            counted[item.kind] += 1
            wanted = ("contaminated",) if item.kind in ("verbatim", "reworded") else ("exact", "near", "contaminated")
            found[item.kind] += any(reasons.get(row) in wanted for row in pair)
    times.recall = {kind: found[kind] / counted[kind] for kind in _KINDS if counted[kind]}
    mistakes = sum(
        reason in ("exact", "near", "contaminated") and (*place, row) not in excused
        for place, reasons in gone.items()
        for row, reason in reasons.items()
    )
    times.false_share = mistakes / times.rows


_KINDS = ("exact", "edit_1", "edit_2", "verbatim", "reworded")


def render(times: DataTimes) -> str:
    """The table, and the scores below it."""
    lines = [f"{times.rows:,} rows, {times.workers} workers", f"{'step':<24}{'rows':>12}{'seconds':>10}{'rows/s':>12}{'peak MB':>10}"]
    for step in times.steps:
        peak = f"{step.peak_bytes / 1e6:>10,.0f}" if step.peak_bytes else " " * 10
        lines.append(f"{step.step:<24}{step.rows:>12,}{step.seconds:>10.1f}{step.rows_per_second:>12,.0f}{peak}")
    lines.append("recall: " + ", ".join(f"{kind} {share:.2%}" for kind, share in times.recall.items()))
    lines.append(f"removed by mistake: {times.false_share:.3%}" + (f"; packing fill {times.fill:.2%}" if times.fill else ""))
    return "\n".join(lines)
