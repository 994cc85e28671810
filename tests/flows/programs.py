"""A flow whose training takes for ever, in real processes.

python -m tests.flows.programs RECIPE STORE      (run it here)
tests.flows.programs.endless                     (deploy it)
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

from prefect import flow

from flows.hooks import HOOKS
from flows.pipeline import pipeline
from flows.stages import download
from pesc import pipeline as table
from pesc.launch import guard, supervise
from pesc.stage import BuildResult, StageContext


def build_for_ever(ctx: StageContext) -> BuildResult:
    """What training does: a launcher under supervision, and a rank in a session of its own."""
    supervise.run(
        [sys.executable, "-m", "tests.flows.programs", "launcher", str(ctx.work)],
        log_path=ctx.work / "log.txt",
        on_event=lambda _event: None,
        grace_seconds=2.0,
        pids_dir=ctx.work / "pids",
    )
    return BuildResult()


def launcher(work: Path) -> None:
    """Start the rank and wait for it."""
    (work / "launcher.pid").write_text(str(os.getpid()))
    subprocess.run([sys.executable, "-m", "tests.flows.programs", "rank", str(work)], start_new_session=True, check=False)


def rank(work: Path) -> None:
    """A rank that ignores SIGTERM, as one inside a collective does; its own death signal is SIGKILL."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    guard.die_with_parent(os.getppid(), signal.SIGKILL)
    supervise.record_pid(work / "pids")
    (work / "rank.pid").write_text(str(os.getpid()))
    time.sleep(600)


def install() -> None:
    """Let `download` be the endless stage: it needs nothing upstream."""
    table._BY_NAME["download"] = replace(table._BY_NAME["download"], builder="tests.flows.programs:build_for_ever", sources=())


@flow(name="endless", persist_result=False, **HOOKS)
def endless(recipe: str, store: str) -> None:
    """The flow `download` with the endless builder."""
    install()
    download.fn(recipe=recipe, store=store, instance="base")


if __name__ == "__main__":
    if sys.argv[1] in ("launcher", "rank"):
        {"launcher": launcher, "rank": rank}[sys.argv[1]](Path(sys.argv[2]))
    else:
        install()
        pipeline(recipe=sys.argv[1], store=sys.argv[2], only=["download[base]"])
