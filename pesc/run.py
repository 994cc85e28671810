"""Run a recipe in this process, with no server: the same body that the Prefect tasks call.

    recipe → graph → for each action in order: fingerprint, HIT? open it : build it (`pesc.build`)

Key contracts
- Failures leave finished actions as they are and the failing one's workspace for the next attempt.
- A benchmark (or the routing of an arm) that fails leaves a hole: the others are still run, the report is built without it and says so,
  and the run ends with the sentence of every failure. Running again builds what is missing.
- Benchmarks of one arm are independent: `execution.parallel_benchmarks` of them are built at once, each in a process of its own.
- What can be known to fail is told before anything is built.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from itertools import groupby

from pesc.build import Job, Outcome, ProgressCallback, build_or_open, make_job
from pesc.errors import CancelledError, HolesError, PescError, RecipeError, StoreBusyError, StoreError
from pesc.pipeline import Node, build_graph
from pesc.plan import Plan, PlannedAction, Selection, make_plan, reason_to_run
from pesc.recipe import Recipe
from pesc.store import ArtifactRef, Store
from pesc.store.manifest import RUN_OBJECTS

logger = logging.getLogger(__name__)


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

    `on_action(node, reason)` is called before an action is built, `on_outcome` after each action, `on_hole` when one failed that the run can do without.
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
    from pesc.launch.side_by_side import run_jobs  # seldom needed, and `pesc plan` should not wait for it

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
    """The benchmarks and routings of one run that failed while the rest went on."""

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
        benchmarks = sum(address.startswith("evaluate[") for address in self.errors)
        if count == 1 and report is None:
            raise next(iter(self.errors.values()))
        shown = ""
        if report is not None:
            page = store.open(report.ref) / "report.html"
            shown = f"; the report {page} shows {'it as a hole' if count == 1 else 'them as holes'}"
            if not benchmarks:
                shown = f"; the report {page} is made without {'it' if count == 1 else 'them'}"
        lines = [f"{address}: {error}" for address, error in self.errors.items()]
        raise HolesError(
            f"{count} {'benchmark' if benchmarks == count else 'action'}{'' if count == 1 else 's'} of {recipe.name} ended without a result{shown}. "
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
            self._store.record_run(f"{self._recipe}/{RUN_OBJECTS}", self._name, {address: o.ref.digest for address, o in outcomes.items()})
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
    `step.finish` (or `step.fail`) before it asks for the next. A HIT that the store's remote lacks comes with a
    job as well: it is shared. With `hits_as_jobs` HITs come with a job too, for callers that show them.
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
    holes = graph.select(selection.without) if selection.without else set()
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
            if job.refresh:
                store.forget(node.stage.name, job.fingerprint)
            manifest = None if job.refresh else store.find(node.stage.name, job.fingerprint)
            hit = manifest.ref if manifest else None
            is_done = manifest is not None and not store.owes(manifest)
            reason = reasons[node.address] if hit else reason_to_run(recipe, store, node, job.key, job.refresh)
            reason = f"without {', '.join(missing)}; {reason}" if missing else reason
            reason = f"{reason}; to be pushed" if hit and not is_done else reason
            steps.append(Step(node, reason, None if is_done and not hits_as_jobs else job, hit, refs, node.address in graph.may_fail))
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
    return optional.issuperset(missing) and any(address.startswith("evaluate[") for address in optional.difference(missing))


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
