"""One flow a stage: rerun it alone, on the worker that it wants.

    prefect deployment run evaluate/gpu --param recipe=demo --param instance=pesc/gsm8k --param refresh=true

What it reads is derived from the recipe and the store. If something is missing the run fails at once and names what to run, unless
`build_missing` is given.
"""

from prefect import Flow

from flows.chain import open_store, run_chain, run_name
from flows.hooks import HOOKS
from flows.parameters import Address, ExecutionSettings, Override, Text, as_overrides, block_of, deployment_name, stage_settings
from pesc.build import Outcome
from pesc.errors import RecipeError
from pesc.pipeline import build_graph, stage_named
from pesc.plan import Selection, make_plan
from pesc.recipe import Recipe, load_recipe
from pesc.store import Store
from tasks.execution import library_records


def stage_flow(name: str) -> Flow[..., dict[str, Outcome]]:
    """The flow of one stage; its `settings` are typed by the stage's block of the recipe."""
    stage, settings_type = stage_named(name), stage_settings(name)

    def run_stage(
        recipe: Text = "demo",
        instance: Text | None = None,
        settings: settings_type = None,  # type: ignore[valid-type]
        execution: ExecutionSettings | None = None,  # type: ignore[valid-type]
        overrides: list[Override] | None = None,
        refresh: bool = False,
        build_missing: bool = False,
        without: list[Address] | None = None,
        store: str | None = None,
    ) -> dict[str, Outcome]:
        changes = [*as_overrides(settings, block_of(name)), *as_overrides(execution, "execution"), *(overrides or ())]
        pattern = f"{name}[{instance}]" if instance else name
        refreshed = (pattern,) if refresh else ()
        with library_records():  # the remote is asked what is there, perhaps with the keys of a Secret block
            loaded, place = load_recipe(recipe, changes), open_store(store)
            if build_missing:
                return run_chain(loaded, place, Selection(until=(pattern,), refresh=refreshed, without=tuple(without or ())))
            selection = Selection(only=(pattern,), refresh=refreshed, without=tuple(without or ()))
            require_inputs(loaded, place, selection)
            return run_chain(loaded, place, selection)

    run_stage.__name__ = run_stage.__qualname__ = name
    run_stage.__doc__ = f"""Run the stage `{name}` of a recipe: {stage.summary}.

    Args:
        recipe: A shipped recipe's name, or the path of a YAML file on the worker.
        instance: Source, arm or arm/benchmark, as in {name}[INSTANCE]. Default: all of the recipe's.
        settings: Settings of this stage to change, typed; the rest stays as the recipe has it.
        execution: Where and how fast; never part of a result's name.
        overrides: Settings of any stage to change as KEY=VALUE; give the ones that the upstream results were made with.
        refresh: Build again even when the store has the result.
        build_missing: Build what this stage needs and the store lacks, instead of failing.
        without: Benchmarks (evaluate[ARM/NAME]) that have no result and that the report does without.
        store: Directory of the store. Default: PESC_STORE of the worker, else ./store.
    """
    return Flow(run_stage, name=name, flow_run_name=run_name, description=stage.summary, persist_result=False, **HOOKS)


def require_inputs(recipe: Recipe, store: Store, selection: Selection) -> None:
    """Raises RecipeError naming the results that are missing and the deployments that make them."""
    chosen = build_graph(recipe).select(selection.only)
    missing = [action.node for action in make_plan(recipe, store, selection) if action.status == "BLOCKED" and action.address not in chosen]
    if missing:
        deployments = dict.fromkeys(deployment_name(node.stage.name) for node in missing)
        raise RecipeError(
            f"{', '.join(selection.only)} of recipe {recipe.name!r} needs {', '.join(node.address for node in missing)}, which the store {store.root} lacks. "
            f"Run the deployments {', '.join(deployments)} first, or give build_missing=true."
        )


download = stage_flow("download")
dedup = stage_flow("dedup")
mix = stage_flow("mix")
tokenize = stage_flow("tokenize")
upcycle = stage_flow("upcycle")
train = stage_flow("train")
merge = stage_flow("merge")
evaluate = stage_flow("evaluate")
routing = stage_flow("routing")
heldout = stage_flow("heldout")
report = stage_flow("report")
