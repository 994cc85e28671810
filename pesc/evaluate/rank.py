"""Several processes answer one benchmark's requests together, each with the whole model.

    python -m torch.distributed.run --standalone --nproc-per-node N -m pesc.evaluate.rank JOB.json

Rank r answers the chunks r, r + N, r + 2N, ... into its own journal `answers-R.jsonl`; nothing is exchanged.  The stage then runs as it
does alone and finds every answer in the journals, so that its bytes do not depend on N, and a run that was stopped goes on with another N.

Pitfall: lm-eval's own splitting needs several GPUs visible to every process; here any number works, on CPUs too.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

from pesc.errors import EvaluationError, PescError, RecipeError
from pesc.evaluate.config import BenchmarkConfig
from pesc.launch import supervise
from pesc.launch.events import ProgressEmitter, relay
from pesc.launch.guard import die_with_parent
from pesc.launch.isolated import configure_logging, ended_badly, error_from_record, error_record, write_json
from pesc.launch.supervise import record_pid
from pesc.launch.torchrun import build_argv
from pesc.stage import Execution, StageContext

logger = logging.getLogger(__name__)
JOB_NAME, LOG_NAME, ERROR_NAME, PIDS_NAME = "ranks.json", "ranks.log", "rank-error.json", "pids"


class _AnsweredError(Exception):
    """Every request of this rank is answered: lm-eval goes no further."""


def answer_in_processes(ctx: StageContext) -> None:
    """Let `execution.evaluate_processes` processes answer all requests of the benchmark.

    Raises RecipeError for more processes than GPUs, the PescError of a rank, StageFailedError when one ended otherwise.
    """
    import torch

    count = ctx.execution.evaluate_processes
    _require_devices(ctx.execution, count)
    job, error = ctx.work / JOB_NAME, ctx.work / ERROR_NAME
    error.unlink(missing_ok=True)
    write_json(job, _describe(ctx))
    threads = torch.get_num_threads()  # as alone: on a CPU the number of threads changes the order of sums
    pids = ctx.work / PIDS_NAME
    supervise.kill_recorded(pids)
    outcome = supervise.run(
        build_argv("pesc.evaluate.rank", [str(job.resolve())], Execution(), count), env={"OMP_NUM_THREADS": str(threads), "TQDM_DISABLE": "1"},
        log_path=ctx.work / LOG_NAME, on_event=lambda event: relay(event, ctx.on_progress), pids_dir=pids,
    )  # fmt: skip
    if error.exists():
        raise error_from_record(json.loads(error.read_text(encoding="utf-8")))
    if outcome.returncode:
        raise ended_badly(ctx.address, outcome, ctx.work / LOG_NAME)


def _require_devices(execution: Execution, count: int) -> None:
    import torch

    from pesc.models.placement import choose_device

    if choose_device(execution.device) == "cuda" and count > torch.cuda.device_count():
        raise RecipeError(
            f"execution.evaluate_processes is {count}, but torch sees {torch.cuda.device_count()} GPUs: lower it to at most that."
        )


def _describe(ctx: StageContext) -> dict[str, Any]:
    return {
        "address": ctx.address, "config": ctx.config.model_dump(mode="json"), "inputs": {name: str(path.resolve()) for name, path in ctx.inputs.items()},
        "work": str(ctx.work.resolve()), "execution": ctx.execution.model_dump(mode="json"), "log_level": logging.getLogger("pesc").getEffectiveLevel(),
    }  # fmt: skip


def main(path: Path) -> int:
    """Answer this rank's share.  A PescError is left beside the job for the stage."""
    job = json.loads(path.read_text(encoding="utf-8"))
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    work = Path(job["work"])
    die_with_parent(os.getppid(), signal.SIGKILL)
    record_pid(work / PIDS_NAME)
    configure_logging(job["log_level"])
    ctx = StageContext(
        job["address"], BenchmarkConfig.model_validate(job["config"]), {name: Path(place) for name, place in job["inputs"].items()}, work, work,
        Execution.model_validate(job["execution"]), ProgressEmitter() if rank == 0 else lambda _progress: None,
    )  # fmt: skip
    try:
        answer_share(ctx, rank, world)
    except PescError as error:
        write_json(work / ERROR_NAME, error_record(error))
        return 1
    return 0


def answer_share(ctx: StageContext, rank: int, world: int) -> None:
    """Answer chunks rank, rank + world, ... into answers-RANK.jsonl.  Raises EvaluationError."""
    from pesc.evaluate import harness
    from pesc.evaluate.task_index import load_tasks

    folder = ctx.work / f"tasks-{rank}"
    shutil.rmtree(folder, ignore_errors=True)
    with harness.offline(ctx.config.source is not None):
        loaded = load_tasks(ctx.config, ctx.inputs.get("data"), folder)
        harness.apply_settings(ctx.config, loaded)
        own = ctx.work / f"answers-{rank}.jsonl"
        others = [path for path in (ctx.work / harness.JOURNAL, *ctx.work.glob("answers-*.jsonl")) if path != own]
        model = harness.load_model(ctx, own, others, (rank, world))
        for task in loaded["tasks"].values():
            task.apply_filters = _stop  # type: ignore[method-assign]  # what comes after the answers belongs to the stage
        try:
            harness.evaluate_tasks(ctx.config, model, loaded)
        except _AnsweredError:
            return
    raise EvaluationError(f"lm-eval scored {ctx.config.task} on a rank that only answers; use evaluate_processes: 1.")


def _stop(*_arguments: Any) -> None:
    raise _AnsweredError


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
