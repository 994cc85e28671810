"""The whole pipeline as a flow: a dense model and data sets in, a benchmarked sparse model out.

python -m flows.pipeline demo                            with Prefect's temporary server, or the one at PREFECT_API_URL
python -m flows.pipeline demo train.learning_rate=1e-4   with an override
python -m flows.pipeline demo --refresh evaluate         benchmarks again
prefect deployment run pipeline/cpu --param recipe=demo  on a worker
prefect deployment run pipeline/dispatched               each action on a worker of its own
"""

from __future__ import annotations

from prefect import flow

from flows.chain import open_store, run_chain, run_name
from flows.dispatch import Dispatched
from flows.hooks import HOOKS
from flows.parameters import Address, Override, RecipeSettings, StageDeployments, Text, as_overrides, chosen_deployments
from pesc.build import Outcome
from pesc.plan import Selection
from pesc.recipe import load_recipe
from tasks.execution import library_records
from tasks.runner import Inline


@flow(name="pipeline", flow_run_name=run_name, persist_result=False, **HOOKS)
def pipeline(
    recipe: Text = "demo",
    settings: RecipeSettings | None = None,  # type: ignore[valid-type]
    overrides: list[Override] | None = None,
    only: list[Address] | None = None,
    start: list[Address] | None = None,
    until: list[Address] | None = None,
    refresh: list[Address] | None = None,
    dispatch: bool = False,
    deployments: StageDeployments | None = None,  # type: ignore[valid-type]
    store: str | None = None,
) -> dict[str, Outcome]:
    """Run a recipe. Whatever the store has already is shown as Cached.

    Args:
        recipe: A shipped recipe's name, or the path of a YAML file on the worker.
        settings: Settings to change, typed; the rest stays as the recipe has it.
        overrides: Settings to change as KEY=VALUE, e.g. train.learning_rate=1e-4; applied after `settings`.
        only: Build these alone. Stages or addresses: train, train[pesc], evaluate[pesc/mmlu].
        start: Build these and what depends on them (--from).
        until: Build these and what they need.
        refresh: Build these again even when the store has them.
        dispatch: Have each action that the store lacks built by a run of its stage's deployment, on the worker that it wants. Default: build here.
        deployments: With dispatch: other deployments than STAGE/gpu and STAGE/cpu for some stages.
        store: Directory of the store. Default: PESC_STORE of the worker, else ./store.
    """
    changes = [*as_overrides(settings), *(overrides or ())]
    selection = Selection(tuple(only or ()), tuple(start or ()), tuple(until or ()), tuple(refresh or ()))
    runner = Dispatched(recipe, changes, store, chosen_deployments(deployments)) if dispatch else Inline()
    with library_records():
        return run_chain(load_recipe(recipe, changes), open_store(store), selection, runner)


if __name__ == "__main__":
    from flows.console import main

    main()
