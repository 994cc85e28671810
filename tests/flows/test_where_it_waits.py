"""A dispatched run may not be in the way of the runs that it waits for."""

from types import SimpleNamespace
from uuid import UUID

import pytest
from prefect.exceptions import ObjectNotFound

from flows import dispatch
from flows.parameters import chosen_deployments
from pesc.errors import RecipeError
from pesc.plan import make_plan
from pesc.recipe import load_recipe

RUN = UUID(int=7)


class Api:
    """A server whose deployments go to the pool of their name."""

    def __init__(self, mine, places):
        self.mine, self.places = mine, places

    def read_flow_run(self, run):
        assert run == RUN
        return SimpleNamespace(work_pool_name=self.mine[0], work_queue_name=self.mine[1])

    def read_deployment_by_name(self, name):
        if name.partition("/")[2] not in self.places:
            raise ObjectNotFound(Exception(name))
        pool, queue = self.places[name.partition("/")[2]]
        return SimpleNamespace(work_pool_name=pool, work_queue_name=queue)


@pytest.fixture
def prepare(recipe_file, store, monkeypatch):
    """`prepare` of a dispatched run of a recipe whose store is empty; returns its warnings."""

    def prepare(mine, chosen=None, **places):
        warnings = []
        monkeypatch.setattr(
            dispatch, "get_client", lambda sync_client: Api(mine, {"cpu": ("cpu", "default"), "gpu": ("gpu", "train"), **places})
        )
        monkeypatch.setattr(dispatch, "get_run_logger", lambda: SimpleNamespace(warning=lambda text, *words: warnings.append(text % words)))
        monkeypatch.setattr(dispatch.flow_run, "get_id", lambda: str(RUN))
        monkeypatch.setattr(dispatch.flow_run, "get_run_count", lambda: 1)
        deployments = {**chosen_deployments(None), **(chosen or {})}
        dispatch.Dispatched(recipe_file, [], None, deployments).prepare(make_plan(load_recipe(recipe_file), store))
        return warnings

    return prepare


def test_a_run_that_waits_may_not_hold_a_gpu(prepare, fakes):
    with pytest.raises(RecipeError, match=r"worker of the pool 'gpu' meanwhile, where train/gpu, .*pipeline/dispatched"):
        prepare(("gpu", "default"))
    with pytest.raises(RecipeError, match=r"pool 'h100' meanwhile, where train/h100 is to run"):
        prepare(("h100", "default"), chosen={"train": "train/h100"}, h100=("h100", "default"))


def test_one_that_shares_a_queue_with_its_children_is_warned_and_one_that_does_not_is_not(prepare, fakes):
    (warning,) = prepare(("cpu", "default"))
    assert "share the queue cpu/default" in warning
    assert "pipeline/dispatched" in warning
    assert prepare(("cpu", "orchestrate")) == []
    assert prepare((None, None)) == [], "from a terminal"


def test_small_models_go_through_one_pool(prepare, fakes):
    on_cpu = {stage: f"{stage}/cpu" for stage in ("train", "merge", "evaluate", "routing")}
    assert len(prepare(("cpu", "default"), chosen=on_cpu)) == 1
