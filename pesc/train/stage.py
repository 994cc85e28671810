"""The builder of `train`: starts the ranks, follows them, takes their result.

Runs in the caller's process and main thread; never imports torch.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from pesc import errors
from pesc.errors import (
    InterruptedStageError,
    PeerLostError,
    PescError,
    PreemptedError,
    RankKilledError,
    RecipeError,
    StageFailedError,
    TrainingFailedError,
    TrainingOutOfMemoryError,
)
from pesc.launch import supervise
from pesc.launch.events import relay
from pesc.launch.isolated import ended_badly
from pesc.launch.network import find_place, interface_environment
from pesc.launch.torchrun import build_argv, meeting_point
from pesc.provenance import slow_bfloat16_sentence
from pesc.stage import BuildResult, Execution, StageContext
from pesc.train import checkpoints
from pesc.train.attempts import NotMetError, run_attempts
from pesc.train.blocks import PackedBlocks
from pesc.train.config import TrainConfig
from pesc.train.heartbeat import Watchdog
from pesc.train.job import Job, RankError, read_errors, read_status
from pesc.train.memory.check import check_fits, read_run
from pesc.train.memory.need import Run
from pesc.train.order import check_batch, count_steps
from pesc.train.trackers import require_trackers

logger = logging.getLogger(__name__)
_LOG_NAME = "log.txt"
_LOOKED_AT = 16
"""Packed blocks whose length is looked at: all but the last few are of one length."""
_MARGIN_SECONDS = 5  # torchrun needs them after the ranks, before the supervisor ends all of it


def build(ctx: StageContext) -> BuildResult:
    """Train `inputs["model"]` on `inputs["blocks"]`.

    Raises TrainingFailedError and its kin (an error of the run, out of memory or sure to be, hung, no room, RankKilledError), InterruptedStageError (a
    stop file), PreemptedError (the ranks were told to stop from outside; PeerLostError: another machine is gone).  The checkpoints are
    kept and another run continues; after a lost process or machine this one does, `execution.restarts` times.
    """
    device, per_node = choose_processes(ctx.execution)
    world_size = per_node * ctx.execution.num_nodes
    check_batch(ctx.config, world_size)
    require_trackers(ctx.execution.trackers)
    if device == "cpu" and ctx.config.compute_dtype == "bfloat16" and (warning := slow_bfloat16_sentence("train.compute_dtype")):
        logger.warning(warning)
    job, layout = _make_job(ctx, device), checkpoints.Layout(world_size, ctx.execution.zero_stage)
    check_fits(ctx.address, _planned(job), ctx.execution, world_size, per_node)
    return run_attempts(lambda number: _attempt(ctx, job, layout, per_node, is_first=number == 0), ctx.execution)


def _attempt(ctx: StageContext, job: Job, layout: checkpoints.Layout, per_node: int, is_first: bool) -> BuildResult:
    """Start the ranks once and follow them to their end."""
    _prepare_workspace(job, layout, is_first)
    log_path = ctx.work / _LOG_NAME
    place = find_place(*meeting_point(ctx.execution)) if ctx.execution.num_nodes > 1 else None
    outcome = supervise.run(
        build_argv("pesc.train.rank", [str(job.write().resolve())], ctx.execution, per_node, job.run_id, place),
        env=_rank_environment(job.device, per_node, ctx.execution.grace_seconds)
        | interface_environment(place.interface if place else None),
        log_path=log_path,
        on_event=lambda event: relay(event, ctx.on_progress),
        pids_dir=job.pids,
        grace_seconds=ctx.execution.grace_seconds + _MARGIN_SECONDS,
        step=Watchdog(ctx.address, job.heartbeats, job.pids, ctx.execution, log_path, lambda: _kept(job)),
    )
    return _conclude(ctx, job, outcome, log_path)


def choose_processes(execution: Execution) -> tuple[str, int]:
    """Device and ranks of this node: one a GPU, or one on the CPU, unless the execution says otherwise.

    Raises RecipeError for CUDA without a GPU, or more ranks than GPUs.
    """
    gpus = count_gpus(os.environ) if execution.device != "cpu" else 0
    if execution.device == "cuda" and not gpus:
        raise RecipeError(
            "execution.device is cuda, but this machine shows no NVIDIA GPU: set execution.device to auto or cpu, or mend the driver."
        )
    if not gpus:
        return "cpu", execution.num_processes or 1
    wanted = execution.num_processes or gpus
    if wanted > gpus:
        raise RecipeError(
            f"execution.num_processes is {wanted}, but this machine shows {gpus} GPUs: lower it, or set execution.device to cpu."
        )
    return "cuda", wanted


def count_gpus(environment: Mapping[str, str]) -> int:
    """NVIDIA GPUs that a child would see, without importing torch."""
    if (visible := environment.get("CUDA_VISIBLE_DEVICES")) is not None:
        return len([name for name in visible.split(",") if name.strip() not in ("", "-1")])
    if not (program := shutil.which("nvidia-smi")):
        return 0
    answer = subprocess.run([program, "-L"], capture_output=True, text=True, timeout=60, check=False)
    return sum(line.startswith("GPU ") for line in answer.stdout.splitlines()) if answer.returncode == 0 else 0


def _make_job(ctx: StageContext, device: str) -> Job:
    blocks = PackedBlocks(ctx.inputs["blocks"])
    config: TrainConfig = ctx.config
    steps = count_steps(len(blocks), config.global_batch_size, config.epochs, config.max_steps)
    level = logging.getLogger("pesc").getEffectiveLevel()
    return Job(ctx.address, config, ctx.execution, ctx.inputs["model"], ctx.inputs["blocks"], ctx.work, device, steps, level)


def _planned(job: Job) -> Run | None:
    """The run as the memory planner knows it."""
    blocks = PackedBlocks(job.blocks)
    longest = max(len(blocks[number]["input_ids"]) for number in range(min(len(blocks), _LOOKED_AT)))
    return read_run(job.model, job.config, longest, job.device)


def _prepare_workspace(job: Job, layout: checkpoints.Layout, is_first: bool) -> None:
    """Forget the last attempt's messages, kill what it may have left, drop half-written checkpoints, refuse those of another layout.

    The log, and a wish to stop, outlive a restart: only the first attempt of a run (is_first) forgets those as well.
    """
    supervise.kill_recorded(job.pids)
    for path in (job.work / "status.json", job.met_file, *((job.stop_file, job.work / _LOG_NAME) if is_first else ())):
        path.unlink(missing_ok=True)
    for folder in (job.errors, job.result):
        shutil.rmtree(folder, ignore_errors=True)
    checkpoints.clean(job.checkpoints)
    checkpoints.set_aside_damaged(job.checkpoints, job.address)
    if complete := checkpoints.find_complete(job.checkpoints):
        checkpoints.require_same_layout(complete[-1], layout, job.address)
        logger.info("%s continues from the checkpoint at step %d", job.address, complete[-1].step)


def _rank_environment(device: str, per_node: int, grace_seconds: int) -> dict[str, str]:
    threads = (
        max(1, len(os.sched_getaffinity(0)) // per_node) if hasattr(os, "sched_getaffinity") else max(1, (os.cpu_count() or 1) // per_node)
    )
    environment = {
        "OMP_NUM_THREADS": str(threads),
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(grace_seconds),
        "HF_HUB_OFFLINE": "1",
        "ACCELERATE_USE_DEEPSPEED": "true",
    }
    if device == "cpu":
        environment |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    return environment


def _conclude(ctx: StageContext, job: Job, outcome: supervise.Outcome, log_path: Path) -> BuildResult:
    """The result, or the error that says best what happened."""
    status = read_status(ctx.work)
    if status and status.state == "finished":
        for path in sorted(job.result.iterdir()):
            os.replace(path, ctx.out / path.name)
        return BuildResult(metrics=status.metrics, provenance={"optimizer_states": _optimizer_note(job)})
    if status:
        kept = (
            f"{ctx.address} stopped after step {status.step} of {job.steps}; its checkpoint is kept and the next run continues from there"
        )
        if status.reason == "signal":
            raise PreemptedError(f"{kept} (the training processes were told to stop).")
        raise InterruptedStageError(f"{kept} (asked by {job.stop_file}).")
    checkpoints.clean(job.checkpoints)  # half a checkpoint is of no use, and its room may be what was wanting
    rank_errors = read_errors(job.errors)
    if rank_errors and rank_errors[0].kind != "lost peer":  # else: what ended the peer is the cause, and it left no word
        raise _error_of(ctx, rank_errors[0], log_path)
    raise _unexplained(ctx, job, outcome, log_path)


def _error_of(ctx: StageContext, error: RankError, log_path: Path) -> PescError:
    kind = getattr(errors, error.kind, None) if error.kind else None
    if isinstance(kind, type) and issubclass(kind, PescError):
        return kind(error.message)
    if error.kind == "out of memory":
        config: TrainConfig = ctx.config
        ways = [f"lower train.micro_batch_size (now {config.micro_batch_size})"] if config.micro_batch_size > 1 else []
        ways += [] if ctx.execution.gradient_checkpointing == "full" else ["set execution.gradient_checkpointing=full"]
        ways += [] if ctx.execution.zero_stage == 3 else [f"raise execution.zero_stage (now {ctx.execution.zero_stage})"]
        ways += ["use a shorter tokenize context, or more or larger devices"]
        return TrainingOutOfMemoryError(
            f"{ctx.address} ran out of memory on rank {error.rank} ({error.message.splitlines()[0]}): {', or '.join(ways)}."
        )
    return TrainingFailedError(f"{ctx.address} failed on rank {error.rank}; the whole log is {log_path}.\n{error.trace}")


def _unexplained(ctx: StageContext, job: Job, outcome: supervise.Outcome, log_path: Path) -> StageFailedError:
    """The ranks ended without a word: killed, or torchrun itself failed."""
    kept = _kept(job)
    if job.execution.num_nodes > 1 and not job.met_file.exists() and "Rendezvous" in outcome.tail:
        return NotMetError(
            f"{ctx.address}: the {job.execution.num_nodes} machines did not meet at {job.execution.master} within execution.join_timeout "
            f"({job.execution.join_timeout} s): is the same command running on each, and does {job.execution.master} let them in? The log is "
            f"{log_path}.{kept}"
        )
    if "SIGKILL" in outcome.tail or "Signal 9" in outcome.tail:
        return RankKilledError(
            f"{ctx.address}: a training process was killed (SIGKILL), most often because the machine ran out of memory: lower "
            f"train.micro_batch_size or execution.num_processes, or free memory; the log is {log_path}.{kept}"
        )
    if job.execution.num_nodes > 1 and outcome.returncode > 0 and (read_errors(job.errors) or "Rendezvous" in outcome.tail):
        return PeerLostError(
            f"{ctx.address}: another machine of the run was lost; the log is {log_path}.{kept} Run it again on all machines, or give "
            "execution.restarts."
        )
    if "SIGTERM" in outcome.tail or outcome.returncode < 0:
        return PreemptedError(f"{ctx.address}: the training processes were stopped from outside; the log is {log_path}.{kept}")
    return ended_badly(ctx.address, outcome, log_path)


def _kept(job: Job) -> str:
    complete = checkpoints.find_complete(job.checkpoints)
    return f" The checkpoint at step {complete[-1].step} is kept: the next run continues from it." if complete else ""


def _optimizer_note(job: Job) -> str:
    if job.config.optimizer in ("adamw_torch", "adamw_torch_fused"):
        return f"torch AdamW{', fused' if job.config.optimizer == 'adamw_torch_fused' else ''}, fp32 states"
    paging = "paged" if job.device == "cuda" else "not paged (the CPU has no unified memory; same arithmetic)"
    return f"bitsandbytes AdamW, {'8-bit' if job.config.optimizer == 'paged_adamw_8bit' else 'fp32'} states, {paging}"
