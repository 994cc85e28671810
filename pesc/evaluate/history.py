"""What each benchmark of a recipe scored over its runs, from the store's own records.

    read_history(store, "demo")          address -> a point a run, oldest first
    history_markdown("demo", history)    lines over the runs, and a table with what changed between two runs

A run's record (runs/RECIPE/TIME.json) says which action it used, runs/RECIPE/objects/TIME.json which object that was at the time: a refresh
may have replaced it since. A run that found a result in the store counts as one that computed it. Points whose manifest or object has been
removed are left out.

Pitfall: the line joins runs, not like with like. Settings, the model or the data may have changed in between; the table says so.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from pesc.data_uri import as_data_uri
from pesc.errors import EvaluationError, StoreError
from pesc.evaluate.records import parse_address
from pesc.evaluate.results import BenchmarkResult, read_result
from pesc.markdown import markdown_table
from pesc.store.manifest import RUN_OBJECTS

if TYPE_CHECKING:
    from pesc.store import Manifest, Store
    from pesc.store.manifest import Key

RUNS_SHOWN = 100
"""Newest runs that are read."""
ROWS_SHOWN = 30
_SHOWN_TIME = "%Y-%m-%d %H:%M"
_DODGE = 0.09
"""Of the distance of two runs, between two arms of a plot."""
TIME_FORMAT = "%Y%m%dT%H%M%S%f"
"""Name of a run's record."""


@dataclass(frozen=True)
class Point:
    """One benchmark of one arm in one run.  value, low, high: in percent where `percent`, else in the metric's unit."""

    time: datetime
    value: float
    low: float
    high: float
    percent: bool
    num_items: int
    num_available: int
    metric: str
    digest: str
    fingerprint: str
    commit: str
    """Of the sources that computed it; "" where that is not known."""
    changed: tuple[str, ...]
    """What is another in its key than in the run's before it: settings, model, data, code version."""

    @property
    def text(self) -> str:
        """`48.3 [46.1, 50.5]`, with the items when they are not all."""
        numbers = "{:.1f} [{:.1f}, {:.1f}]" if self.percent else "{:.4g} [{:.4g}, {:.4g}]"
        part = f" ({self.num_items:,} of {self.num_available:,} items)" if self.num_items < self.num_available else ""
        return numbers.format(self.value, self.low, self.high) + part


History = Mapping[str, Sequence[Point]]
"""Address of a benchmark -> its points, oldest first."""


def read_history(store: Store, recipe: str) -> dict[str, list[Point]]:
    """The newest runs of a recipe, benchmark by benchmark, in the order of the run that had most of them."""
    history: dict[str, list[Point]] = {}
    fullest: list[str] = []
    last: dict[str, _Found] = {}
    known: dict[tuple[str, str], _Found | None] = {}
    for time, actions, digests in _runs(store, recipe):
        fullest = max(list(actions), fullest, key=len)
        for address, fingerprint in actions.items():
            if parse_address(address)[0] != "evaluate":
                continue
            name = fingerprint, digests.get(address, "")
            if name not in known:
                known[name] = _read(store, *name)
            if found := known[name]:
                history.setdefault(address, []).append(_point(time, found, last.get(address)))
                last[address] = found
    return {address: history[address] for address in dict.fromkeys([*fullest, *history]) if address in history}


@dataclass(frozen=True)
class _Found:
    """A result as a run had it.  manifest: of its action, which may have been replaced since: `is_replaced`."""

    manifest: Manifest
    result: BenchmarkResult
    digest: str

    @property
    def is_replaced(self) -> bool:
        return self.digest != self.manifest.output.digest


def _runs(store: Store, recipe: str) -> Iterator[tuple[datetime, Mapping[str, str], Mapping[str, str]]]:
    """Time, fingerprints and digests of each run, oldest first; records that cannot be read are passed over."""
    for path in sorted((store.root / "runs" / recipe).glob("*.json"), key=lambda path: path.name)[-RUNS_SHOWN:]:
        with contextlib.suppress(ValueError, OSError):
            time, actions = datetime.strptime(path.stem, TIME_FORMAT).replace(tzinfo=UTC), json.loads(path.read_text(encoding="utf-8"))
            digests: Mapping[str, str] = {}
            with contextlib.suppress(ValueError, OSError):
                digests = json.loads((path.parent / RUN_OBJECTS / path.name).read_text(encoding="utf-8"))
            yield time, actions, digests


def _read(store: Store, fingerprint: str, digest: str) -> _Found | None:
    with contextlib.suppress(StoreError, EvaluationError, OSError):
        if manifest := store.find("evaluate", fingerprint) or store.manifest("evaluate", fingerprint):
            digest = digest or manifest.output.digest
            folder = store.open(manifest.ref) if digest == manifest.output.digest else store.object_path(digest)
            return _Found(manifest, read_result(folder), digest)
    return None


def _point(time: datetime, found: _Found, before: _Found | None) -> Point:
    from pesc.evaluate.comparison import METRIC_KINDS, score_interval
    from pesc.store.changes import changes_between

    manifest, result = found.manifest, found.result
    percent = result.num_correct is not None or METRIC_KINDS.get(result.metric) is not None
    scale = 100.0 if percent else 1.0
    _, low, high = score_interval(result)
    return Point(
        time=time, value=result.value * scale, low=low * scale, high=high * scale, percent=percent, num_items=result.num_items,
        num_available=result.num_available, metric=result.metric, digest=found.digest, fingerprint=manifest.fingerprint,
        commit="" if found.is_replaced else str((manifest.environment.get("git") or {}).get("commit", "")),
        changed=_changes(before, found, changes_between) if before else (),
    )  # fmt: skip


def _changes(before: _Found, found: _Found, changes_between: Callable[[Key, Key], Iterable[str]]) -> tuple[str, ...]:
    changes = tuple(changes_between(before.manifest.key, found.manifest.key))
    return changes or (() if before.digest == found.digest else ("made again, with another result",))


def by_benchmark(history: History) -> dict[str, dict[str, Sequence[Point]]]:
    """Benchmark -> arm -> points."""
    sorted_: dict[str, dict[str, Sequence[Point]]] = {}
    for address, points in history.items():
        arm, _, benchmark = parse_address(address)[1].partition("/")
        sorted_.setdefault(benchmark, {})[arm] = points
    return sorted_


def history_markdown(recipe: str, history: History) -> str:
    """Every benchmark over the runs: lines, then a table."""
    parts = [f"# Benchmarks of {recipe} over its runs"]
    for benchmark, arms in by_benchmark(history).items():
        parts += [f"## {benchmark}", f"![{benchmark} over the runs]({as_data_uri(plot_history(arms))})"]
        parts += [_table(arm, points) for arm, points in arms.items()]
    return "\n\n".join(parts) + "\n"


def benchmark_markdown(address: str, recipe: str, points: Sequence[Point]) -> str:
    """One benchmark of one arm: its newest score, and every run before it."""
    newest = points[-1]
    facts = [
        f"**{newest.text}** {newest.metric}", f"Object `{newest.digest}`", f"Built again and compared by `pesc reproduce {newest.digest[:12]}`"
    ]  # fmt: skip
    arm, _, name = parse_address(address)[1].partition("/")
    picture = [f"![{name} over the runs]({as_data_uri(plot_history({arm: points}))})"] if len(points) > 1 else []
    return "\n\n".join([f"# {address} of {recipe}", *facts, *picture, _table(arm, points)]) + "\n"


def history_rows(history: History) -> list[dict[str, Any]]:
    """A row a point, newest run first, few enough columns for the UI."""
    newest = sorted(
        ((point.time, address, point) for address, points in history.items() for point in points[-ROWS_SHOWN:]),
        key=lambda entry: entry[0], reverse=True,
    )  # fmt: skip
    return [
        {
            "run": time.strftime(_SHOWN_TIME), "benchmark": parse_address(address)[1], "score": point.text.partition(" (")[0],
            "object": point.digest[:8], "changed": "; ".join(point.changed),
        }
        for time, address, point in newest
    ]  # fmt: skip


def _table(arm: str, points: Sequence[Point]) -> str:
    rows = [
        [
            point.time.strftime(_SHOWN_TIME), point.text, "; ".join(point.changed) or ("same result" if index else "first run"),
            f"`{point.digest[:8]}`", f"`{point.commit[:8]}`" if point.commit else "",
        ]
        for index, point in enumerate(points)
    ]  # fmt: skip
    return markdown_table([f"run of {arm}", "score", "changed since", "object", "commit"], rows[-ROWS_SHOWN:][::-1])


def plot_history(arms: Mapping[str, Sequence[Point]]) -> str:
    """A line an arm over the runs, with its intervals as bars, as SVG text."""
    import matplotlib
    from matplotlib.figure import Figure

    from pesc.evaluate.plots import ARM_COLOURS, SPARE_COLOURS
    from pesc.figures import STYLE, WIDTH, legend_above, svg_text

    times = sorted({point.time for points in arms.values() for point in points})
    place = {time: number for number, time in enumerate(times)}
    aside = {arm: _DODGE * (index - (len(arms) - 1) / 2) for index, arm in enumerate(arms)}  # equal scores lie beside one another
    colours = [*ARM_COLOURS.values(), *SPARE_COLOURS]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 2.6))
        axes = figure.add_subplot()
        for index, (arm, points) in enumerate(arms.items()):
            xs, colour = [place[point.time] + aside[arm] for point in points], colours[index % len(colours)]
            values = [p.value for p in points]
            errors = [[max(0.0, p.value - p.low) for p in points], [max(0.0, p.high - p.value) for p in points]]
            axes.errorbar(xs, values, yerr=errors, fmt="none", ecolor=colour, alpha=0.45, elinewidth=1.2)
            axes.plot(xs, values, "o-", color=colour, markersize=4, linewidth=1.5, label=arm)
        step = -(-len(times) // 8)
        axes.set_xticks(list(range(0, len(times), step)), [time.strftime("%m-%d\n%H:%M") for time in times[::step]])
        axes.set_xlim(-0.5, len(times) - 0.5)
        axes.set_ylabel("score in %" if all(p.percent for points in arms.values() for p in points) else "score")
        axes.set_xlabel("run; bar: 95 % interval")
        legend_above(figure, *axes.get_legend_handles_labels())
        return svg_text(figure)
