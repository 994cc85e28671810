"""Run the actions of a recipe as tasks of the flow that calls this.

plan → may it be carried out? → for each action in order: its task (Cached, built here, or built by a flow run elsewhere) → views
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing
from pathlib import Path

from prefect import get_run_logger
from prefect.context import FlowRunContext
from prefect.runtime import flow_run

from flows.naming import run_digest
from pesc.build import Job, Outcome
from pesc.data.card import DATA_STAGES
from pesc.errors import PescError, RecipeError
from pesc.pipeline import build_graph
from pesc.plan import Selection, make_plan
from pesc.recipe import Recipe
from pesc.run import Holes, RunRecord, Step, resolve
from pesc.settings import store_root
from pesc.store import Store
from tasks.execution import run_job, run_jobs_at_once
from tasks.patience import impatient
from tasks.reporting import (
    publish_card,
    publish_cost,
    publish_fit,
    publish_history,
    publish_lineage,
    publish_plan,
    publish_report,
    publish_summary,
)
from tasks.runner import Inline, Runner
from tasks.table import TASKS

CHILD_TAG = "dispatched"
"""Of the flow runs that a dispatched pipeline has started."""


def open_store(path: str | None) -> Store:
    """The store of a flow run: the parameter, else PESC_STORE, else ./store; absolute, as workers need it.

    Raises RecipeError for a placeholder that deploying has left in place.
    """
    root = Path(path) if path else store_root()
    if "{{" in str(root):
        raise RecipeError(
            "PESC_STORE was not set when this deployment was made. Set PESC_HOME and PESC_STORE and run "
            "`python -m deployments.bootstrap` again, or give store=DIR."
        )
    return Store(root)


def run_name() -> str:
    """Name of the flow run that is being made: its stage if it has one, its instance, its recipe, a digest; a child keeps what its parent called it."""
    if is_child():
        return flow_run.get_name() or ""
    given = flow_run.get_parameters()
    name = flow_run.get_flow_name() or ""
    address = "" if name == "pipeline" else f"{name}[{given['instance']}] " if given.get("instance") else f"{name} "
    return f"{address}{Path(given['recipe']).stem} {run_digest(name, given)}".rstrip()


def is_child() -> bool:
    """Whether a dispatched pipeline has started this flow run; then that one shows and records what concerns the whole recipe."""
    context = FlowRunContext.get()
    return context is not None and context.flow_run is not None and CHILD_TAG in context.flow_run.tags


def run_chain(recipe: Recipe, store: Store, selection: Selection, runner: Runner = Inline()) -> dict[str, Outcome]:
    """Run what the selection allows; returns the outcome by address.  `runner`: who builds, this machine or other flow runs.

    To be called within `library_records`, which a flow enters before it asks the store anything.
    Raises the PescError of the action that failed; HolesError, after everything else was done and shown, when benchmarks failed.
    Which actions were used is recorded in the store also when a later one fails.
    """
    return _Chain(recipe, store, selection, runner).run()


class _Chain:
    """One run of a recipe."""

    def __init__(self, recipe: Recipe, store: Store, selection: Selection, runner: Runner) -> None:
        self.recipe, self.store, self.selection, self.runner = recipe, store, selection, runner
        self.plan = make_plan(recipe, store, selection)
        self.outcomes: dict[str, Outcome] = {}
        self.holes = Holes()
        self.record = None if is_child() else RunRecord(store, recipe)
        self.log = get_run_logger()

    def run(self) -> dict[str, Outcome]:
        """All of it."""
        self._show_plan()
        self.runner.prepare(self.plan)
        try:
            for steps in resolve(self.recipe, self.store, self.selection, hits_as_jobs=True):
                self._do(steps)
                self._show_data(steps)
        finally:
            self._write_record()
        self._show_results()
        self.holes.end(self.recipe, self.store, self.outcomes)
        return self.outcomes

    def _do(self, steps: Sequence[Step]) -> None:
        with closing(self._results(steps)) as results:
            for step, result in results:
                if isinstance(result, PescError):
                    self.holes.take(step, result)
                    self.log.error("%s failed, the run goes on without it: %s", step.node.address, result)
                    continue
                self.outcomes[result.address] = step.finish(result)
                self._write_record()
                if result.how == "hit":
                    self.log.info("%s cached, object %s", result.address, result.ref.digest[:8])
        for step in steps:  # in the recipe's order, whichever was first
            if step.node.address in self.outcomes:
                self.outcomes[step.node.address] = self.outcomes.pop(step.node.address)

    def _results(self, steps: Sequence[Step]) -> Generator[tuple[Step, Outcome | PescError], None, None]:
        """Each step with what became of it: benchmarks at the same time as far as the recipe allows, else one after another."""
        jobs = [(step, self._once(step.job)) for step in steps if step.job]
        fresh = [job for _, job in jobs if job.refresh or self.store.find(job.key.stage, job.fingerprint) is None]
        slots = min(self.recipe.execution.parallel_benchmarks, len(fresh))
        if slots > 1:
            by_address = {step.node.address: step for step in steps}
            for job in fresh:
                self.log.info("RUN %s: %s", job.address, by_address[job.address].reason)
            calls = [(TASKS[step.node.stage.name], job) for step, job in jobs]
            yield from ((by_address[job.address], result) for job, result in run_jobs_at_once(calls, slots, self.store, self.runner))
            return
        for step, job in jobs:
            if job in fresh:
                self.log.info("RUN %s: %s", job.address, step.reason)
            try:
                result: Outcome | PescError = run_job(TASKS[step.node.stage.name], job, self.store, self.runner)
            except PescError as error:
                result = error
            yield step, result

    def _once(self, job: Job) -> Job:
        """A refresh that this flow run has done already is not done again: Prefect's Retry starts the whole flow under the same id."""
        manifest = self.store.find(job.key.stage, job.fingerprint) if job.refresh else None
        return job.model_copy(update={"refresh": False}) if manifest is not None and self.runner.made(manifest) else job

    def _write_record(self) -> None:
        if self.record:
            self.record.write(self.outcomes)

    def _show_plan(self) -> None:
        counts = ", ".join(f"{n} {status}" for status, n in self.plan.counts.items() if n)
        self.log.info("%s in %s: %s.", self.recipe.name, self.store.root, counts)
        if self.record:
            with impatient():
                publish_plan(self.plan, build_graph(self.recipe))

    def _show_data(self, steps: Sequence[Step]) -> None:
        """Data card and needs of the training, when the last stage of the data is there: now, and not at the end, for training may take days."""
        data = [action.address for action in self.plan if action.address in DATA_STAGES]
        if not self.record or steps[-1].node.address not in data[-1:]:
            return
        training = [action.address for action in self.plan if action.node.stage.name == "train" and action.status == "RUN"]
        with impatient():
            if any(self.outcomes[address].how == "built" for address in data):
                publish_card(self.store, self.recipe)
            if training:
                publish_fit(self.store, self.recipe, training)

    def _show_results(self) -> None:
        if not self.record:
            return
        publish_summary(self.recipe.name, self.outcomes)
        publish_cost(self.store, self.recipe.name, self.outcomes)
        publish_lineage(self.store, self.recipe.name, self.outcomes)
        if "report" in self.outcomes:
            publish_report(self.store, self.recipe.name, self.outcomes)
        if any(outcome.ref.stage == "evaluate" for outcome in self.outcomes.values()):
            publish_history(self.store, self.recipe.name, self.outcomes)
