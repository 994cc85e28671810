"""One action: opened when the store has it, else built in its workspace, published and committed.

Key contracts
- `build_or_open` is the one way in which an action comes to be. It asks the store first, also when another process may have
  finished the same action meanwhile; it commits before it returns.
- A failure leaves the workspace for the next attempt.
- Stages marked `isolated` run in a process of their own; the caller never imports torch.
"""

from __future__ import annotations

import importlib
import logging
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from pesc.errors import PescError, StoreError, disk_sentence
from pesc.launch.energy import EnergyMeter
from pesc.launch.pool import worker_pool
from pesc.pipeline import Node, Stage, stage_named
from pesc.plan import key_of
from pesc.recipe import Recipe
from pesc.stage import BuildResult, Execution, MapShards, Progress, StageContext
from pesc.store import ArtifactRef, Manifest, Store
from pesc.store.digest import FileEntry
from pesc.store.manifest import Key, Output, OutputFile

logger = logging.getLogger(__name__)
ProgressCallback = Callable[[Progress], None]
OpenShards = Callable[[Execution, str], AbstractContextManager[MapShards]]
"""Makes the `map_shards` of one stage run from its execution block and its address, and ends what it started."""


class Job(BaseModel):
    """One action, ready to be built: everything a worker needs besides the store.  Small and JSON-serialisable."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    address: str
    recipe: str
    key: Key
    inputs: dict[str, ArtifactRef]
    execution: Execution = Execution()
    refresh: bool = False
    prefect_run: str | None = None

    @property
    def fingerprint(self) -> str:
        """Name of the result this job makes."""
        return self.key.fingerprint

    @property
    def label(self) -> str:
        """`train[pesc] demo 3f2a91bc`: what logs and run names show."""
        return f"{self.address} {self.recipe} {self.fingerprint[:8]}"


@dataclass(frozen=True)
class Outcome:
    """What became of one action."""

    address: str
    ref: ArtifactRef
    how: Literal["hit", "built"]
    seconds: float


def make_job(node: Node, recipe: Recipe, refs: Mapping[str, ArtifactRef], refresh: bool = False) -> Job:
    """The job of a node whose inputs are finished; `refs` maps addresses to references.  Optional inputs may be absent from it."""
    inputs = {name: refs[address] for name, address in node.inputs.items() if address in refs or name not in node.optional}
    key = key_of(node, {name: ref.digest for name, ref in inputs.items()})
    return Job(address=node.address, recipe=recipe.name, key=key, inputs=inputs, execution=recipe.execution, refresh=refresh)


def build_or_open(
    store: Store, job: Job, on_progress: ProgressCallback = lambda _p: None, open_shards: OpenShards = worker_pool
) -> Outcome:
    """The result of a job: opened when the store has it, else built, published and committed.

    `open_shards` says who does the shards of a stage: worker processes of this machine, unless the caller has a cluster to offer.
    Raises PescError: StoreBusyError when another process is building it, StageFailedError and its kin when the build fails.
    """
    started = time.monotonic()
    stage = stage_named(job.key.stage)
    if not job.refresh and (manifest := store.find(stage.name, job.fingerprint)):
        return Outcome(job.address, manifest.ref, "hit", time.monotonic() - started)
    with _full_disk_as_sentence(store), store.workspace(stage.name, job.fingerprint, job.label) as workspace:
        if not job.refresh and (manifest := store.find(stage.name, job.fingerprint)):  # finished while we came here
            return Outcome(job.address, manifest.ref, "hit", time.monotonic() - started)
        workspace.clear_output()
        began = datetime.now(UTC)
        with open_shards(job.execution, job.address) as map_shards, EnergyMeter() if stage.wants_gpu else nullcontext() as meter:
            result = call_builder(stage, _context(store, job, workspace.root, on_progress, map_shards))
        digest, entries = store.publish(workspace.out)
        seconds = time.monotonic() - started
        manifest = _manifest(job, stage, digest, entries, result, began, seconds)
        if meter is not None and meter.joules is not None:
            manifest.energy = {"joules": round(meter.joules, 1), "gpus": meter.gpus, "source": "NVML"}
        _keep_records(workspace.root, store.action_path(stage.name, job.fingerprint), ("log.txt", *stage.keeps))
        store.commit(manifest)
        workspace.discard()
    logger.info("%s built in %.1f s, object %s", job.label, seconds, digest[:8])
    return Outcome(job.address, manifest.ref, "built", seconds)


def _context(store: Store, job: Job, work: Path, on_progress: ProgressCallback, map_shards: MapShards) -> StageContext:
    stage = stage_named(job.key.stage)
    return StageContext(
        address=job.address,
        config=stage.config_type.model_validate(job.key.config),
        inputs={name: store.open(ref) for name, ref in job.inputs.items()},
        out=work / "out",
        work=work,
        execution=job.execution,
        on_progress=on_progress,
        map_shards=map_shards,
        digests={name: ref.digest for name, ref in job.inputs.items()},
    )


def call_builder(stage: Stage, ctx: StageContext) -> BuildResult:
    """Run a stage's builder, in a process of its own where the table says so."""
    if stage.isolated:
        from pesc.launch.isolated import build_isolated

        return build_isolated(stage, ctx)
    module, _, function = stage.builder.partition(":")
    return getattr(importlib.import_module(module), function)(ctx)


def _manifest(
    job: Job, stage: Stage, digest: str, entries: list[FileEntry], result: BuildResult, began: datetime, seconds: float
) -> Manifest:
    from pesc.code_lock import sources_digest
    from pesc.provenance import environment

    files = [OutputFile(path=e.path, size=e.size, sha256=e.sha256) for e in entries]
    return Manifest(
        address=job.address,
        recipe=job.recipe,
        fingerprint=job.fingerprint,
        key=job.key,
        input_fingerprints={name: ref.fingerprint for name, ref in job.inputs.items()},
        output=Output(digest=digest, size_bytes=sum(f.size for f in files), files=files),
        metrics=result.metrics,
        provenance=result.provenance,
        environment=environment(),
        execution=job.execution.model_dump(mode="json"),
        sources_digest=sources_digest(stage),
        started_at=began.isoformat(timespec="seconds"),
        seconds=round(seconds, 3),
        prefect_run=job.prefect_run,
    )


def _keep_records(work: Path, action: Path, names: tuple[str, ...]) -> None:
    """What a build tells of itself beside its output goes beside its manifest."""
    for name in (name for name in names if (work / name).exists()):
        action.mkdir(parents=True, exist_ok=True)
        if (work / name).is_dir():
            shutil.copytree(work / name, action / name, dirs_exist_ok=True)
        else:
            shutil.copyfile(work / name, action / name)


class _full_disk_as_sentence:
    """Turns the operating system's complaints about the store's disk into sentences."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, _trace: Any) -> None:
        if isinstance(error, OSError) and not isinstance(error, PescError) and (sentence := disk_sentence(error, self._store.root)):
            raise StoreError(sentence) from error


def adopt(store: Store, job: Job, donor: Manifest, reason: str) -> Manifest:
    """Let an earlier result of the same stage stand for this job, with the reason on record.

    For an expensive result after a change that cannot alter it. Raises StoreError when the donor's object is not whole.
    """
    if donor.key.stage != job.key.stage:
        raise StoreError(f"{donor.address} is a result of {donor.key.stage}, not of {job.key.stage}.")
    if not store.has_object(donor):
        raise StoreError(f"The object of {donor.fingerprint[:12]} is not whole; `pesc fsck` says what is missing.")
    update = {
        "address": job.address, "recipe": job.recipe, "fingerprint": job.fingerprint, "key": job.key, "made_by": "adopt",
        "input_fingerprints": {name: ref.fingerprint for name, ref in job.inputs.items()},
        "reason": f"{reason} (from {donor.fingerprint[:12]})", "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }  # fmt: skip
    manifest = donor.model_copy(update=update)
    store.commit(manifest)
    return manifest
