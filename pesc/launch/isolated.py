"""Run a stage's builder in a process of its own, so that the caller never imports torch or touches CUDA.

    python -m pesc.launch.isolated JOB.json        (what the child runs; `build_isolated` starts it)

The job names the builder, its settings and its directories.  Progress and log records of `pesc` come back as events, the result or
the error as `result.json` in the workspace, everything else that the child prints is in `log.txt` there.  Shards are done by worker
processes of the child, or, where the execution block names a cluster, by the caller's `map_shards`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import logging
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pesc import errors
from pesc.errors import PescError, PreemptedError, StageFailedError, StoreError, disk_sentence
from pesc.launch import supervise
from pesc.launch.events import LogEmitter, ProgressEmitter, relay
from pesc.launch.pool import worker_pool
from pesc.launch.relay import ShardServer, relayed_shards
from pesc.pipeline import Stage
from pesc.redaction import redact_tree
from pesc.stage import BuildResult, Execution, MapShards, StageContext

JOB_NAME, RESULT_NAME, LOG_NAME = "job.json", "result.json", "log.txt"
_FAILED_BY_ERROR = 3


def build_isolated(stage: Stage, ctx: StageContext) -> BuildResult:
    """Run `stage.builder` on `ctx` in a child process.

    Raises the builder's own PescError (same class, same sentence), StageFailedError with the tail of the log for any other end,
    PreemptedError when somebody else stopped the child, and whatever interrupts the caller after the child has been stopped.
    """
    job_path, result_path, log_path = (ctx.work / name for name in (JOB_NAME, RESULT_NAME, LOG_NAME))
    for old in (result_path, log_path):
        old.unlink(missing_ok=True)
    job_path.write_text(json.dumps(_describe(stage, ctx), indent=1), encoding="utf-8")
    server = ShardServer(ctx.map_shards)
    outcome = supervise.run(
        [sys.executable, "-m", "pesc.launch.isolated", str(job_path.resolve())],
        env={"TQDM_DISABLE": os.environ.get("TQDM_DISABLE", "1")},  # progress comes as events; bars would fill the log
        log_path=log_path,
        on_event=lambda event: server.take(event) or relay(event, ctx.on_progress),
        step=server.step,
    )
    if outcome.returncode in (0, _FAILED_BY_ERROR) and result_path.exists():
        return _read_result(json.loads(result_path.read_text(encoding="utf-8")))
    raise ended_badly(ctx.address, outcome, log_path)


def ended_badly(address: str, outcome: supervise.Outcome, log_path: Path) -> StageFailedError:
    """The error of a program that ended without a result, as a sentence with the tail of its log."""
    tail = f"\n{outcome.tail}" if outcome.tail else " is empty."
    where = f"The end of its log {log_path}{':' if outcome.tail else ''}{tail}"
    if outcome.returncode in (-signal.SIGTERM, -signal.SIGINT):
        name = signal.Signals(-outcome.returncode).name
        return PreemptedError(f"{address} was stopped from outside ({name}); run it again. {where}")
    if outcome.returncode == -signal.SIGKILL:
        return StageFailedError(
            f"{address} was killed (SIGKILL), most often because the machine ran out of memory: free some, or lower its batch size or "
            f"workers. {where}"
        )
    if outcome.returncode < 0:
        return StageFailedError(f"{address} crashed ({signal.Signals(-outcome.returncode).name}). {where}")
    return StageFailedError(f"{address} failed with exit code {outcome.returncode}. {where}")


def error_record(error: PescError) -> dict[str, str]:
    """A PescError as JSON."""
    return {"class": type(error).__name__, "message": str(error)}


def error_from_record(record: Mapping[str, str]) -> PescError:
    """The PescError of a record, of the class it had; StageFailedError when that class is unknown here."""
    kind = getattr(errors, record["class"], None)
    if isinstance(kind, type) and issubclass(kind, PescError):
        return kind(record["message"])
    return StageFailedError(record["message"])


def _describe(stage: Stage, ctx: StageContext) -> dict[str, Any]:
    kind = type(ctx.config)
    return {
        "builder": stage.builder,
        "address": ctx.address,
        "config_type": f"{kind.__module__}:{kind.__qualname__}",
        "config": ctx.config.model_dump(mode="json"),
        "inputs": {name: str(Path(path).resolve()) for name, path in ctx.inputs.items()},
        "digests": dict(ctx.digests),
        "out": str(ctx.out.resolve()),
        "work": str(ctx.work.resolve()),
        "execution": ctx.execution.model_dump(mode="json"),
        "log_level": logging.getLogger("pesc").getEffectiveLevel(),
    }


def _read_result(record: Mapping[str, Any]) -> BuildResult:
    if error := record.get("error"):
        raise error_from_record(error)
    return BuildResult(record["metrics"], record["provenance"])


def _load(reference: str) -> Any:
    module, _, name = reference.partition(":")
    value: Any = importlib.import_module(module)
    for part in name.split("."):
        value = getattr(value, part)
    return value


def configure_logging(level: int) -> None:
    """Send records of `pesc` to the caller as events, and everybody else's to stderr."""
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    package = logging.getLogger("pesc")
    package.setLevel(level)
    package.addHandler(LogEmitter())
    package.propagate = False


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically, and without secrets."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(redact_tree(value), indent=1), encoding="utf-8")
    os.replace(partial, path)


def _shards(ctx: StageContext) -> contextlib.AbstractContextManager[MapShards]:
    """The child's own worker processes, or the caller's cluster."""
    if ctx.execution.task_runner == "local":
        return worker_pool(ctx.execution, ctx.address)
    return contextlib.nullcontext(relayed_shards(ctx.work))


def main(job_path: Path) -> int:
    """Run the job of a file.  Any error but a PescError leaves its traceback in the log."""
    job = json.loads(job_path.read_text(encoding="utf-8"))
    configure_logging(job["log_level"])
    ctx = StageContext(
        address=job["address"],
        config=_load(job["config_type"]).model_validate(job["config"]),
        inputs={name: Path(path) for name, path in job["inputs"].items()},
        out=Path(job["out"]),
        work=Path(job["work"]),
        execution=Execution.model_validate(job["execution"]),
        on_progress=ProgressEmitter(),
        digests=job["digests"],
    )
    result_path = ctx.work / RESULT_NAME
    try:
        with _shards(ctx) as map_shards:
            result = _load(job["builder"])(dataclasses.replace(ctx, map_shards=map_shards))
    except PescError as error:
        logging.getLogger(__name__).debug("%s", error, exc_info=True)
        write_json(result_path, {"error": error_record(error)})
        return _FAILED_BY_ERROR
    except OSError as error:
        sentence = disk_sentence(error, ctx.work)
        if sentence is None:
            raise
        with contextlib.suppress(OSError):  # a disk without room for this line says so by the exit code and the log
            write_json(result_path, {"error": error_record(StoreError(sentence))})
        print(sentence, file=sys.stderr)
        return _FAILED_BY_ERROR
    write_json(result_path, {"metrics": result.metrics, "provenance": result.provenance})
    return 0


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        sys.exit(main(Path(sys.argv[1])))
