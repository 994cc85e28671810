"""What the stage and its ranks tell each other, as files in the workspace.

job.json            stage -> ranks   everything a rank needs
status.json         ranks -> stage   how the run ended; written by the first rank of each node
errors/rank_N.json  ranks -> stage   an exception of rank N
checkpoints/        ranks -> ranks   what a later run continues
result/             ranks -> stage   the stage's output, when the status is "finished"
pids/               ranks -> stage   who must not outlive the launcher
MET                 ranks -> stage   they have been started: all machines were there
heartbeat/rank_N    ranks -> stage   what rank N is doing
STOP                user -> ranks    save and end after the current step
"""

from __future__ import annotations

import hashlib
import json
import os
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pesc.errors import PescError
from pesc.stage import Execution
from pesc.train.config import TrainConfig

State = Literal["finished", "interrupted"]
_WEIGHT = {"out of memory": 1, "": 2, "lost peer": 3}
_MEMORY_SIGNS = ("out of memory", "can't allocate memory", "cannot allocate memory")
_PEER_SIGNS = (
    "connection closed by peer", "connection reset by peer", "broken pipe", "remote process exited", "ncclremoteerror",
    "timed out waiting", "pair closure", "connectfullmesh failed",
)  # fmt: skip


@dataclass(frozen=True)
class Job:
    """A training run, as each rank sees it."""

    address: str
    config: TrainConfig
    execution: Execution
    model: Path
    blocks: Path
    work: Path
    device: str
    steps: int
    log_level: int

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints are."""
        return self.work / "checkpoints"

    @property
    def result(self) -> Path:
        """Where the ranks put the stage's output."""
        return self.work / "result"

    @property
    def pids(self) -> Path:
        """Where the ranks leave their pids."""
        return self.work / "pids"

    @property
    def heartbeats(self) -> Path:
        """Where the ranks leave signs of life."""
        return self.work / "heartbeat"

    @property
    def errors(self) -> Path:
        """Where the ranks leave their exceptions."""
        return self.work / "errors"

    @property
    def stop_file(self) -> Path:
        """Its existence asks the ranks to save and end."""
        return self.work / "STOP"

    @property
    def met_file(self) -> Path:
        """Its existence says that the machines have met and the ranks been started."""
        return self.work / "MET"

    @property
    def run_id(self) -> str:
        """A name of the run, equal on all its machines: what it trains, not where."""
        told = [
            self.address,
            self.config.model_dump_json(),
            str(self.steps),
            str(self.execution.num_nodes),
            self.model.name,
            self.blocks.name,
        ]
        return hashlib.sha256("\n".join(told).encode()).hexdigest()[:16]

    def write(self) -> Path:
        """Write job.json; returns its path."""
        path = self.work / "job.json"
        fields = {name: getattr(self, name) for name in ("address", "device", "steps", "log_level")}
        fields |= {name: str(getattr(self, name).resolve()) for name in ("model", "blocks", "work")}
        fields |= {name: getattr(self, name).model_dump(mode="json") for name in ("config", "execution")}
        write_json(path, fields)
        return path


def read_job(path: Path) -> Job:
    """The job of a file."""
    fields = json.loads(path.read_text(encoding="utf-8"))
    fields |= {name: Path(fields[name]) for name in ("model", "blocks", "work")}
    fields |= {"config": TrainConfig.model_validate(fields["config"]), "execution": Execution.model_validate(fields["execution"])}
    return Job(**fields)


@dataclass(frozen=True)
class Status:
    """How a run ended.  reason: why it was interrupted.  metrics: measurements for the manifest."""

    state: State
    step: int
    reason: str
    metrics: dict[str, Any]


def write_status(work: Path, status: Status) -> None:
    """Write status.json."""
    write_json(work / "status.json", vars(status))


def read_status(work: Path) -> Status | None:
    """The status of the last run, if it lived to write one."""
    try:
        return Status(**json.loads((work / "status.json").read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None


@dataclass(frozen=True)
class RankError:
    """An exception of one rank.  kind: the PescError's class, "out of memory", "lost peer" (another rank ended first), or "" for a defect."""

    rank: int
    kind: str
    message: str
    trace: str
    time: float


def record_error(folder: Path, rank: int, error: BaseException) -> None:
    """Leave an exception for the stage."""
    folder.mkdir(parents=True, exist_ok=True)
    kind = _kind_of(error)
    trace = "".join(traceback.format_exception(error))
    write_json(folder / f"rank_{rank}.json", {"rank": rank, "kind": kind, "message": str(error), "trace": trace})


def read_errors(folder: Path) -> list[RankError]:
    """The exceptions of all ranks: the user's errors first, then memory, then defects, then lost peers; within a kind the earliest."""
    errors = [RankError(**json.loads(path.read_text(encoding="utf-8")), time=path.stat().st_mtime) for path in folder.glob("rank_*.json")]
    return sorted(errors, key=lambda e: (_WEIGHT.get(e.kind, 0), e.time))


def _kind_of(error: BaseException) -> str:
    text = str(error).lower()
    if isinstance(error, PescError):
        return type(error).__name__
    if isinstance(error, MemoryError) or any(sign in text for sign in _MEMORY_SIGNS):
        return "out of memory"
    return "lost peer" if any(sign in text for sign in _PEER_SIGNS) else ""


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(value, indent=1), encoding="utf-8")
    os.replace(partial, path)
