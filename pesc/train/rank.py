"""The program of one rank.

    python -m torch.distributed.run ... -m pesc.train.rank JOB.json

Its place (RANK, LOCAL_RANK, WORLD_SIZE) comes from torchrun's environment.  It dies with torchrun, remembers SIGTERM until the step has
ended, and leaves `status.json` or `errors/rank_N.json`: the exit code alone says nothing.
"""

from __future__ import annotations

import logging
import os
import resource
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from pesc.launch.events import emit
from pesc.launch.guard import die_with_parent
from pesc.launch.isolated import configure_logging
from pesc.launch.supervise import record_pid
from pesc.train.heartbeat import Heartbeat
from pesc.train.job import Job, Status, read_job, record_error, write_status
from pesc.train.stop import StopRequest

logger = logging.getLogger(__name__)


def main(job_path: Path) -> int:
    """Run the job; returns the exit code."""
    die_with_parent(os.getppid(), signal.SIGKILL)
    job = read_job(job_path)
    record_pid(job.pids)
    job.met_file.touch()
    rank = int(os.environ["RANK"])
    if rank == 0:
        configure_logging(job.log_level)
    heartbeat = Heartbeat(job.heartbeats, rank)
    try:
        _train(job, rank, heartbeat)
    except Exception as error:
        record_error(job.errors, rank, error)
        logger.debug("rank %d failed", rank, exc_info=True)
        print(f"rank {rank}: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


def _train(job: Job, rank: int, heartbeat: Heartbeat) -> None:
    started = time.monotonic()
    stop = StopRequest(job.stop_file)
    _report(rank, job, 0, "loading the model")
    from pesc.moe.tuning import adopt_choices
    from pesc.train import checkpoints
    from pesc.train.blocks import PackedBlocks
    from pesc.train.collator import OrderedBlocks
    from pesc.train.held_out import open_held_out
    from pesc.train.modeling import count_trainable, load_trainable, log_trainable
    from pesc.train.order import BlockOrder
    from pesc.train.trainer import PescTrainer

    config = job.config
    model = load_trainable(job.model, config, _device_of(job), job.execution.gradient_checkpointing)
    groups = count_trainable(model)
    if rank == 0:
        log_trainable(model)
    blocks = PackedBlocks(job.blocks)
    data = OrderedBlocks(blocks, BlockOrder(len(blocks), config.seed), job.steps * config.global_batch_size)
    held_out = open_held_out(job.blocks, config, job.steps, rank, int(os.environ["WORLD_SIZE"]))
    trainer = PescTrainer(model, _arguments(job), data, job, stop, heartbeat, _watch(rank, job, model), held_out)
    resumed_at = _resume_point(trainer)
    if resumed_at:
        checkpoint = checkpoints.checkpoint_path(job.checkpoints, resumed_at)
        trainer.history.load(checkpoint)
        adopt_choices(checkpoints.read_dispatch(checkpoint, rank))
        logger.info("%s continues after step %d", job.address, resumed_at)
    trainer.events.start(
        resumed_at, device=job.device, world_size=trainer.args.world_size, zero_stage=job.execution.zero_stage, address=job.address
    )
    trained_from = time.monotonic()
    trainer.train(resume_from_checkpoint=str(job.checkpoints / f"checkpoint-{resumed_at}") if resumed_at else None)
    measured = {
        "seconds": round(time.monotonic() - started, 2),
        "seconds_training": round(time.monotonic() - trained_from, 2),
        "resumed_at": resumed_at,
    }
    heartbeat.beat("writing the result")
    _finish(trainer, groups, measured)


def _finish(trainer: Any, groups: list, measured: dict[str, Any]) -> None:
    """Write the result (or not, when the run was interrupted) and the status."""
    from pesc.models.identity import model_digest
    from pesc.train.result import gather_trained, write_result

    job, is_first = trainer.job, trainer.args.local_process_index == 0
    trainer.events.end(trainer.state.global_step, trainer.interrupted or "")
    metrics = {**measured, **_measure(trainer)}
    if trainer.interrupted:
        if is_first:
            write_status(job.work, Status("interrupted", trainer.state.global_step, trainer.interrupted, metrics))
        return
    trained = gather_trained(trainer.model, keep=is_first)
    if is_first:
        lines = trainer.history.lines
        losses = [line["loss"] for line in lines if "skipped" not in line] or [None]
        facts = {
            "steps": len(lines),
            "tokens": sum(line["tokens"] for line in lines),
            "loss_first": losses[0],
            "loss_last": losses[-1],
            "model_digest": model_digest(job.model),
        }
        if looks := trainer.history.held_out:
            facts |= {"held_out_first": looks[0], "held_out_last": looks[-1]}
        write_result(job.result, trained, job.config, groups, facts, lines, looks)
        write_status(job.work, Status("finished", trainer.state.global_step, "", metrics))


def _measure(trainer: Any) -> dict[str, Any]:
    """Measurements for the manifest; none of them is hashed."""
    import torch

    from pesc.moe.tuning import export_choices

    lines, world = trainer.history.lines, trainer.args.world_size
    on_cuda = trainer.args.device.type == "cuda"
    usage = resource.getrusage(resource.RUSAGE_SELF)
    peak = torch.cuda.max_memory_allocated() if on_cuda else usage.ru_maxrss * 1024
    return {
        "steps": trainer.state.global_step,
        "loss": lines[-1]["loss"] if lines else None,
        "tokens_per_second": round(trainer.throughput.tokens_per_second, 1),
        "peak_memory_bytes": int(peak),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "dispatch": export_choices(),
        "world_size": world,
        "zero_stage": trainer.job.execution.zero_stage,
        "device": torch.cuda.get_device_name() if on_cuda else f"cpu, threads a rank: {torch.get_num_threads()}",
    }


def _device_of(job: Job) -> str:
    if job.device == "cpu":
        return "cpu"
    import torch

    index = int(os.environ["LOCAL_RANK"])
    torch.cuda.set_device(index)
    return f"cuda:{index}"


def _arguments(job: Job) -> Any:
    """Trainer's settings; DeepSpeed's are in its own dict."""
    from transformers import TrainingArguments

    from pesc.train.deepspeed import make_config, skip_shared_memory_op

    if job.device == "cpu":
        skip_shared_memory_op()
    config, world = job.config, int(os.environ["WORLD_SIZE"])
    return TrainingArguments(
        output_dir=str(job.checkpoints),
        max_steps=job.steps,
        per_device_train_batch_size=config.micro_batch_size,
        gradient_accumulation_steps=config.global_batch_size // (config.micro_batch_size * world),
        learning_rate=config.learning_rate,
        max_grad_norm=config.max_grad_norm,
        weight_decay=config.weight_decay,
        bf16=config.compute_dtype == "bfloat16",
        seed=config.seed,
        deepspeed=make_config(config, job.execution, world, job.device),
        use_cpu=job.device == "cpu",
        save_strategy="steps",
        save_steps=job.execution.save_every_steps,
        save_on_each_node=job.execution.num_nodes > 1,
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        ddp_timeout=job.execution.peer_timeout,
        log_level="warning",
    )


def _resume_point(trainer: Any) -> int:
    """The newest step that every node has a complete checkpoint of, 0 for none.  Raises TrainingFailedError for another layout."""
    from torch import distributed

    from pesc.train import checkpoints

    found = {checkpoint.step: checkpoint for checkpoint in checkpoints.find_complete(trainer.job.checkpoints)}
    everywhere: list[set[int]] = [set(found)]
    if trainer.args.world_size > 1:
        everywhere = [set()] * trainer.args.world_size
        distributed.all_gather_object(everywhere, set(found))
    step = max(set.intersection(*everywhere), default=0)
    _leave_newer(trainer, found, step)
    if step:
        checkpoints.require_same_layout(found[step], trainer.layout, trainer.job.address)
        checkpoints.require_rank(found[step], trainer.args.process_index, trainer.job.address)
    return step


def _leave_newer(trainer: Any, found: dict[int, Any], step: int) -> None:
    """Set aside what this machine alone has of later steps: kept, it would outlive the checkpoints that this run makes."""
    from torch import distributed

    from pesc.train import checkpoints

    newer = sorted(number for number in found if number > step)
    if newer and trainer.args.should_save:
        where = f"continues from step {step}" if step else "begins anew"
        logger.warning(
            "%s %s: another machine of the run lacks the checkpoints at steps %s, which this one sets aside.",
            trainer.job.address, where, ", ".join(map(str, newer)),
        )  # fmt: skip
        for number in newer:
            checkpoints.set_aside(found[number], "unmatched")
    if trainer.args.world_size > 1:
        distributed.barrier()


def _watch(rank: int, job: Job, model: Any) -> Any:
    """Who notes the run's events."""
    from pesc.models import mixtral
    from pesc.moe.router import find_routers
    from pesc.stage import RECOMPUTED
    from pesc.train.flops import cost_of_token
    from pesc.train.watch import RunWatch

    routers = mixtral.find_routers(model) if job.config.method == "upcycle-full" else find_routers(model)
    router: Any = next(iter(routers.values()), None)
    top_k, experts = (router.top_k, router.num_experts) if router else (1, 1)
    cost = cost_of_token(model, top_k, experts, RECOMPUTED[job.execution.gradient_checkpointing])
    return RunWatch(rank, job, partial(_report, rank, job), cost, int(os.environ["WORLD_SIZE"]))


def _report(rank: int, job: Job, step: int, message: str, **fields: float) -> None:
    if rank == 0:
        emit({"event": "progress", "done": step, "total": job.steps, "unit": "steps", "message": message, "fields": fields})


if __name__ == "__main__":
    code = main(Path(sys.argv[1]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a collective library's destructor must not hang on ranks that are gone
