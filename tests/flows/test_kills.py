"""A whole pipeline of real stages, killed a hundred times at random moments: nothing is damaged, and its end is that of one never killed.

    PESC_PIPELINE_KILLS=20 PESC_KILL_SEED=7 pytest -s tests/flows/test_kills.py

Each round starts with an empty store and runs `pesc run`, again and again, until it ends by itself. A kill hits the run's own process
(seven times in ten) or one of those that it has started.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
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
LONGEST_SECONDS = 12.0
"""Before a kill: longer than the start of a run and of any stage, so that every round comes to its end."""


def start(recipe: Path, store: Path, log: Path) -> subprocess.Popen[bytes]:
    environment = {**supervise.child_environment(), "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
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


def gone(pids: list[int], seconds: float = 20) -> bool:
    end = time.monotonic() + seconds
    while any(map(alive, pids)):
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def test_a_pipeline_that_is_killed_again_and_again_ends_as_one_that_is_not(tmp_path):
    recipe, chance, began = write_recipe(tmp_path / "sources"), random.Random(SEED), time.monotonic()
    print(f"\nseed {SEED}, {KILLS} kills")
    assert start(recipe, tmp_path / "whole", tmp_path / "whole.log").wait(900) == 0, (tmp_path / "whole.log").read_text()[-3000:]
    whole, kills, met, rounds = results(Store(tmp_path / "whole")), 0, Counter(), 0
    while kills < KILLS:
        store, log, rounds = Store(tmp_path / f"round-{rounds}"), tmp_path / f"round-{rounds}.log", rounds + 1
        while (code := run_or_kill(recipe, store, log, chance, met, may_kill=kills < KILLS)) is None:
            kills += 1
            report = fsck(store)
            assert report.is_clean, report.problems
            assert not any(is_locked(path) for path in store.root.glob("work/*/*"))
        assert code == 0, log.read_text()[-3000:]
        assert results(store) >= whole, f"round {rounds}"
        assert {address for address, _ in results(store) - whole} <= {"report"}, "but for reports that were made without a killed benchmark"
    where = ", ".join(f"{name} {count}" for name, count in met.most_common())
    print(f"{kills} kills in {rounds} rounds and {time.monotonic() - began:.0f} s; what was being built: {where}")
    assert len(met) >= min(8, KILLS // 2), "they were spread over the pipeline"


def run_or_kill(recipe: Path, store: Store, log: Path, chance: random.Random, met: Counter[str], may_kill: bool) -> int | None:
    """Run to the end, for its exit code; or to a kill, for None.  A kill that leaves no trace of trouble is none."""
    flow = start(recipe, store.root, log)
    try:
        flow.wait(chance.uniform(0.3, LONGEST_SECONDS) if may_kill else 900)
        return flow.returncode
    except subprocess.TimeoutExpired:
        below = descendants(flow.pid)
        victim = flow.pid if chance.random() < 0.7 or not below else chance.choice(below)
        try:
            os.kill(victim, signal.SIGKILL)
        except ProcessLookupError:
            return flow.wait(900)
        try:
            code = flow.wait(3)
        except subprocess.TimeoutExpired:  # it goes on without what was killed, as with a benchmark; then it is its turn
            flow.kill()
            code = flow.wait()
        assert gone(below), f"still there: {[pid for pid in below if alive(pid)]}"
        begun = sorted(store.root.glob("work/*/*"), key=lambda path: path.stat().st_mtime)
        met[begun[-1].parent.name if begun else "nothing"] += 1
        return None if code else 0
    finally:
        if flow.poll() is None:
            flow.kill()
            flow.wait()
