"""A whole pipeline of real stages, killed a hundred times at random moments: nothing is damaged, and its end is that of one never killed.

    PESC_PIPELINE_KILLS=20 PESC_KILL_SEED=7 pytest -s tests/flows/test_kills.py

Two series side by side. Each round of a series starts with an empty store and runs `pesc run`, again and again, until it ends by itself. A
kill hits the run's own process (seven times in ten) or one of those that it has started.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pesc.launch import supervise
from pesc.store import Store
from pesc.store.maintenance import fsck
from pesc.store.workspace import is_locked
from tests.flows.fleet import alive
from tests.flows.real_recipe import write_recipe

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(3600)]
KILLS = int(os.environ.get("PESC_PIPELINE_KILLS", "100"))
SEED = int(os.environ.get("PESC_KILL_SEED", "2026"))
ROOT = Path(__file__).resolve().parents[2]
SERIES = 2


def start(recipe: Path, store: Path, log: Path) -> subprocess.Popen[bytes]:
    environment = {**supervise.child_environment(), "OMP_NUM_THREADS": "1"}
    with log.open("ab") as output:
        command = [sys.executable, "-m", "pesc.cli", "run", str(recipe), "--store", str(store)]
        return subprocess.Popen(command, env=environment, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)


def descendants(pid: int) -> list[int]:
    """Living processes below one, whatever sessions they are in."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if state not in "ZX":
            children.setdefault(int(parent), []).append(int(path.parent.name))
    found, look = [], [pid]
    while look:
        look = [child for parent in look for child in children.get(parent, [])]
        found += look
    return found


def results(store: Store) -> set[tuple[str, str]]:
    """Address and object's digest of every action."""
    return {(manifest.address, manifest.output.digest) for manifest in store.manifests()}


def being_built(store: Store) -> str:
    """The stage of the workspace that was changed last."""
    begun = {}
    for path in store.root.glob("work/*/*"):
        with contextlib.suppress(FileNotFoundError):
            begun[path.stat().st_mtime] = path.parent.name
    return begun[max(begun)] if begun else "nothing yet"


def gone(pids: list[int], seconds: float = 20) -> bool:
    end = time.monotonic() + seconds
    while any(map(alive, pids)):
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def test_a_pipeline_that_is_killed_again_and_again_ends_as_one_that_is_not(tmp_path):
    recipe, began = write_recipe(tmp_path / "sources"), time.monotonic()
    print(f"\nseed {SEED}, {KILLS} kills")
    assert start(recipe, tmp_path / "whole", tmp_path / "whole.log").wait(900) == 0, (tmp_path / "whole.log").read_text()[-3000:]
    whole = results(Store(tmp_path / "whole"))
    with ThreadPoolExecutor(SERIES) as pool:
        series = [
            Series(tmp_path / f"series-{n}", recipe, whole, SEED + n, KILLS // SERIES, longest_stage(tmp_path / "whole"))
            for n in range(SERIES)
        ]
        list(pool.map(Series.run, series))
    met = sum((one.met for one in series), Counter())
    where = ", ".join(f"{name} {count}" for name, count in met.most_common())
    print(
        f"{met.total()} kills in {sum(one.rounds for one in series)} rounds and {time.monotonic() - began:.0f} s; what was being built: {where}"
    )
    assert met.total() >= KILLS // SERIES * SERIES
    assert len(met) >= min(6, KILLS // 4), "they were spread over the pipeline"


def longest_stage(store: Path) -> float:
    return max(manifest.seconds for manifest in Store(store).manifests())


class Series:
    """Rounds with so many kills in all."""

    def __init__(self, folder: Path, recipe: Path, whole: set[tuple[str, str]], seed: int, kills: int, longest: float) -> None:
        self.folder, self.recipe, self.whole, self.kills = folder, recipe, whole, kills
        self.chance, self.met, self.rounds = random.Random(seed), Counter(), 0
        self.longest = 1.5 * longest + 2  # a stage can be done between two kills, so that every round comes to its end
        folder.mkdir()

    def run(self) -> None:
        while self.met.total() < self.kills:
            store, log = Store(self.folder / f"round-{self.rounds}"), self.folder / f"round-{self.rounds}.log"
            self.rounds += 1
            while (code := self.run_or_kill(store, log)) is None:
                report = fsck(store)
                assert report.is_clean, report.problems
                assert not any(is_locked(path) for path in store.root.glob("work/*/*"))
            assert code == 0, log.read_text()[-3000:]
            assert fsck(store).is_clean
            assert results(store) >= self.whole, log
            others = {address for address, _ in results(store) - self.whole}
            assert others <= {"report"}, "reports that were made without a killed benchmark"

    def run_or_kill(self, store: Store, log: Path) -> int | None:
        """Run to the end, for its exit code; or to a kill, for None."""
        flow = start(self.recipe, store.root, log)
        try:
            return flow.wait(self.chance.uniform(0.3, self.longest) if self.met.total() < self.kills else 900)
        except subprocess.TimeoutExpired:
            below = descendants(flow.pid)
            victim = flow.pid if self.chance.random() < 0.7 or not below else self.chance.choice(below)
            self.met[being_built(store)] += 1
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
            try:
                code = flow.wait(3)
            except subprocess.TimeoutExpired:  # it goes on without what was killed, as with a benchmark; then it is its turn
                flow.kill()
                code = flow.wait()
            assert gone(below), f"still there: {[pid for pid in below if alive(pid)]}"
            return None if code else 0
        finally:
            if flow.poll() is None:
                flow.kill()
                flow.wait()
