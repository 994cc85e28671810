"""`pesc.launch.one_job` with a builder that says when it is under way.

python -m tests.launch.fake_job STORE JOB.json RESULT.json

In the folder PESC_TEST_TRACE there is a file for each builder under way; those named in PESC_TEST_MEET (with commas) wait for one another.
PESC_TEST_FAIL names one that fails, PESC_TEST_DIE one whose process is killed.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

from pesc import pipeline
from pesc.launch import one_job
from pesc.stage import BuildResult, StageContext
from tests import fake_stages


def build(ctx: StageContext) -> BuildResult:
    """The fake builder, with a trace."""
    trace = Path(os.environ["PESC_TEST_TRACE"])
    name = ctx.address.partition("[")[2].rstrip("]").replace("/", "-")
    (trace / f"{name}.running").write_text(str(os.getpid()))
    (trace / f"{name}.met").write_text(str(len(list(trace.glob("*.running")))))
    meeting = os.environ.get("PESC_TEST_MEET", "").split(",")
    end = time.monotonic() + 60
    while name in meeting and not all((trace / f"{other}.met").exists() for other in meeting) and time.monotonic() < end:
        ctx.progress(1, 2, message="waiting")
        time.sleep(0.05)
    (trace / f"{name}.gpu").write_text(os.environ.get("CUDA_VISIBLE_DEVICES", "none"))
    if name == os.environ.get("PESC_TEST_DIE"):
        os.kill(os.getpid(), signal.SIGKILL)
    if name == os.environ.get("PESC_TEST_FAIL"):
        fake_stages.FAIL_AT.add(ctx.address)
    try:
        return fake_stages.build(ctx)
    finally:
        (trace / f"{name}.running").unlink()


def main() -> int:
    """Install the builder and do the job."""
    for name, stage in list(pipeline._BY_NAME.items()):
        pipeline._BY_NAME[name] = replace(stage, builder="tests.launch.fake_job:build", isolated=False, preflight="")
    return one_job.main(*(Path(argument) for argument in sys.argv[1:4]))


if __name__ == "__main__":
    sys.exit(main())
