"""The fleet: which work pools there are, of which type, with which queues and limits.  fleet.yaml, and a file of the user's over it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pesc.errors import PescError
from pesc.redaction import find_secret, find_secret_variable

HERE = Path(__file__).resolve().parent
PoolType = Literal["process", "docker", "kubernetes", "slurm"]
IMAGE_HOME, IMAGE_STORE = "/opt/pesc", "/store"
"""Where our image has the checkout, and where its store is mounted (deployments/docker/Dockerfile)."""


class BootstrapError(PescError):
    """A fleet that cannot be used, a place that is not told, or a server that does not do what it is asked."""


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Queue(_Settings):
    """A work queue of a pool."""

    priority: int = Field(ge=1, description="1 is served first; no two queues of a pool have the same.")
    concurrency_limit: int | None = Field(None, ge=0, description="Runs at the same time; null for no limit.")
    description: str = ""


class Pool(_Settings):
    """A work pool: where runs go that say its name, and how they are started."""

    description: str = ""
    type: PoolType = Field("process", description="How runs are started: on the worker, or as a container, a Job or a Slurm step.")
    concurrency_limit: int | None = Field(None, ge=0, description="Runs at the same time in the whole pool; null for no limit.")
    gpus: int = Field(0, ge=-1, description="GPUs of a run where it asks for them (docker, kubernetes, slurm); -1: all (docker).")
    home: str | None = Field(None, description="The checkout where runs are. Default: PESC_HOME; /opt/pesc in our image.")
    store: str | None = Field(None, description="The store where runs are. Default: PESC_STORE; /store in our image.")
    env: dict[str, str] = Field(
        default_factory=dict, description="Environment of every run. No secrets: everybody who can see the UI sees it."
    )
    variables: dict[str, Any] = Field(
        default_factory=dict, description="Other defaults of the job variables in work_pools/TYPE.json, e.g. image."
    )
    queues: dict[str, Queue] = Field(min_length=1, description="Its queues; `default` is what Prefect makes in each pool.")


class Fleet(_Settings):
    """Everything around the deployments."""

    heartbeat_seconds: int = Field(180, ge=30, description="Time between a run's signs of life.")
    pending_seconds: int | None = Field(
        3600,
        ge=60,
        description="Time that a run may take to begin after a worker has taken it: images are pulled and nodes are found in it. "
        "null: for ever, as in pools of the type slurm.",
    )
    pools: dict[str, Pool]
    limits: dict[str, int] = Field(default_factory=dict, description="Global concurrency limits by name.")
    variables: dict[str, Any] = Field(default_factory=dict, description="Prefect variables by name.")
    deployments: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="Changes to entries of prefect.yaml, by FLOW/NAME; new ones with `like: FLOW/NAME`."
    )


def load_fleet(path: Path | None = None, pool_type: PoolType | None = None) -> Fleet:
    """The shipped fleet with the user's file over it, every pool of `pool_type` if that is given.  Raises BootstrapError."""
    document = _read(HERE / "fleet.yaml")
    if path is not None:
        document = merged(document, _read(path))
    try:
        fleet = Fleet.model_validate(document)
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())
        raise BootstrapError(
            f"{path or HERE / 'fleet.yaml'} is not a fleet: {faults}. deployments/fleet.yaml shows the settings."
        ) from None
    refuse_secrets(document, "")
    for name, pool in fleet.pools.items():
        if len({queue.priority for queue in pool.queues.values()}) < len(pool.queues):
            raise BootstrapError(f"Two queues of the pool {name} have the same priority in {path}. Give each a number of its own.")
    if pool_type is None:
        return fleet
    return fleet.model_copy(update={"pools": {name: pool.model_copy(update={"type": pool_type}) for name, pool in fleet.pools.items()}})


def refuse_secrets(document: Any, where: str) -> None:
    """Raises BootstrapError naming the field that holds a token, a key or a password.  What bootstrap makes, everybody sees in the UI."""
    for path, name, value in _texts(document, where, ""):
        if kind := find_secret_variable(name, value) if name.isupper() else find_secret(value):
            raise BootstrapError(
                f"{path} holds {kind}, which everybody who can see the UI would see. Take it out: README (Tokens) says where a run finds it."
            )


def _texts(value: Any, path: str, name: str) -> Iterator[tuple[str, str, str]]:
    """Every text in a document, with the way to it and the name that it has there."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _texts(item, f"{path}.{key}" if path and not path.endswith(" ") else f"{path}{key}", str(key))
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            yield from _texts(item, f"{path}[{number}]", name)
    elif isinstance(value, str):
        yield path, name, value


def _read(path: Path) -> dict[str, Any]:
    try:
        document = yaml.safe_load(path.read_text()) or {}
    except OSError as error:
        raise BootstrapError(f"The fleet {path} cannot be read: {error.strerror}.") from None
    except yaml.YAMLError as error:
        raise BootstrapError(f"The fleet {path} is not YAML: {error}") from None
    if not isinstance(document, dict):
        raise BootstrapError(f"The fleet {path} is not a map of settings; deployments/fleet.yaml shows them.")
    return document


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`below` with `above` over it: maps are merged, everything else is replaced."""
    result = dict(below)
    for name, value in above.items():
        both_are_maps = isinstance(value, Mapping) and isinstance(result.get(name), Mapping)
        result[name] = merged(result[name], value) if both_are_maps else value
    return result


def places(name: str, pool: Pool) -> dict[str, str]:
    """PESC_HOME and PESC_STORE as the pool's runs see them.  Raises BootstrapError for one that nobody has told."""
    in_image = pool.type in ("docker", "kubernetes")
    return {
        "PESC_HOME": pool.home or (IMAGE_HOME if in_image else _place("PESC_HOME", "the checkout", name, "home")),
        "PESC_STORE": pool.store or (IMAGE_STORE if in_image else _place("PESC_STORE", "the store", name, "store")),
    }


def host_store(name: str) -> str:
    """The store on the machine, to be mounted in a container."""
    return _place("PESC_STORE", "the store", name, "variables.volumes")


def _place(variable: str, what: str, pool: str, setting: str) -> str:
    value = os.environ.get(variable, "")
    if not value:
        raise BootstrapError(
            f"{variable} is not set: it is the path of {what} on the workers of the pool {pool}. "
            f"Set it (export {variable}=/a/path), or give pools.{pool}.{setting} in a fleet file."
        )
    if not Path(value).is_absolute():
        raise BootstrapError(f"{variable} is {value!r}, but a worker starts elsewhere: give an absolute path.")
    return value
