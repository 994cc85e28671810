"""Run a recipe in this process, with no server: the same body that the Prefect tasks call.

    recipe → graph → for each action in order: fingerprint, HIT? open it : build it in its workspace, publish, commit

Key contracts
- `build_or_open` is the one way in which an action comes to be. It asks the store first, also when another process may have
  finished the same action meanwhile; it commits before it returns.
- Failures leave finished actions as they are and the failing one's workspace for the next attempt.
- A benchmark that fails leaves a hole: the others are still run, the report is built without it and says so, and the run ends with
  the sentence of every failure. Running again builds what is missing.
- Benchmarks of one arm are independent: `execution.parallel_benchmarks` of them are built at once, each in a process of its own.
- Stages marked `isolated` run in a process of their own; the caller never imports torch.
"""

from __future__ import annotations

import importlib
import logging
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from pesc.errors import CancelledError, HolesError, PescError, RecipeError, StoreBusyError, StoreError, disk_sentence
from pesc.launch.energy import EnergyMeter
from pesc.launch.pool import worker_pool
from pesc.pipeline import Node, Stage, build_graph, stage_named
from pesc.plan import Plan, PlannedAction, Selection, key_of, make_plan, reason_to_run
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


def run_recipe(
    recipe: Recipe,
    store: Store,
    selection: Selection = Selection(),
    on_action: Callable[[Node, str], None] = lambda _node, _reason: None,
    on_outcome: Callable[[Outcome], None] = lambda _outcome: None,
    on_progress: ProgressCallback = lambda _p: None,
    on_hole: Callable[[Node, PescError], None] = lambda _node, _error: None,
) -> dict[str, Outcome]:
    """Run everything the selection allows; returns the outcome by address.

    `on_action(node, reason)` is called before an action is built, `on_outcome` after each action, `on_hole` when a benchmark failed.
    Raises PescError; HolesError, at the end, when benchmarks failed.
    """
    outcomes: dict[str, Outcome] = {}
    record, holes = RunRecord(store, recipe), Holes()

    def end(step: Step, result: Outcome | PescError) -> None:
        if isinstance(result, PescError):
            holes.take(step, result)
            on_hole(step.node, result)
        else:
            outcomes[step.node.address] = step.finish(result)
            on_outcome(result)

    try:
        for steps in resolve(recipe, store, selection):
            if any(step.job for step in steps):
                record.write(outcomes)
            slots = min(recipe.execution.parallel_benchmarks, sum(step.job is not None for step in steps))
            if slots > 1:
                _build_side_by_side(store, steps, slots, on_action, on_progress, end)
                done = {step.node.address: outcomes.pop(step.node.address) for step in steps if step.node.address in outcomes}
                outcomes |= done  # in the recipe's order, whichever was first
            else:
                _build_in_turn(store, steps, on_action, on_progress, end)
    finally:
        record.write(outcomes)
    holes.end(recipe, store, outcomes)
    return outcomes


OnAction = Callable[[Node, str], None]
OnEnd = Callable[["Step", Outcome | PescError], None]


def _build_in_turn(store: Store, steps: Sequence[Step], on_action: OnAction, on_progress: ProgressCallback, end: OnEnd) -> None:
    for step in steps:
        if step.job is None:
            end(step, step.outcome)
            continue
        on_action(step.node, step.reason)
        try:
            result: Outcome | PescError = build_or_open(store, step.job, on_progress)
        except PescError as error:
            result = error
        end(step, result)


def _build_side_by_side(
    store: Store, steps: Sequence[Step], slots: int, on_action: OnAction, on_progress: ProgressCallback, end: OnEnd
) -> None:
    from pesc.launch.side_by_side import run_jobs

    by_address = {step.node.address: step for step in steps}
    for step in steps:
        if step.job is None:
            end(step, step.outcome)
    run_jobs(
        store, [step.job for step in steps if step.job], slots,
        on_start=lambda job: on_action(by_address[job.address].node, by_address[job.address].reason),
        on_progress=lambda job, progress: on_progress(replace(progress, message=f"{job.address} {progress.message}".rstrip())),
        on_end=lambda job, result: end(by_address[job.address], result),
    )  # fmt: skip


class Holes:
    """The benchmarks of one run that failed while the rest went on."""

    def __init__(self) -> None:
        self.errors: dict[str, PescError] = {}

    def take(self, step: Step, error: PescError) -> None:
        """Note a failure.  Raises the error again when the run cannot go on after it."""
        ends_everything = isinstance(error, StoreError | CancelledError) and not isinstance(error, StoreBusyError)
        if not step.may_fail or ends_everything:
            raise error
        self.errors[step.node.address] = error
        step.fail()

    def end(self, recipe: Recipe, store: Store, outcomes: Mapping[str, Outcome]) -> None:
        """Raises what failed: the error itself when it is one and no report was made without it, else HolesError with every sentence."""
        if not self.errors:
            return
        count, report = len(self.errors), outcomes.get("report")
        if count == 1 and report is None:
            raise next(iter(self.errors.values()))
        shown = ""
        if report is not None:
            page = store.object_path(report.ref.digest) / "report.html"
            shown = f"; the report {page} shows {'it as a hole' if count == 1 else 'them as holes'}"
        lines = [f"{address}: {error}" for address, error in self.errors.items()]
        raise HolesError(
            f"{count} {'benchmark' if count == 1 else 'benchmarks'} of {recipe.name} ended without a result{shown}. "
            "Everything else is finished and kept; run again to fill in what is missing.\n" + "\n".join(lines),
            outcomes,
        )


class RunRecord:
    """Which actions a run uses, for `gc`: written before each build, so that nothing a long build reads is taken for unused."""

    def __init__(self, store: Store, recipe: Recipe) -> None:
        self._store, self._recipe = store, recipe.name
        self._name = datetime.now(UTC).strftime("%Y%m%dT%H%M%S%f")

    def write(self, outcomes: Mapping[str, Outcome]) -> None:
        """Write what is known so far.  A store that cannot be written costs the record, not the run."""
        if not outcomes:
            return
        try:
            self._store.record_run(self._recipe, self._name, {address: o.ref.fingerprint for address, o in outcomes.items()})
        except OSError as error:
            logger.debug("The record of this run was not written: %s", error)


class Step:
    """One action of a run in progress: a HIT with its `outcome`, or a `job` whose outcome `finish` must be told (or `fail`)."""

    def __init__(
        self, node: Node, reason: str, job: Job | None, hit: ArtifactRef | None, refs: dict[str, ArtifactRef], may_fail: bool = False
    ) -> None:
        self.node, self.reason, self.job, self._hit, self._refs, self.may_fail = node, reason, job, hit, refs, may_fail
        self.failed = False
        if hit:
            refs[node.address] = hit

    @property
    def outcome(self) -> Outcome:
        """The outcome of a HIT."""
        assert self._hit is not None
        return Outcome(self.node.address, self._hit, "hit", 0.0)

    def finish(self, outcome: Outcome) -> Outcome:
        """Hand the result on to the actions that need it."""
        self._refs[self.node.address] = outcome.ref
        return outcome

    def fail(self) -> None:
        """Leave a hole: what can do without this result goes on."""
        self.failed = True


def resolve(recipe: Recipe, store: Store, selection: Selection, hits_as_jobs: bool = False) -> Iterator[tuple[Step, ...]]:
    """The actions of a run in order, each decided only when its inputs are there (so equal bytes upstream make a HIT here).

    What comes together may be built at the same time: benchmarks that follow one another. The caller runs each step's job and calls
    `step.finish` (or `step.fail`) before it asks for the next. With `hits_as_jobs` HITs come with a job too, for callers that show them.
    Raises RecipeError or EvaluationError before anything is built: an action that is BLOCKED, figures that do not exist, a preflight's faults.
    """
    plan = make_plan(recipe, store, selection)
    if blocked := [action for action in plan if action.status == "BLOCKED"]:
        raise RecipeError(_blocked_sentence(recipe, blocked))
    if any(action.node.stage.name == "report" and action.status == "RUN" for action in plan):
        _check_figures(recipe)
    _ask_preflights(recipe, plan)
    graph = build_graph(recipe)
    refs: dict[str, ArtifactRef] = {}
    holes: set[str] = set()
    refreshed = selection.refreshed(graph)
    reasons = {action.address: action.reason for action in plan}
    for group in _independent(node for node in graph.nodes if node.address in reasons):
        steps: list[Step] = []
        for node in group:
            missing = [address for address in node.inputs.values() if address in holes]
            if missing and not _can_do_without(node, missing):
                holes.add(node.address)
                continue
            job = make_job(node, recipe, refs, refresh=node.address in refreshed)
            manifest = None if job.refresh else store.find(node.stage.name, job.fingerprint)
            hit = manifest.ref if manifest else None
            reason = reasons[node.address] if hit else reason_to_run(recipe, store, node, job.key, job.refresh)
            reason = f"without {', '.join(missing)}; {reason}" if missing else reason
            steps.append(Step(node, reason, None if hit and not hits_as_jobs else job, hit, refs, node.address in graph.may_fail))
        if steps:
            yield tuple(steps)
        for step in steps:
            if step.failed:
                refs.pop(step.node.address, None)
                holes.add(step.node.address)
            elif step.node.address not in refs:
                raise RuntimeError(f"the caller of resolve() did not finish {step.node.address}")


def _independent(nodes: Iterable[Node]) -> Iterator[list[Node]]:
    """Nodes one by one, benchmarks that follow one another together: none of them reads another."""
    for is_benchmark, group in groupby(nodes, key=lambda node: node.stage.name == "evaluate"):
        if is_benchmark:
            yield list(group)
        else:
            yield from ([node] for node in group)


def _can_do_without(node: Node, missing: list[str]) -> bool:
    optional = {node.inputs[name] for name in node.optional}
    return optional.issuperset(missing) and bool(optional.difference(missing))


def _check_figures(recipe: Recipe) -> None:
    """The report comes last; figures that it cannot find are told before the first stage.  Raises EvaluationError."""
    from pesc.evaluate.baselines import load_baselines

    figures = load_baselines()
    for system in recipe.report.baselines:
        figures.require_system(system)
    for benchmark in recipe.evaluate.benchmarks.values():
        if benchmark.baseline:
            figures.require_row(benchmark.baseline)


def _ask_preflights(recipe: Recipe, plan: Plan) -> None:
    """What would stop a stage after days of training is told before those begin.  Raises RecipeError with every fault.

    It takes some seconds, so it is asked only where a training comes first.
    """
    running = {action.node.stage.name: action.node.stage for action in plan if action.status == "RUN"}
    if "train" not in running:
        return
    faults: list[str] = []
    for stage in running.values():
        if stage.preflight:
            module, _, function = stage.preflight.partition(":")
            faults += getattr(importlib.import_module(module), function)(recipe)
    if faults:
        raise RecipeError("\n".join(faults))


def _blocked_sentence(recipe: Recipe, blocked: list[PlannedAction]) -> str:
    first = next((a for a in blocked if a.fingerprint), blocked[0])
    return (
        f"{first.address} of recipe {recipe.name!r} is needed but is not in the store ({first.reason}). "
        f"Build it with `pesc run {recipe.name} --until '{first.address}'`, or widen the selection."
    )


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
