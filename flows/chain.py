"""Run the actions of a recipe as tasks of the flow that calls this."""

from __future__ import annotations

from pathlib import Path

from prefect import get_run_logger
from prefect.runtime import flow_run

from pesc.data.card import DATA_STAGES
from pesc.errors import PescError, RecipeError
from pesc.pipeline import build_graph
from pesc.plan import Plan, Selection, make_plan
from pesc.recipe import Recipe
from pesc.run import Holes, Job, Outcome, RunRecord, resolve
from pesc.settings import store_root
from pesc.store import Store
from tasks.execution import library_records, run_job
from tasks.reporting import publish_card, publish_history, publish_plan, publish_report, publish_summary
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
    for step in resolve(plan.recipe, store, selection, hits_as_jobs=True):
        assert step.job is not None  # hits_as_jobs
        job = _once_a_run(store, step.job)
        if job.refresh or store.find(job.key.stage, job.fingerprint) is None:
            record.write(outcomes)
            log.info("RUN %s: %s", job.address, step.reason)
        try:
            outcome = step.finish(run_job(TASKS[step.node.stage.name], job, store))
        except PescError as error:
            holes.take(step, error)
            log.error("%s failed, the run goes on without it: %s", job.address, error)
            continue
        outcomes[outcome.address] = outcome
        if outcome.how == "hit":
            log.info("%s cached, object %s", outcome.address, outcome.ref.digest[:8])
        if outcome.address in data[-1:] and any(outcomes[address].how == "built" for address in data):
            publish_card(store, plan.recipe)  # now, and not at the end: training may take days


def _once_a_run(store: Store, job: Job) -> Job:
    """A refresh that this flow run has done already is not done again: Prefect's Retry starts the whole flow under the same id."""
    manifest = store.find(job.key.stage, job.fingerprint) if job.refresh else None
    done = manifest is not None and manifest.prefect_run is not None and manifest.prefect_run == flow_run.get_id()
    return job.model_copy(update={"refresh": False}) if done else job
