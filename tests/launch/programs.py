"""Programs and builders that the launch tests run in real processes."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

from pesc.errors import DataError
from pesc.launch import events, supervise
from pesc.stage import BuildResult, StageConfig, StageContext


class ToyConfig(StageConfig):
    words: tuple[str, ...] = ("a", "b")
    seconds: float = 60.0


def build_words(ctx: StageContext) -> BuildResult:
    logging.getLogger("pesc.toy").warning("about to write %d words", len(ctx.config.words))
    warnings.warn("a library's warning", stacklevel=1)
    print("a library's print")
    for index, word in enumerate(ctx.config.words, 1):
        ctx.progress(index, len(ctx.config.words), unit="words", message=word, loss=0.5)
        (ctx.out / word).write_text(ctx.inputs["text"].joinpath("in.txt").read_text())
    return BuildResult({"pid": os.getpid()}, {"torch": "torch" in sys.modules})


def build_user_error(ctx: StageContext) -> BuildResult:
    raise DataError("rows.parquet, row 3: no messages; remove the row.")


def build_defect(ctx: StageContext) -> BuildResult:
    print("last words of the builder")
    raise ZeroDivisionError("a defect")


def build_killed(ctx: StageContext) -> BuildResult:
    os.kill(os.getpid(), signal.SIGKILL)
    return BuildResult()


def build_forever(ctx: StageContext) -> BuildResult:
    grandchild = subprocess.Popen([sys.executable, "-c", f"import time; time.sleep({ctx.config.seconds})"])
    (ctx.work / "pids").write_text(f"{os.getpid()} {grandchild.pid}")
    ctx.progress(0, 1, message="started")
    time.sleep(ctx.config.seconds)
    return BuildResult()


def caller(folder: Path) -> None:
    """A process that supervises a tree: a launcher that ignores SIGTERM, and a rank in a session of its own."""
    supervise.run(
        [sys.executable, __file__, "launcher", str(folder)],
        log_path=folder / "log.txt",
        on_event=lambda event: (folder / "event").write_text(str(event["event"])),
        pids_dir=folder / "ranks",
        grace_seconds=1.0,
    )


def launcher(folder: Path) -> None:
    rank = subprocess.Popen([sys.executable, __file__, "rank", str(folder)], start_new_session=True)
    if (folder / "stubborn").exists():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    else:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    (folder / "launcher.pid").write_text(str(os.getpid()))
    rank.wait()


def rank(folder: Path) -> None:
    if not (folder / "unguarded").exists():
        from pesc.launch.guard import die_with_parent

        die_with_parent(os.getppid(), signal.SIGKILL)
    supervise.record_pid(folder / "ranks")
    (folder / "rank.pid").write_text(str(os.getpid()))
    events.emit({"event": "ready"})
    time.sleep(120)


if __name__ == "__main__":
    {"caller": caller, "launcher": launcher, "rank": rank}[sys.argv[1]](Path(sys.argv[2]))
