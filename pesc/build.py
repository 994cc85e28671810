"""One action: opened when the store has it, else built in its workspace, published and committed.

Key contracts
- `build_or_open` is the one way in which an action comes to be. It asks the store first, also when another process may have
  finished the same action meanwhile; it commits before it returns.
- Who finds the action being built, on this disk or by another machine of the same remote, waits for it and takes the result.
- What it returns the remote has as well, when there is one: also a HIT that has not been shared before.
- A failure leaves the workspace for the next attempt.
- Stages marked `isolated` run in a process of their own; the caller never imports torch.
"""

from __future__ import annotations

import importlib
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict

from pesc.errors import PescError, RemoteError, StoreError, disk_sentence
from pesc.launch.energy import EnergyMeter
from pesc.launch.pool import worker_pool
from pesc.pipeline import Node, Stage, stage_named
from pesc.plan import key_of
from pesc.recipe import Recipe
from pesc.stage import BuildResult, Execution, MapShards, Progress, StageContext
from pesc.store import ArtifactRef, Manifest, Store
from pesc.store.digest import FileEntry
from pesc.store.layout import records_in
from pesc.store.manifest import Key, Output, OutputFile
from pesc.store.patience import Patience
from pesc.store.workspace import Workspace

if TYPE_CHECKING:
    from pesc.store.transfer import OnProgress

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
    Raises PescError: StoreBusyError when another process is building it and the patience is over, StageFailedError and its kin when the
    build fails, RemoteError when the result is here and could not be shared.
    """
    started = time.monotonic()
    stage = stage_named(job.key.stage)
    shown = _as_progress(on_progress)
    if not job.refresh and (manifest := store.find(stage.name, job.fingerprint)):
        return Outcome(job.address, store.share(manifest, on_progress=shown).ref, "hit", time.monotonic() - started)
    with _full_disk_as_sentence(store), _alone(store, stage, job, on_progress) as workspace:
        if not job.refresh and (manifest := store.find(stage.name, job.fingerprint)):  # finished while we came here
            workspace.discard()
            return Outcome(job.address, store.share(manifest, on_progress=shown).ref, "hit", time.monotonic() - started)
        workspace.clear_output()
        manifest = _build(store, stage, job, workspace, on_progress, open_shards)
        store.commit(manifest)
        workspace.discard()
        seconds = time.monotonic() - started
        logger.info("%s built in %.1f s, object %s", job.label, seconds, manifest.output.digest[:8])
        standing = _share(store, job, manifest, shown)
    return Outcome(job.address, standing.ref, "built" if standing.output.digest == manifest.output.digest else "hit", seconds)


@contextmanager
def _alone(store: Store, stage: Stage, job: Job, on_progress: ProgressCallback) -> Iterator[Workspace]:
    """The workspace of a job, when nobody else builds it: neither on this disk nor, as far as a lease can tell, elsewhere.

    Machines that train together (`execution.num_nodes`) build one action at the same time, each in a store of its own: they hold no
    lease and wait for nobody.
    """
    if stage.name == "train" and job.execution.num_nodes > 1:
        with store.workspace(stage.name, job.fingerprint, job.label) as workspace:
            yield workspace
        return
    patience = Patience(
        job.execution.wait_seconds,
        lambda waited, holder: on_progress(Progress(waited, job.execution.wait_seconds or 0, "s", f"waits for {holder}")),
    )
    with (
        store.workspace(stage.name, job.fingerprint, job.label, patience) as workspace,
        store.lease(stage.name, job.fingerprint, job.label, patience, until_found=not job.refresh),
    ):
        yield workspace


def _build(store: Store, stage: Stage, job: Job, workspace: Workspace, on_progress: ProgressCallback, open_shards: OpenShards) -> Manifest:
    """Build in the workspace and publish the object; the manifest, which is yet to be committed."""
    inputs = {name: store.open(ref, _as_progress(on_progress)) for name, ref in job.inputs.items()}
    for ref in job.inputs.values():
        store.note_use(ref)
    began, started = datetime.now(UTC), time.monotonic()
    with open_shards(job.execution, job.address) as map_shards, EnergyMeter() if stage.wants_gpu else nullcontext() as meter:
        result = call_builder(stage, _context(job, inputs, workspace.root, on_progress, map_shards))
    digest, entries = store.publish(workspace.out)
    manifest = _manifest(job, stage, digest, entries, result, began, time.monotonic() - started)
    if meter is not None and meter.joules is not None:
        manifest.energy = {"joules": round(meter.joules, 1), "gpus": meter.gpus, "source": "NVML"}
    action = store.action_path(stage.name, job.fingerprint)
    _keep_records(workspace.root, action, ("log.txt", *stage.keeps))
    manifest.records = [_output_file(entry) for entry in records_in(action)]
    return manifest


def _share(store: Store, job: Job, manifest: Manifest, on_progress: OnProgress) -> Manifest:
    try:
        return store.share(manifest, is_trusted=True, on_progress=on_progress)
    except RemoteError as error:
        raise type(error)(
            f"{job.label} is built and kept in {store.root}, but was not pushed; the next run, or `pesc push`, does it. {error}"
        ) from error


def _as_progress(on_progress: ProgressCallback) -> OnProgress:
    """Bytes that move, as a stage's progress."""
    return lambda done, total, message: on_progress(Progress(done // 1_000_000, total // 1_000_000, "MB", message))


def _context(job: Job, inputs: Mapping[str, Path], work: Path, on_progress: ProgressCallback, map_shards: MapShards) -> StageContext:
    stage = stage_named(job.key.stage)
    return StageContext(
        address=job.address,
        config=stage.config_type.model_validate(job.key.config),
        inputs=inputs,
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

    files = [_output_file(entry) for entry in entries]
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
        refreshed=job.refresh,
        prefect_run=job.prefect_run,
    )


def _output_file(entry: FileEntry) -> OutputFile:
    return OutputFile(path=entry.path, size=entry.size, sha256=entry.sha256)


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
        "address": job.address, "recipe": job.recipe, "fingerprint": job.fingerprint, "key": job.key, "made_by": "adopt", "refreshed": False, "records": [],
        "input_fingerprints": {name: ref.fingerprint for name, ref in job.inputs.items()},
        "reason": f"{reason} (from {donor.fingerprint[:12]})", "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }  # fmt: skip
    manifest = donor.model_copy(update=update)
    store.commit(manifest)
    return manifest
