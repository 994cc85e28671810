"""The contract between a stage and whoever runs it.

A stage is a function `build(ctx: StageContext) -> BuildResult`. It reads `ctx.config` and `ctx.inputs`, fills the empty
directory `ctx.out`, may keep resumable scratch in `ctx.work`, and returns measurements.

Contract
- The bytes in `ctx.out` depend on `ctx.config` and the bytes of `ctx.inputs` alone. Times, host names and hardware belong in
  `BuildResult.metrics`, which is written to the manifest and never hashed.
- `StageConfig` may change the bytes and is in the fingerprint. `Execution` may not, and is only recorded.
- Input directories are immutable; a builder never writes below them. It may hard-link files out of them.
- A builder raises `pesc.errors.PescError` for anything the user can mend.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class StageConfig(BaseModel):
    """Settings that may change the bytes a stage writes.  Frozen, closed (an unknown field is an error), fully in the key."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)  # no JSON, so no key, for those


RECOMPUTED = {"none": 0.0, "selective": 0.5, "full": 1.0}
"""Share of the layers' forward passes that the backward pass does again, by `Execution.gradient_checkpointing`."""


class Execution(BaseModel):
    """Settings that may not change the bytes: where and how fast a stage runs.  Recorded in the manifest, not in the key."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="Where tensors live. auto: CUDA when there is a GPU, else the CPU."
    )
    num_nodes: int = Field(default=1, ge=1, description="Machines that take part in training.")
    num_processes: int | None = Field(default=None, ge=1, description="torchrun ranks on each node. Default: one a GPU, or one on a CPU.")
    master: str | None = Field(
        default=None, description="host:port where the machines meet: one of them, the same for all; needed when num_nodes > 1."
    )
    address: str | None = Field(
        default=None, description="This machine as the others reach it, where that outlives it. Default: its address towards the master."
    )
    join_timeout: int = Field(default=600, ge=1, description="Seconds that a machine waits for the others, at the start and at a restart.")
    peer_timeout: int = Field(
        default=3600, ge=1, description="Seconds that a rank waits for one that says nothing before it is given up; at least load_seconds."
    )
    wait_seconds: float | None = Field(
        default=None, ge=0, description="Seconds to wait for another process that builds the same result. Default: until it has ended."
    )
    restarts: int = Field(
        default=0, ge=0, description="How often training goes on from its last checkpoint by itself when a process or a machine was lost."
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(default=2, description="DeepSpeed ZeRO stage. 3 shards the 4-bit base as well.")
    gradient_checkpointing: Literal["none", "selective", "full"] = Field(
        default="full",
        description="Recompute activations in the backward pass: less memory, more time. full: in every layer; selective: in every second "
        "one, half of both; none.",
    )
    save_every_steps: int = Field(default=200, ge=1, description="Optimizer steps between checkpoints that a killed run resumes from.")
    gradient_check_steps: int = Field(
        default=8, ge=1, description="Optimizer steps in which everything declared trainable must have got a gradient, or the run stops."
    )
    keep_checkpoints: int = Field(default=2, ge=1, description="Newest checkpoints that are kept; more survive more damage.")
    grace_seconds: int = Field(
        default=15,
        ge=1,
        description="Seconds that the ranks have to end their step and save when they are told to stop. At most what the scheduler grants.",
    )
    hang_seconds: float = Field(
        default=1800.0, gt=0, description="A rank that finishes no micro-batch for so long is taken for hung, and the run is ended."
    )
    load_seconds: float = Field(
        default=3600.0, gt=0, description="The same while the model is loaded, a checkpoint saved or the result written."
    )
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = Field(
        default=("tensorboard",), description="Who else records a training run: TensorBoard's files in the workspace, W&B, MLflow."
    )
    log_every_steps: int = Field(default=1, ge=1, description="Optimizer steps between progress lines.")
    parallel_benchmarks: int = Field(
        default=1,
        ge=1,
        description="Benchmarks that are run at the same time, each in a process with a GPU of its own where there are several.",
    )
    evaluate_batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        default="auto",
        description="Requests in one forward pass of an evaluation (engine vllm: at the same time). auto: many; halved for as long as they do "
        "not fit the GPU.",
    )
    evaluate_processes: int = Field(
        default=1,
        ge=1,
        description="Processes that share the requests of one benchmark, each with the whole model (on a GPU of its own). Engine vllm has one "
        "server, whatever is said here.",
    )
    num_workers: int | None = Field(default=None, ge=1, description="Worker processes or threads of the data stages. Default: one a core.")
    task_runner: Literal["local", "dask", "ray"] = Field(
        default="local",
        description="Who does the shards of the data stages: processes of this machine, or (in a Prefect flow) Dask or Ray.",
    )
    cluster: str | None = Field(
        default=None, description="Address of a running Dask or Ray cluster. Default: one of num_workers processes on this machine."
    )

    @model_validator(mode="after")
    def _a_cluster_has_a_runner(self) -> Execution:
        if self.cluster is not None and self.task_runner == "local":
            raise ValueError(f"cluster is {self.cluster!r}, but task_runner is local: set task_runner to dask or ray, or remove cluster.")
        return self


@dataclass(frozen=True)
class Progress:
    """How far a stage is.  `done` and `total` are in `unit`s; `fields` are measurements worth seeing (loss, tokens/s)."""

    done: float
    total: float
    unit: str = "steps"
    message: str = ""
    fields: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class BuildResult:
    """What a builder tells the manifest.

    metrics: JSON measurements (counts, losses, seconds).  provenance: resolved facts (commit of a revision, package versions,
    digests of what was fetched).  Neither is hashed.
    """

    metrics: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)


MapShards = Callable[[Callable[[Any], Any], Sequence[Any]], Iterable[Any]]
"""The type of `StageContext.map_shards`."""


def map_here(function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
    """The plainest `StageContext.map_shards`: one after the other, in this process."""
    return map(function, items)


@dataclass(frozen=True)
class StageContext:
    """Everything a builder gets.  `inputs` maps an input's name (see the stage table) to its object directory, `digests` to that object's name.

    `map_shards(function, items)` gives function(item) for each item, in the order of the items, from as many workers as the execution
    block says, on this machine or a cluster that shares its file system.  The function is a module-level one (or a `functools.partial` of
    one); it, the items and the results are pickled, so they carry paths and counts, not rows.  Shards are cut by the input alone,
    never by the number of workers: the bytes must not depend on it.
    """

    address: str
    config: Any
    inputs: Mapping[str, Path]
    out: Path
    work: Path
    execution: Execution = field(default_factory=Execution)
    on_progress: Callable[[Progress], None] = lambda _progress: None
    map_shards: MapShards = map_here
    digests: Mapping[str, str] = field(default_factory=dict)

    def progress(self, done: float, total: float, unit: str = "steps", message: str = "", **fields: float) -> None:
        """Report progress; cheap enough to call for every unit."""
        self.on_progress(Progress(done, total, unit, message, fields))
