"""A Prefect server with everything deployed, and workers: the fleet on which the dispatched pipeline is tested.

fleet = Fleet(server, folder)           # pools, queues and the deployments of deployments/prefect.yaml, with `tests.flows.deployed`
fleet.worker("cpu"); fleet.worker("gpu", limit=1)
run = fleet.submit("pipeline/cpu", recipe=..., dispatch=True)
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from pesc.store import Store
from tests.deployments.servers import PREFECT, ROOT, PrefectServer, wait_for
from tests.fake_stages import tiny_recipe_dict
from tests.flows.builders import file_name

ENDED = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")


class Fleet:
    """Server, store, recipe and workers of one test module."""

    def __init__(self, server: PrefectServer, folder: Path, entrypoints: str = "tests.flows.deployed") -> None:
        self.server, self.folder, self.trace, self.store = server, folder, folder / "trace", Store(folder / "store")
        self.trace.mkdir(parents=True)
        server.environment |= {"PESC_STORE": str(self.store.root), "PESC_TEST_TRACE": str(self.trace), "PESC_HOME": str(ROOT)}
        self.recipe = self.write_recipe("tiny")
        for pool in ("cpu", "gpu", "empty"):
            server.post("work_pools/", {"name": pool, "type": "process"})
        self._deploy(entrypoints)

    @classmethod
    def bootstrapped(cls, server: PrefectServer, folder: Path, environments: Mapping[str, Mapping[str, str]]) -> Fleet:
        """Everything as `deployments.bootstrap` makes it, real flows, a worker for each pool; `environments` of the pools."""
        fleet = cls.__new__(cls)
        fleet.server, fleet.folder = server, folder
        path = folder / "fleet.yaml"
        path.write_text(yaml.safe_dump({"pools": {pool: {"env": dict(variables)} for pool, variables in environments.items()}}))
        server.environment |= {"PESC_STORE": str(folder / "store"), "PESC_HOME": str(ROOT), "PESC_FLEET": str(path)}
        server.run(sys.executable, "-m", "deployments.bootstrap")
        for pool, variables in environments.items():
            fleet.worker(pool, **variables)
        return fleet

    def write_recipe(self, name: str, **changes: Any) -> str:
        """Path of a tiny recipe."""
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump({**tiny_recipe_dict(self.folder / "sources"), "name": name, **changes}))
        return str(path)

    def _deploy(self, entrypoints: str) -> None:
        document = yaml.safe_load((ROOT / "deployments" / "prefect.yaml").read_text())
        chosen = [d for d in document["deployments"] if d["entrypoint"].startswith(("flows.stages.", "flows.pipeline."))]
        for deployment in chosen:
            if entrypoints != "flows":
                deployment["entrypoint"] = f"{entrypoints}.{deployment['entrypoint'].rpartition('.')[2]}"
            deployment.pop("schedules", None)
        stages = "flows.stages" if entrypoints == "flows" else entrypoints
        chosen.append({"name": "nobody", "entrypoint": f"{stages}.mix", "work_pool": {"name": "empty"}})
        chosen.append({"name": "empty", "entrypoint": f"{stages}.tokenize", "work_pool": {"name": "empty"}})
        path = self.folder / "prefect.yaml"
        path.write_text(yaml.safe_dump({**document, "deployments": chosen}))
        self.server.prefect("--no-prompt", "deploy", "--all", "--prefect-file", str(path))

    def worker(self, pool: str, limit: int | None = None, **environment: str) -> subprocess.Popen[bytes]:
        """Start a worker, and wait until the server knows it."""
        before = self._workers(pool)
        words = ["--limit", str(limit)] if limit else []
        worker = self.server.start(*PREFECT, "worker", "start", "--pool", pool, *words, cwd=self.folder, extra=environment)
        wait_for(lambda: self._workers(pool) > before, 120, f"a worker of {pool}")
        return worker

    def _workers(self, pool: str) -> int:
        return len(self.server.post(f"work_pools/{pool}/workers/filter", {}))

    def prepare(self, until: str | None = None, store: Store | None = None, recipe: str | None = None) -> None:
        """Build in the store what is not under test, without a server."""
        words = [recipe or self.recipe, str((store or self.store).root), *([until] if until else [])]
        self.server.run(sys.executable, "-m", "tests.flows.deployed", *words)
        self.clear()

    def submit(self, deployment: str, tags: Sequence[str] = (), **parameters: Any) -> str:
        """Ask for a flow run; its id."""
        found = self.server.get(f"deployments/name/{deployment}")
        wish = {"parameters": parameters, "tags": list(tags), "state": {"type": "SCHEDULED"}}
        return self.server.post(f"deployments/{found['id']}/create_flow_run", wish)["id"]

    def end(self, flow_run: str, seconds: float = 300) -> dict[str, Any]:
        """The flow run, once it has ended."""
        return self.server.wait_for_state(flow_run, *ENDED, seconds=seconds)

    def cancel(self, flow_run: str) -> None:
        """What the UI's button does."""
        self.server.post(f"flow_runs/{flow_run}/set_state", {"state": {"type": "CANCELLING", "name": "Cancelling"}})

    def children(self, flow_run: str) -> list[dict[str, Any]]:
        """Flow runs that a flow run has started, in the order in which they were."""
        found = self.server.post("flow_runs/filter", {"flow_runs": {"parent_flow_run_id": {"any_": [flow_run]}}, "sort": "START_TIME_ASC"})
        return sorted(found, key=lambda run: run["created"])

    def tasks(self, flow_run: str) -> dict[str, str]:
        """State name of each action's task run by address; the stand-ins of children are left out."""
        runs = self.server.post("task_runs/filter", {"flow_runs": {"id": {"any_": [flow_run]}}})
        return {run["name"].split()[0]: run["state_name"] for run in runs if " by " not in run["name"]}

    def logs(self, flow_run: str) -> list[str]:
        """The messages of a flow run's log."""
        return [r["message"] for r in self.server.post("logs/filter", {"logs": {"flow_run_id": {"any_": [flow_run]}}, "limit": 200})]

    def automate_zombies(self, seconds: int) -> None:
        """Mark runs as Crashed whose heartbeat is not heard for so long."""
        beat, ends = "prefect.flow-run.heartbeat", ("Completed", "Failed", "Cancelled", "Crashed")
        trigger = {
            "type": "event", "posture": "Proactive", "after": [beat], "expect": [beat, *(f"prefect.flow-run.{end}" for end in ends)],
            "match": {"prefect.resource.id": ["prefect.flow-run.*"]}, "for_each": ["prefect.resource.id"], "threshold": 1, "within": seconds,
        }  # fmt: skip
        action = {"type": "change-flow-run-state", "state": "CRASHED", "message": f"No sign of life for {seconds} s."}
        self.server.post("automations/", {"name": "zombies", "trigger": trigger, "actions": [action]})

    def versions(self, key: str) -> list[dict[str, Any]]:
        """Every version of an artifact."""
        return self.server.post("artifacts/filter", {"artifacts": {"key": {"any_": [key]}}})

    def ask_for(self, address: str, what: str, text: str = "") -> None:
        """Leave a wish for `tests.flows.deployed`."""
        (self.trace / f"{file_name(address)}.{what}").write_text(text)

    def clear(self) -> None:
        """Forget every wish and trace."""
        for path in self.trace.iterdir():
            path.unlink()

    def flow_pid(self, address: str) -> int:
        """The flow process of an action that has been begun."""

        def started() -> int:
            paths = sorted(self.trace.glob(f"{file_name(address)}.*.started"))
            return int(paths[-1].read_text() or 0) if paths else 0

        return wait_for(started, 90, f"the beginning of {address}")

    def pids(self, address: str, store: Store | None = None) -> list[int]:
        """The flow process of an endless action, its launcher and its rank, once all run."""
        flow = self.flow_pid(address)

        def started() -> list[int] | None:
            found = list((store or self.store).root.glob("work/*/*/*.pid"))
            texts = [path.read_text() for path in found]
            return [flow, *map(int, texts)] if len(texts) == 2 and all(texts) else None

        return wait_for(started, 60, f"the processes of {address}")

    def built(self) -> list[str]:
        """File names of the actions that have been begun, one a time."""
        return sorted(path.name.rsplit(".", 2)[0] for path in self.trace.glob("*.started"))


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def kill(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to a worker alone; what it has started stays."""
    process.send_signal(signal.SIGKILL)
    process.wait()
