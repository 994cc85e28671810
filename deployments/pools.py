"""Work pools and their queues, global limits and variables: what the fleet says, as things of the server."""

from __future__ import annotations

import json
from typing import ClassVar

from deployments.fleet import HERE, BootstrapError, Fleet, Pool, host_store, places
from deployments.server import Json, Server, Thing
from pesc import __version__

TEMPLATES = HERE / "work_pools"


def fleet_things(fleet: Fleet) -> list[Thing]:
    """Limits, variables, pools and queues, in the order in which they can be made."""
    things: list[Thing] = [Limit(name, {"limit": limit}) for name, limit in fleet.limits.items()]
    things += [Variable(name, {"value": value}) for name, value in fleet.variables.items()]
    for name, pool in fleet.pools.items():
        things.append(WorkPool(name, _pool_fields(name, pool, fleet)))
        for queue_name, queue in sorted(pool.queues.items(), key=lambda item: item[1].priority):
            things.append(WorkQueue(f"{name}/{queue_name}", queue.model_dump()))
    return things


def _pool_fields(name: str, pool: Pool, fleet: Fleet) -> Json:
    prefect_type = "process" if pool.type == "slurm" else pool.type
    return {
        "type": prefect_type,
        "description": pool.description,
        "concurrency_limit": pool.concurrency_limit,
        "base_job_template": base_job_template(name, pool, fleet.heartbeat_seconds),
    }


def base_job_template(name: str, pool: Pool, heartbeat_seconds: int) -> Json:
    """work_pools/TYPE.json with the pool's own defaults.  Raises BootstrapError for a variable that the template does not have."""
    template = json.loads((TEMPLATES / f"{pool.type}.json").read_text())
    properties = template["variables"]["properties"]
    environment = {**places(name, pool), "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(heartbeat_seconds), **pool.env}
    defaults = {"env": environment, **_gpu_defaults(name, pool), **_place_defaults(name, pool), **pool.variables}
    for variable, value in defaults.items():
        if variable not in properties:
            raise BootstrapError(
                f"pools.{name}.variables has {variable}, which {pool.type} pools do not have. They have {', '.join(sorted(properties))}."
            )
        properties[variable]["default"] = value
    return template


def _gpu_defaults(name: str, pool: Pool) -> Json:
    """How a type of pool is asked for `gpus`; in a process pool nobody has to ask."""
    if not pool.gpus or pool.type == "process":
        return {}
    if pool.type == "docker":
        return {"device_requests": [{"driver": "nvidia", "count": pool.gpus, "capabilities": [["gpu"]]}]}
    if pool.gpus < 0:
        raise BootstrapError(f"The {pool.type} pool {name} wants a number of GPUs: gpus: -1 (all) is for docker.")
    if pool.type == "slurm":
        return {"gpus": str(pool.gpus)}
    return {"gpus": pool.gpus, "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]}


def _place_defaults(name: str, pool: Pool) -> Json:
    inside = places(name, pool)
    image = f"pesc:{__version__}-{'gpu' if pool.gpus else 'cpu'}"
    if pool.type == "docker":
        volumes = {} if "volumes" in pool.variables else {"volumes": [f"{host_store(name)}:{inside['PESC_STORE']}"]}
        return {"image": image, **volumes}
    if pool.type == "kubernetes":
        return {"image": image, "store_mount": inside["PESC_STORE"]}
    return {"working_dir": inside["PESC_HOME"]} if pool.type == "slurm" else {}


class WorkPool(Thing):
    """A work pool.  Whether it is paused belongs to the user; its type cannot be changed."""

    kind: ClassVar[str] = "work pool"

    def read(self, server: Server) -> Json | None:
        """The pool."""
        return server.get(f"work_pools/{self.name}")

    def make(self, server: Server) -> None:
        """Make it, with Prefect's `default` queue."""
        server.post("work_pools/", {"name": self.name, **self.wanted})

    def change(self, server: Server, fields: Json) -> None:
        """Change all but the type."""
        if "type" in fields:
            raise BootstrapError(
                f"The work pool {self.name} exists with another type than {fields['type']}, and Prefect cannot change that. "
                f"Delete it (prefect work-pool delete {self.name}; its deployments are then deployed again), or keep its type (--type)."
            )
        server.patch(f"work_pools/{self.name}", fields)


class WorkQueue(Thing):
    """A queue of a pool, named POOL/QUEUE.  Whether it is paused belongs to the user."""

    kind: ClassVar[str] = "work queue"

    @property
    def _place(self) -> tuple[str, str]:
        pool, _, queue = self.name.partition("/")
        return f"work_pools/{pool}/queues", queue

    def read(self, server: Server) -> Json | None:
        """The queue; None also when there is no such pool."""
        folder, queue = self._place
        return server.get(f"{folder}/{queue}")

    def make(self, server: Server) -> None:
        """Make it; Prefect gives the queues behind it the next numbers."""
        folder, queue = self._place
        server.post(folder, {"name": queue, **self.wanted})

    def change(self, server: Server, fields: Json) -> None:
        """Change limit, priority, description."""
        folder, queue = self._place
        server.patch(f"{folder}/{queue}", fields)


class Limit(Thing):
    """A global concurrency limit.  Whether it is active belongs to the user."""

    kind: ClassVar[str] = "concurrency limit"

    def read(self, server: Server) -> Json | None:
        """The limit."""
        return server.get(f"v2/concurrency_limits/{self.name}")

    def make(self, server: Server) -> None:
        """Make it, active."""
        server.post("v2/concurrency_limits/", {"name": self.name, "active": True, **self.wanted})

    def change(self, server: Server, fields: Json) -> None:
        """Change the number."""
        server.patch(f"v2/concurrency_limits/{self.name}", fields)


class Variable(Thing):
    """A Prefect variable."""

    kind: ClassVar[str] = "variable"

    def read(self, server: Server) -> Json | None:
        """The variable."""
        return server.get(f"variables/name/{self.name}")

    def make(self, server: Server) -> None:
        """Make it."""
        server.post("variables/", {"name": self.name, "tags": ["pesc"], **self.wanted})

    def change(self, server: Server, fields: Json) -> None:
        """Change the value."""
        server.patch(f"variables/name/{self.name}", fields)
