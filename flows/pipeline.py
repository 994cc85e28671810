"""The whole pipeline as a flow: a dense model and data sets in, a benchmarked sparse model out.

python -m flows.pipeline demo                            with Prefect's temporary server, or the one at PREFECT_API_URL
python -m flows.pipeline demo train.learning_rate=1e-4   with an override
python -m flows.pipeline demo --refresh evaluate         benchmarks again
prefect deployment run pipeline/cpu --param recipe=demo  on a worker
"""

from __future__ import annotations

from prefect import flow

from flows.chain import open_store, run_chain, run_name
from flows.hooks import HOOKS
from flows.parameters import RecipeSettings, as_overrides
from pesc.build import Outcome
from pesc.plan import Selection
from pesc.recipe import load_recipe


@flow(name="pipeline", flow_run_name=run_name, persist_result=False, **HOOKS)
def pipeline(
    recipe: str = "demo",
    settings: RecipeSettings | None = None,  # type: ignore[valid-type]
    overrides: list[str] | None = None,
    only: list[str] | None = None,
    start: list[str] | None = None,
    until: list[str] | None = None,
    refresh: list[str] | None = None,
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
        store: Directory of the store. Default: PESC_STORE of the worker, else ./store.
    """
    loaded = load_recipe(recipe, [*as_overrides(settings), *(overrides or ())])
    selection = Selection(tuple(only or ()), tuple(start or ()), tuple(until or ()), tuple(refresh or ()))
    return run_chain(loaded, open_store(store), selection)


if __name__ == "__main__":
    from flows.console import main

    main()
