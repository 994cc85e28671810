"""One run through the real store, killed at random moments in random processes until it ends: nothing lost, nothing left behind.

PESC_KILLS=20 gives the full matrix; PESC_KILL_STEPS lengthens the run.
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

pytestmark = [pytest.mark.slow, pytest.mark.long]
KILLS = int(os.environ.get("PESC_KILLS", "3"))
STEPS = int(os.environ.get("PESC_KILL_STEPS", "12"))
ROOT = Path(__file__).resolve().parents[2]


def wait_for(condition, seconds: float, what: str) -> None:
    """Looks at all processes of the machine, so not often."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what} did not come within {seconds} s"
        time.sleep(0.25)


def start(root: Path, model: Path, blocks: Path) -> subprocess.Popen:
    environment = {**supervise.child_environment(), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.train.survivor", str(root), str(model), str(blocks), str(STEPS)]
    with (root / "flow.log").open("a") as log:
        return subprocess.Popen(command, env=environment, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)


def processes(root: Path) -> dict[int, str]:
    """Every living process whose command line names the workspace: pid -> what it is."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if str(root) in command and state not in "ZX":
            found[int(folder.name)] = kind_of(command)
    return found


def kind_of(command: str) -> str:
    if "tests.train.survivor" in command:
        return "flow process"
    return "torchrun" if "torch.distributed.run" in command else "rank" if "pesc.train.rank" in command else "another"


def output(root: Path) -> dict[str, str]:
    """Path -> SHA-256 of the trained object's files, from its manifest."""
    (manifest,) = [m for m in Store(root / "store").manifests() if m.address == "train[pesc]"]
    return {file.path: file.sha256 for file in manifest.output.files}


def steps_saved(root: Path) -> int:
    """The newest complete checkpoint."""
    return max((int(path.parent.name.rpartition("-")[2]) for path in root.glob("store/**/checkpoint-*/COMPLETE")), default=0)


def test_any_process_may_be_killed_at_any_moment(tmp_path, sparse_dir, blocks_dir):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for root in (whole, broken):
        root.mkdir()
    assert start(whole, sparse_dir, blocks_dir).wait(900) == 0, (whole / "flow.log").read_text()[-3000:]
    chance, killed, starts, began = random.Random(2026), Counter(), 1, time.monotonic()
    flow = start(broken, sparse_dir, blocks_dir)
    where = []
    for number in range(KILLS):
        wait_for(lambda: "rank" in processes(broken).values() or flow.poll() is not None, 300, "the ranks")  # noqa: B023
        # two in three after a new checkpoint, so that the run gets on; the others whenever, also while the model is loaded
        target = steps_saved(broken) + chance.choice([0, 2, 2])
        if target < STEPS:
            wait_for(lambda: steps_saved(broken) >= target or flow.poll() is not None, 300, "a checkpoint")  # noqa: B023
        time.sleep(chance.random() * 1.5)
        if flow.poll() is not None:
            break
        kind = ["flow process", "torchrun", "rank"][number % 3]
        victims = [pid for pid, what in processes(broken).items() if what == kind]
        if victims:
            where.append((kind, steps_saved(broken)))
            os.kill(chance.choice(victims), signal.SIGKILL)
            killed[kind] += 1
        assert flow.wait(180) != 0
        wait_for(lambda: not processes(broken), 60, "the end of every process")
        assert fsck(Store(broken / "store")).problems == []
        flow, starts = start(broken, sparse_dir, blocks_dir), starts + 1
    assert flow.wait(900) == 0, (broken / "flow.log").read_text()[-3000:]
    print(f"\n{sum(killed.values())} kills {dict(killed)} at {where}; {starts} starts, {time.monotonic() - began:.0f} s")
    assert processes(broken) == {}
    assert sum(killed.values()) == KILLS, "the run ended before all kills: raise PESC_KILL_STEPS"
    assert output(broken) == output(whole)
    report = fsck(Store(broken / "store"))
    assert (report.problems, report.leftovers) == ([], [])
