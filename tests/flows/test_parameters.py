"""Typed parameters: what the UI's form offers, and what the server refuses."""

import json

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prefect.utilities.callables import parameter_schema
from pydantic import ValidationError

from flows import stages
from flows.parameters import ExecutionSettings, RecipeSettings, StageDeployments, as_overrides, chosen_deployments, stage_settings
from flows.pipeline import pipeline
from pesc.pipeline import STAGE_NAMES
from pesc.recipe import load_recipe, recipe_names


def test_a_field_that_does_not_exist_is_refused_at_every_depth():
    for wrong in ({"trane": {}}, {"train": {"learning_ratee": 1}}, {"train": {"lora": {"r": 8}}}, {"sources": {"x": {"url": "y"}}}):
        with pytest.raises(ValidationError, match="Extra inputs"):
            RecipeSettings.model_validate(wrong)


def test_bounds_and_choices_are_those_of_the_recipe():
    for wrong in ({"learning_rate": 0}, {"optimizer": "sgd"}, {"lora": {"rank": 0}}):
        with pytest.raises(ValidationError):
            stage_settings("train").__args__[0].model_validate(wrong)


def test_every_field_of_the_form_has_its_name_in_a_recipe_and_a_sentence():
    schema = RecipeSettings.model_json_schema()
    fields = {(name, field): spec for name, model in schema["$defs"].items() for field, spec in model.get("properties", {}).items()}
    assert len(fields) > 120
    assert [name for name, spec in fields.items() if not spec.get("description", "").endswith((".", "!", "?", ")"))] == []
    assert {name[1]: spec["title"] for name, spec in fields.items()} == {name[1]: name[1] for name in fields}
    assert fields["TrainSettings", "max_grad_norm"]["description"].endswith("Where a recipe says nothing: 0.3.")
    assert schema["properties"]["train"]["description"].startswith("One training run.")
    assert "what is left out stays as it is" in schema["description"]
    for flow in (pipeline, *(getattr(stages, name) for name in STAGE_NAMES)):
        top = parameter_schema(flow.fn).model_dump()["properties"]
        assert all(spec.get("description") for spec in top.values()), flow.name


@pytest.mark.parametrize(
    "wrong",
    [
        {"overrides": ["sources.rows.uri=https://ada:pw@host/x"]}, {"overrides": ["description=hf_abcdefghijklmnopqrstuvw"]},
        {"settings": {"sources": {"rows": {"uri": "https://ada:pw@host/x"}}}}, {"settings": {"name": "hf_abcdefghijklmnopqrstuvw"}},
        {"recipe": "https://ada:pw@host/x.yaml"}, {"overrides": ["x=ghp_abcdefghijklmnopqrstuvw"]},
        {"settings": {"dedup": {"datasets": {"rows": {"files": ["https://ada:pw@host/x"]}}}}},
    ],
)  # fmt: skip
def test_the_server_refuses_a_secret_before_it_stores_it(wrong):
    schema = parameter_schema(pipeline.fn).model_dump()
    with pytest.raises(jsonschema.ValidationError, match="should not be valid"):
        jsonschema.validate(wrong, schema)
    fine = {
        "overrides": ["sources.rows.uri=abfs://box@host/x"],
        "settings": {"sources": {"rows": {"uri": "s3://b/x"}}, "name": None, "train": {"seed": 1}},
    }
    jsonschema.validate(fine, schema)


@pytest.mark.parametrize("field", ["only", "start", "until", "refresh"])
def test_the_server_refuses_an_address_that_no_recipe_can_have(field):
    schema = parameter_schema(pipeline.fn).model_dump()
    for wrong in ("evalute", "evaluate[pesc", "evaluate pesc", "train[pesc] merge[pesc]", ""):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({field: [wrong]}, schema)
    for fine in ("evaluate", "evaluate[pesc]", "evaluate[pesc/mmlu]", "download[base]", " train[qlora-s1] "):
        jsonschema.validate({field: [fine]}, schema)
    jsonschema.validate({"without": ["evaluate[pesc/mmlu]"]}, parameter_schema(stages.report.fn).model_dump())
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"without": ["evalute[pesc/mmlu]"]}, parameter_schema(stages.report.fn).model_dump())


def test_here_the_recipe_says_what_is_wrong_with_an_address():
    assert pipeline.validate_parameters({"only": ["evalute"]})["only"] == ["evalute"], "its sentence has a suggestion"


@pytest.mark.parametrize("name", recipe_names())
def test_every_complete_recipe_is_a_valid_parameter_and_changes_nothing(name):
    recipe = load_recipe(name)
    complete = RecipeSettings.model_validate(recipe.model_dump(mode="json", exclude_unset=True))
    assert load_recipe(name, as_overrides(complete)) == recipe


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(rate=st.floats(min_value=1e-12, max_value=1e3), rank=st.integers(min_value=1, max_value=10**6), text=st.text())
def test_values_survive_the_way_through_an_override(recipe_file, rate, rank, text):
    given_settings = {"train": {"learning_rate": rate, "lora": {"rank": rank}}, "report": {"title": text}}
    recipe = load_recipe(recipe_file, as_overrides(RecipeSettings.model_validate(given_settings)))
    assert (recipe.train.learning_rate, recipe.train.lora.rank, recipe.report.title) == (rate, rank, text)
    assert recipe.train.lora.alpha == load_recipe(recipe_file).train.lora.alpha


def test_nothing_given_changes_nothing():
    assert as_overrides(None) == as_overrides(None, "train") == as_overrides(RecipeSettings()) == as_overrides({}, "sources") == []
    assert as_overrides(ExecutionSettings(num_processes=2), "execution") == ["execution={num_processes: 2}"]


@pytest.mark.parametrize("flow", [pipeline, *(getattr(stages, name) for name in STAGE_NAMES)], ids=lambda flow: flow.name)
def test_the_form_describes_every_parameter_and_is_closed(flow):
    schema = parameter_schema(flow).model_dump()
    assert all(item.get("description") for item in schema["properties"].values())
    assert schema["required"] == []
    models = [item for item in schema["definitions"].values() if item.get("type") == "object"]
    assert models
    assert all(item["additionalProperties"] is False for item in models)
    document = {**json.loads(json.dumps(schema)), "additionalProperties": False}
    jsonschema.validate({"recipe": "demo"}, document)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"settings": {"no_such_setting": {"x": 1}}, "recipe": "demo", "nor_this": 1}, document)


def test_deployments_are_chosen_by_stage_and_a_wrong_stage_is_refused():
    chosen = chosen_deployments(StageDeployments(train="h100", mix="elsewhere/big"))
    assert chosen["train"] == "train/h100"
    assert chosen["mix"] == "elsewhere/big"
    assert {name: chosen[name] for name in ("evaluate", "report")} == {"evaluate": "evaluate/gpu", "report": "report/cpu"}
    assert chosen_deployments(None).keys() == set(STAGE_NAMES)
    with pytest.raises(ValidationError, match="Extra inputs"):
        StageDeployments.model_validate({"trane": "h100"})
