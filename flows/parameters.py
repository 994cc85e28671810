"""Typed parameters of the flows: the settings of a recipe with every field optional.

A deployment's form in the Prefect UI, and the server's check of `prefect deployment run`, come from these models: names, types,
bounds, choices and descriptions are those of `pesc`, and a field that does not exist is refused before anything starts.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from types import GenericAlias, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, create_model
from pydantic.fields import FieldInfo

from pesc.pipeline import STAGE_NAMES, stage_named
from pesc.recipe import Recipe
from pesc.redaction import SECRET_PATTERN
from pesc.stage import Execution

NO_SECRET: dict[str, Any] = {"not": {"type": "string", "pattern": SECRET_PATTERN}}
"""For the server, which keeps a run's parameters: it refuses a URL with a password and a token before it has stored them."""
Text = Annotated[str, Field(json_schema_extra=NO_SECRET)]
"""Any text but a secret."""
Override = Text
"""KEY=VALUE."""
Address = Annotated[str, Field(json_schema_extra={**NO_SECRET, "pattern": rf"^\s*({'|'.join(STAGE_NAMES)})(\[[^\[\]]+\])?\s*$"})]
"""STAGE, STAGE[ARM] or evaluate[ARM/BENCHMARK].  The server refuses another one when a run is asked for; elsewhere the run says what there is."""


@cache
def optional_settings(model: type[BaseModel], name: str | None = None) -> type[BaseModel]:
    """The model with every field optional, at every depth.  Checks across fields are left to the complete recipe."""
    fields: dict[str, Any] = {}
    for field_name, field in model.model_fields.items():
        kind: Any = _optional_type(field.annotation)
        if field.metadata:
            kind = Annotated[(kind, *field.metadata)]
        words = {"title": field_name, "description": _description(field), "json_schema_extra": NO_SECRET}  # titled as in a recipe
        fields[field_name] = (kind | None, Field(None, **words))
    name = name or model.__name__.removesuffix("Config") + "Settings"
    return create_model(
        name, __config__=ConfigDict(extra="forbid", frozen=True), __module__=__name__, __doc__=_first_line(model), **fields
    )  # fmt: skip


def _description(field: FieldInfo) -> str:
    """What the form says under a field's name, with the value that it has where a recipe says nothing."""
    kind = field.annotation
    text = (field.description or (_first_line(kind) if isinstance(kind, type) and issubclass(kind, BaseModel) else "")).strip()
    text = text if text.endswith((".", "!", "?")) or not text else f"{text}."
    default = field.default
    if isinstance(default, bool | int | float) or (isinstance(default, str) and default):
        text = f"{text} Where a recipe says nothing: {_flow_yaml(default)}.".strip()
    return text


def _first_line(model: type[BaseModel]) -> str:
    return (model.__doc__ or "").strip().partition("\n")[0]


def _optional_type(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return optional_settings(annotation)
    if annotation is str:  # the field's own says so too; this is for items of lists and maps
        return Text
    origin = get_origin(annotation)
    if origin is dict:
        key, value = get_args(annotation)
        return dict[key, _optional_type(value)]
    if origin in (list, tuple, set, frozenset):
        return GenericAlias(origin, tuple(kind if kind is ... else _optional_type(kind) for kind in get_args(annotation)))
    if origin in (Union, UnionType):
        return Union[tuple(_optional_type(kind) for kind in get_args(annotation))]  # noqa: UP007  (made at run time)
    return annotation


def as_overrides(settings: BaseModel | Mapping[str, BaseModel] | None, block: str = "") -> list[str]:
    """The given settings as overrides (`train={learning_rate: 0.0001}`), for the recipe's block or for the whole recipe.

    What is None is left as the recipe has it; to set a value to null, write the override out.
    """
    given = {name: _given(item) for name, item in settings.items()} if isinstance(settings, Mapping) else _given(settings)
    if block:
        given = {block: given} if given else {}
    return [f"{name}={_flow_yaml(value)}" for name, value in given.items()]


def _flow_yaml(value: Any) -> str:
    """One line of YAML (JSON's escapes are not all YAML's)."""
    return yaml.safe_dump(value, default_flow_style=True, width=float("inf")).removesuffix("...\n").strip()


def _given(settings: BaseModel | None) -> dict[str, Any]:
    return settings.model_dump(mode="json", exclude_unset=True, exclude_none=True) if settings else {}


RecipeSettings = optional_settings(Recipe, "RecipeSettings")
RecipeSettings.__doc__ = "Settings of the recipe to change; what is left out stays as it is."
"""Every setting of a recipe."""
ExecutionSettings = optional_settings(Execution, "ExecutionSettings")
"""Where and how fast; never part of a result's name."""


def deployment_name(stage: str) -> str:
    """`train/gpu`: a stage's flow on the pool that it wants."""
    return f"{stage}/{'gpu' if stage_named(stage).wants_gpu else 'cpu'}"


def _deployment_field(stage: str) -> Any:
    text = f"What builds `{stage}`: a deployment of that flow (h100) or of another (FLOW/NAME). Default: {deployment_name(stage)}."
    return (str | None, Field(None, description=text))


StageDeployments: Any = create_model(
    "StageDeployments",
    __config__=ConfigDict(extra="forbid", frozen=True),
    __module__=__name__,
    __doc__="Which deployment builds a stage.",
    **{name: _deployment_field(name) for name in STAGE_NAMES},
)
"""A field a stage."""


def chosen_deployments(given: BaseModel | None) -> dict[str, str]:
    """Full names (`train/h100`) of the deployments of all stages, by stage."""
    chosen = given.model_dump(exclude_none=True) if given else {}
    names = {stage: chosen.get(stage) or deployment_name(stage) for stage in STAGE_NAMES}
    return {stage: name if "/" in name else f"{stage}/{name}" for stage, name in names.items()}


def block_of(stage: str) -> str:
    """The recipe's block that holds a stage's settings."""
    return {"download": "sources"}.get(stage, stage)


def stage_settings(stage: str) -> Any:
    """The type of a stage's settings as a flow parameter: its block of the recipe (for `download`, a map of sources)."""
    return RecipeSettings.model_fields[block_of(stage)].annotation


assert all(block_of(stage) in Recipe.model_fields for stage in STAGE_NAMES)
