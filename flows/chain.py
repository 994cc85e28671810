"""Run the actions of a recipe as tasks of the flow that calls this."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing
from pathlib import Path

from prefect import get_run_logger
from prefect.runtime import flow_run

from pesc.build import Job, Outcome
from pesc.data.card import DATA_STAGES
from pesc.errors import PescError, RecipeError
from pesc.pipeline import build_graph
from pesc.plan import Plan, Selection, make_plan
from pesc.recipe import Recipe
from pesc.run import Holes, RunRecord, Step, resolve
from pesc.settings import store_root
from pesc.store import Store
from tasks.execution import library_records, run_job, run_jobs_at_once
from tasks.reporting import publish_card, publish_cost, publish_history, publish_plan, publish_report, publish_summary
from tasks.table import TASKS


def open_store(path: str | None) -> Store:
    """The store of a flow run: the parameter, else PESC_STORE, else ./store; absolute, as workers need it.

    Raises RecipeError for a placeholder that deploying has left in place.
    """
    root = Path(path) if path else store_root()
    if "{{" in str(root):
        raise RecipeError(
            "PESC_STORE was not set when this deployment was made. Set PESC_HOME and PESC_STORE and deploy again, or give store=DIR."
        )
    return Store(root)


def run_name() -> str:
    """Name of the flow run that is being made: its stage if it has one, its instance, its recipe."""
    given = flow_run.get_parameters()
    name = flow_run.get_flow_name() or ""
    address = "" if name == "pipeline" else f"{name}[{given['instance']}] " if given.get("instance") else f"{name} "
    return f"{address}{Path(given['recipe']).stem}"


def run_chain(recipe: Recipe, store: Store, selection: Selection) -> dict[str, Outcome]:
    """Run what the selection allows; returns the outcome by address.

    Raises the PescError of the action that failed; HolesError, after everything else was done and shown, when benchmarks failed.
    Which actions were used is recorded in the store also when a later one fails.
    """
    outcomes: dict[str, Outcome] = {}
    with library_records():
        plan = make_plan(recipe, store, selection)
        publish_plan(plan, build_graph(recipe))
        record, holes = RunRecord(store, recipe), Holes()
        try:
            _run_actions(plan, store, selection, outcomes, record, holes)
        finally:
            record.write(outcomes)
        publish_summary(recipe.name, outcomes)
        publish_cost(store, recipe.name, outcomes)
        if "report" in outcomes:
            publish_report(store, recipe.name, outcomes)
        if any(outcome.ref.stage == "evaluate" for outcome in outcomes.values()):
            publish_history(store, recipe.name, outcomes)
        holes.end(recipe, store, outcomes)
    return outcomes


def _run_actions(plan: Plan, store: Store, selection: Selection, outcomes: dict[str, Outcome], record: RunRecord, holes: Holes) -> None:
    log = get_run_logger()
    log.info("%s in %s: %s.", plan.recipe.name, store.root, ", ".join(f"{n} {status}" for status, n in plan.counts.items() if n))
    data = [action.address for action in plan if action.address in DATA_STAGES]
    for steps in resolve(plan.recipe, store, selection, hits_as_jobs=True):
        with closing(_results(plan.recipe, steps, store)) as results:
            for step, result in results:
                if isinstance(result, PescError):
                    holes.take(step, result)
                    log.error("%s failed, the run goes on without it: %s", step.node.address, result)
                    continue
                outcomes[result.address] = step.finish(result)
                record.write(outcomes)
                if result.how == "hit":
                    log.info("%s cached, object %s", result.address, result.ref.digest[:8])
        for step in steps:  # in the recipe's order, whichever was first
            if step.node.address in outcomes:
                outcomes[step.node.address] = outcomes.pop(step.node.address)
        if steps[-1].node.address in data[-1:] and any(outcomes[address].how == "built" for address in data):
            publish_card(store, plan.recipe)  # now, and not at the end: training may take days


def _results(recipe: Recipe, steps: Sequence[Step], store: Store) -> Generator[tuple[Step, Outcome | PescError], None, None]:
    """Each step with what became of it: benchmarks at the same time as far as the recipe allows, else one after another."""
    jobs = [(step, _once_a_run(store, step.job)) for step in steps if step.job]
    fresh = [job for _, job in jobs if job.refresh or store.find(job.key.stage, job.fingerprint) is None]
    slots = min(recipe.execution.parallel_benchmarks, len(fresh))
    if slots > 1:
        by_address = {step.node.address: step for step in steps}
        for job in fresh:
            get_run_logger().info("RUN %s: %s", job.address, by_address[job.address].reason)
        calls = [(TASKS[step.node.stage.name], job) for step, job in jobs]
        yield from ((by_address[job.address], result) for job, result in run_jobs_at_once(calls, slots, store))
        return
    for step, job in jobs:
        if job in fresh:
            get_run_logger().info("RUN %s: %s", job.address, step.reason)
        try:
            result: Outcome | PescError = run_job(TASKS[step.node.stage.name], job, store)
        except PescError as error:
            result = error
        yield step, result


def _once_a_run(store: Store, job: Job) -> Job:
    """A refresh that this flow run has done already is not done again: Prefect's Retry starts the whole flow under the same id."""
    manifest = store.find(job.key.stage, job.fingerprint) if job.refresh else None
    done = manifest is not None and manifest.prefect_run is not None and manifest.prefect_run == flow_run.get_id()
    return job.model_copy(update={"refresh": False}) if done else job
