"""A flow whose stage needs time to save when it is told to stop.

tests.deployments.programs.saving                (deploy it)
"""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

from prefect import flow

from flows.hooks import HOOKS
from flows.stages import download
from pesc import pipeline as table
from pesc.launch import supervise
from pesc.stage import BuildResult, StageContext


def build(ctx: StageContext) -> BuildResult:
    """What training does: a program under supervision."""
    supervise.run(
        [sys.executable, "-m", "tests.deployments.programs", str(ctx.work)],
        log_path=ctx.work / "log.txt",
        on_event=lambda _event: None,
        grace_seconds=20.0,
        pids_dir=ctx.work / "pids",
    )
    return BuildResult()


def rank(work: Path) -> None:
    """A rank that saves for three seconds after SIGTERM."""

    def save(_number: int, _frame: object) -> None:
        time.sleep(3)
        (work / "saved").touch()
        sys.exit(143)

    signal.signal(signal.SIGTERM, save)
    (work / "rank.pid").write_text(str(os.getpid()))
    time.sleep(600)


@flow(name="saving", persist_result=False, **HOOKS)
def saving(recipe: str, store: str) -> None:
    """The flow `download` with that builder."""
    table._BY_NAME["download"] = replace(table._BY_NAME["download"], builder="tests.deployments.programs:build", sources=())
    download.fn(recipe=recipe, store=store, instance="base")


if __name__ == "__main__":
    rank(Path(sys.argv[1]))
