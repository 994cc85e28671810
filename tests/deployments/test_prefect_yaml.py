"""prefect.yaml: every entry point imports, every parameter exists, every stage can be deployed."""

from importlib import import_module
from pathlib import Path

import jsonschema
import pytest
import yaml
from prefect import Flow
from prefect.utilities.callables import parameter_schema

from flows.stages import deployment_name
from pesc.pipeline import STAGE_NAMES

PATH = Path(__file__).resolve().parents[2] / "deployments" / "prefect.yaml"
DOCUMENT = yaml.safe_load(PATH.read_text())
DEPLOYMENTS = {f"{d['entrypoint'].rpartition('.')[2]}/{d['name']}": d for d in DOCUMENT["deployments"]}


def flow_of(deployment):
    module, _, name = deployment["entrypoint"].rpartition(".")
    return getattr(import_module(module), name)


def test_every_stage_the_pipeline_and_the_care_of_the_store_are_deployed():
    stages = {f"{stage}/cpu" for stage in STAGE_NAMES} | {deployment_name(stage) for stage in STAGE_NAMES}
    pipelines = {f"pipeline/{name}" for name in ("cpu", "gpu", "dispatched", "nightly", "weekly")}
    assert set(DEPLOYMENTS) == stages | pipelines | {"gc/cpu", "fsck/cpu", "push/cpu"}
    assert all(deployment["description"] and deployment["tags"][0] == "pesc" for deployment in DEPLOYMENTS.values())


def test_a_parent_that_dispatches_waits_in_a_queue_of_its_own_and_holds_no_gpu():
    places = {name: (d["work_pool"]["name"], d["work_pool"]["work_queue_name"]) for name, d in DEPLOYMENTS.items()}
    dispatching = {name for name, d in DEPLOYMENTS.items() if d["parameters"].get("dispatch")}
    assert (
        dispatching
        == {name for name, place in places.items() if place == ("cpu", "orchestrate")}
        == {"pipeline/dispatched", "pipeline/weekly"}
    )


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_the_entry_point_is_the_flow_and_takes_the_parameters(name):
    deployment = DEPLOYMENTS[name]
    flow = flow_of(deployment)
    assert isinstance(flow, Flow)
    assert name == f"{flow.name}/{deployment['name']}"
    schema = {**parameter_schema(flow).model_dump(), "additionalProperties": False}
    jsonschema.validate(deployment["parameters"], schema)
    flow.validate_parameters(deployment["parameters"])


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_the_pool_is_named_like_the_deployment(name):
    pool, own = DEPLOYMENTS[name]["work_pool"]["name"], DEPLOYMENTS[name]["name"]
    assert pool == (own if own in ("cpu", "gpu") else "cpu")
    assert "PESC_STORE" in DEPLOYMENTS[name]["work_pool"]["job_variables"]["env"]


def test_recipes_of_deployments_exist():
    from pesc.recipe import recipe_names

    used = {d["parameters"]["recipe"] for d in DEPLOYMENTS.values() if "recipe" in d["parameters"]}
    assert used <= set(recipe_names())


def test_schedules_are_off_have_a_slug_and_do_not_run_twice_at_a_time():
    scheduled = {name: d for name, d in DEPLOYMENTS.items() if "schedules" in d}
    assert set(scheduled) == {"pipeline/nightly", "pipeline/weekly"}
    for deployment in scheduled.values():
        assert all(schedule["slug"] and schedule["active"] is False for schedule in deployment["schedules"])
        assert deployment["concurrency_limit"] == {"limit": 1, "collision_strategy": "CANCEL_NEW"}


def test_no_path_of_this_machine_is_written_down():
    (step,) = DOCUMENT["pull"]
    assert step == {"prefect.deployments.steps.set_working_directory": {"directory": "{{ $PESC_HOME }}"}}
    assert str(PATH.parents[1]) not in PATH.read_text()
