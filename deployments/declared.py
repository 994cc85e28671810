"""The deployments of prefect.yaml as things of the server: the deployment itself, and each of its schedules.

They are what `prefect deploy --all` makes, and three things more: what is as it should be is not written again, the server refuses
parameters that a flow does not have (Prefect leaves that to the worker), and a schedule stays on or off as its user set it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from datetime import timedelta
from importlib import import_module
from typing import Any, ClassVar

import yaml
from prefect import Flow
from prefect.client.schemas.schedules import CronSchedule, IntervalSchedule, RRuleSchedule
from prefect.exceptions import ParameterTypeError, SignatureMismatchError
from prefect.utilities.callables import parameter_schema
from pydantic_core import to_jsonable_python

from deployments.fleet import HERE, BootstrapError, Fleet, merged, places, refuse_secrets
from deployments.server import Difference, Json, Server, Thing, differences
from pesc import __version__
from pesc.errors import RemoteError
from pesc.store.places import open_place

PREFECT_FILE = HERE / "prefect.yaml"
_PLACEHOLDER = re.compile(r"{{\s*\$(\w+)\s*}}")
_OPTIONAL = {"PESC_REMOTE"}
_ENTRY = {"name", "entrypoint", "description", "tags", "parameters", "work_pool", "schedules", "concurrency_limit"}
"""What an entry may say; bootstrap would not see anything else."""


def declared_things(fleet: Fleet) -> list[Thing]:
    """Every deployment of prefect.yaml, with the fleet's changes, each followed by its schedules.  Raises BootstrapError."""
    document = yaml.safe_load(PREFECT_FILE.read_text())
    entries = {_name_of(entry): entry for entry in document["deployments"]}
    things: list[Thing] = []
    for name in [*entries, *(name for name in fleet.deployments if name not in entries)]:
        changed = merged(*_below_and_above(name, entries, fleet.deployments.get(name, {})))
        pool_name = changed["work_pool"]["name"]
        if pool_name not in fleet.pools:
            raise BootstrapError(
                f"The deployment {name} goes to the pool {pool_name}, which the fleet does not have: {', '.join(fleet.pools)}."
            )
        pool = fleet.pools[pool_name]
        environment = {**os.environ, **places(pool_name, pool), **pool.env}
        _check_remote(environment.get("PESC_REMOTE"), pool_name)
        filled, pull_steps = _filled(changed, environment, name), _filled(document["pull"], environment, name)
        refuse_secrets(filled, f"The deployment {name}: ")
        entry_things = _entry_things(name, filled, pull_steps)
        if changed["work_pool"]["work_queue_name"] not in fleet.pools[pool_name].queues:
            queue = f"{pool_name}/{changed['work_pool']['work_queue_name']}"
            raise BootstrapError(f"The deployment {name} goes to the queue {queue}, which the fleet does not have.")
        things += entry_things
    return things


def _below_and_above(name: str, entries: Mapping[str, Mapping[str, Any]], above: Mapping[str, Any]) -> tuple[Json, Json]:
    """The entry of a deployment, or of the one that a new one is to be like, and the fleet's changes.  Raises BootstrapError."""
    above, like = dict(above), above.get("like")
    above.pop("like", None)
    if name in entries:
        if like is not None:
            raise BootstrapError(
                f"deployments.{name}.like: prefect.yaml has {name} itself. Leave `like` out, or give the new one another name."
            )
        return dict(entries[name]), above
    if like is None:
        raise BootstrapError(
            f"The fleet changes {name}, which prefect.yaml does not have. It has {', '.join(sorted(entries))}. A new deployment says which of "
            f"them it is like: {name}: {{like: train/gpu, work_pool: {{name: POOL, work_queue_name: QUEUE}}}}."
        )
    flow, _, own = name.partition("/")
    if like not in entries or like.partition("/")[0] != flow or not own:
        of_flow = [known for known in entries if known.partition("/")[0] == flow]
        raise BootstrapError(
            f"deployments.{name}.like is {like!r}, and has to be a deployment of the same flow: {', '.join(of_flow) or f'there is none of {flow!r}'}."
        )
    return {**{key: value for key, value in entries[like].items() if key != "schedules"}, "name": own}, above


def _check_remote(url: str | None, pool: str) -> None:
    """Raises BootstrapError for a remote that no run could open, or with a password in it: runs get it from their deployment."""
    try:
        if url:
            open_place(url)
    except RemoteError as error:
        raise BootstrapError(f"PESC_REMOTE of the pool {pool}: {error}") from None


def _name_of(entry: Mapping[str, Any]) -> str:
    return f"{entry['entrypoint'].rpartition('.')[2]}/{entry['name']}"


def _filled(template: Any, environment: Mapping[str, str], name: str) -> Any:
    """The template with `{{ $NAME }}` replaced.  Raises BootstrapError for one that is not set and has to be."""
    if isinstance(template, Mapping):
        return {key: _filled(value, environment, name) for key, value in template.items() if not _is_left_out(value, environment)}
    if isinstance(template, list):
        return [_filled(value, environment, name) for value in template]
    if not isinstance(template, str):
        return template
    for variable in _PLACEHOLDER.findall(template):
        if variable not in environment:
            raise BootstrapError(f"The deployment {name} needs the environment variable {variable}, which is not set.")
    return _PLACEHOLDER.sub(lambda match: environment[match[1]], template)


def _is_left_out(value: Any, environment: Mapping[str, str]) -> bool:
    """A variable that need not be set and is not: the worker's own counts."""
    found = _PLACEHOLDER.fullmatch(value) if isinstance(value, str) else None
    return found is not None and found[1] in _OPTIONAL and not environment.get(found[1])


def _entry_things(name: str, entry: Mapping[str, Any], pull_steps: list[Json]) -> list[Thing]:
    if unknown := sorted(set(entry) - _ENTRY):
        raise BootstrapError(f"The deployment {name} says {', '.join(unknown)}; it may say {', '.join(sorted(_ENTRY))}.")
    flow = flow_of(entry["entrypoint"])
    limit = entry.get("concurrency_limit")
    policy = {key: value for key, value in limit.items() if key != "limit"} if isinstance(limit, Mapping) else None
    wanted = {
        "description": entry["description"],
        "version": __version__,
        "tags": entry["tags"],
        "entrypoint": entry["entrypoint"],
        "parameters": entry.get("parameters") or {},
        "parameter_openapi_schema": closed_schema(flow),
        "enforce_parameter_schema": True,
        "pull_steps": pull_steps,
        "work_pool_name": entry["work_pool"]["name"],
        "work_queue_name": entry["work_pool"]["work_queue_name"],
        "job_variables": entry["work_pool"].get("job_variables") or {},
        "concurrency_limit": limit["limit"] if isinstance(limit, Mapping) else limit,
        "concurrency_options": policy,
    }
    try:
        flow.validate_parameters(wanted["parameters"])
    except (ParameterTypeError, SignatureMismatchError) as error:
        raise BootstrapError(f"The parameters of the deployment {name} are not the flow's: {error}") from None
    deployment = Deployment(name, to_jsonable_python(wanted))
    return [
        deployment,
        *(Schedule(f"{name}:{given['slug']}", _schedule_fields(given), given["active"]) for given in entry.get("schedules", ())),
    ]


def flow_of(entrypoint: str) -> Flow[..., Any]:
    """The flow at MODULE.NAME."""
    module, _, name = entrypoint.rpartition(".")
    return getattr(import_module(module), name)


def closed_schema(flow: Flow[..., Any]) -> Json:
    """The schema of a flow's parameters, in which there are no others."""
    return {**to_jsonable_python(parameter_schema(flow).model_dump(exclude_unset=True)), "additionalProperties": False}


class Deployment(Thing):
    """A deployment, named FLOW/NAME.  Whether it is paused belongs to the user."""

    kind: ClassVar[str] = "deployment"

    def read(self, server: Server) -> Json | None:
        """The deployment, its limit beside its other fields."""
        found = server.get(f"deployments/name/{self.name}")
        if found is None:
            return None
        limit = found.get("global_concurrency_limit")
        return {
            **found,
            "concurrency_limit": limit["limit"] if limit else None,
            "concurrency_options": _given(found["concurrency_options"]),
        }

    def make(self, server: Server) -> None:
        """Make it without schedules, and its flow if the server does not know it."""
        flow_name, _, name = self.name.partition("/")
        flow = server.post("flows/", {"name": flow_name})
        server.post("deployments/", {"name": name, "flow_id": flow["id"], "paused": False, "schedules": [], **self.wanted})

    def change(self, server: Server, fields: Json) -> None:
        """Change the fields alone; its schedules stay."""
        found = server.get(f"deployments/name/{self.name}")
        if "work_queue_name" in fields or "work_pool_name" in fields:
            fields = {**fields, **{name: self.wanted[name] for name in ("work_pool_name", "work_queue_name")}}
        server.patch(f"deployments/{found['id']}", fields)


def _given(options: Json | None) -> Json | None:
    """Without what the server fills in."""
    return {name: value for name, value in options.items() if value is not None} if options else None


def _schedule_fields(given: Mapping[str, Any]) -> Json:
    zone = given.get("timezone", "UTC")
    if "cron" in given:
        schedule: Any = CronSchedule(cron=given["cron"], timezone=zone)
    elif "interval" in given:
        schedule = IntervalSchedule(interval=timedelta(seconds=given["interval"]), timezone=zone)
    else:
        schedule = RRuleSchedule(rrule=given["rrule"], timezone=zone)
    told = to_jsonable_python(schedule)
    if "interval" in given:
        told.pop("anchor_date", None)  # the server's: when it was made
    return {"schedule": told, "parameters": given.get("parameters") or {}}


class Schedule(Thing):
    """A schedule, named FLOW/NAME:SLUG.  Whether it is active is decided when it is made, and belongs to the user from then on."""

    kind: ClassVar[str] = "schedule"

    def __init__(self, name: str, wanted: Json, active: bool) -> None:
        super().__init__(name, wanted)
        self.active = active
        self.deployment, _, self.slug = name.rpartition(":")

    def read(self, server: Server) -> Json | None:
        """The schedule with this slug; None also when there is no such deployment."""
        return self._found(server)[1]

    def make(self, server: Server) -> None:
        """Make it."""
        deployment, _ = self._found(server)
        server.post(f"deployments/{deployment}/schedules", [{"active": self.active, "slug": self.slug, **self.wanted}])

    def change(self, server: Server, fields: Json) -> None:
        """Change when it fires or with what."""
        deployment, found = self._found(server)
        assert found is not None
        if "schedule" in fields:
            fields = {**fields, "schedule": _same_kind(found["schedule"], fields["schedule"])}
        server.patch(f"deployments/{deployment}/schedules/{found['id']}", fields)

    def compare(self, found: Json) -> list[Difference]:
        """Of the schedule itself only what is told."""
        told = {**found, "schedule": {name: value for name, value in found["schedule"].items() if name in self.wanted["schedule"]}}
        return [fault for name in self.wanted for fault in differences(told.get(name), self.wanted[name], name)]

    def _found(self, server: Server) -> tuple[str, Json | None]:
        deployment = server.get(f"deployments/name/{self.deployment}")
        if deployment is None:
            return "", None
        return deployment["id"], next((item for item in deployment["schedules"] if item["slug"] == self.slug), None)


def _same_kind(found: Json, wanted: Json) -> Json:
    """What the server has already filled in is kept when the kind of schedule stays."""
    kind = {"cron", "interval", "rrule"}
    return {**found, **wanted} if kind & set(found) == kind & set(wanted) else wanted
