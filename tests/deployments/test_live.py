"""A real server, a real worker, the real prefect.yaml: deploy, run one stage, cancel, kill.  Nothing is left behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import yaml

from pesc.store import Store
from pesc.store.workspace import is_locked
from tests.fake_stages import tiny_recipe_dict

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
PREFECT = [sys.executable, "-m", "prefect"]


class Live:
    """A server and a worker of the pool `cpu`, with a home, a store and a recipe of their own."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.folder, self.store = folder, Store(folder / "store")
        self.url = f"http://127.0.0.1:{self.port}/api"
        self.recipe = folder / "tiny.yaml"
        self.recipe.write_text(yaml.safe_dump(tiny_recipe_dict(folder / "sources")))
        self.environment = {
            **os.environ, "PREFECT_HOME": str(folder / "home"), "PREFECT_API_URL": self.url, "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PESC_HOME": str(ROOT), "PESC_STORE": str(self.store.root), "PREFECT_WORKER_QUERY_SECONDS": "1", "NO_COLOR": "1", "COLUMNS": "200",
        }  # fmt: skip
        self._started: list[subprocess.Popen[bytes]] = []

    def start(self, *command: str, cwd: Path | None = None) -> subprocess.Popen[bytes]:
        """Start a program in a session of its own; its output goes to a file."""
        log = (self.folder / f"{len(self._started)}.log").open("wb")
        process = subprocess.Popen(
            command, env=self.environment, cwd=cwd or ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        self._started.append(process)
        return process

    def prefect(self, *arguments: str, check: bool = True) -> str:
        """Run `prefect ...` to its end."""
        done = subprocess.run(
            [*PREFECT, *arguments], env=self.environment, cwd=ROOT, capture_output=True, text=True, timeout=180, check=False
        )
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def get(self, path: str) -> dict:
        """Ask the server."""
        with urllib.request.urlopen(f"{self.url}/{path}", timeout=10) as answer:
            return json.loads(answer.read())

    def wait_for_state(self, flow_run: str, *names: str, seconds: float = 90) -> dict:
        """The flow run, once it is in one of the states."""

        def reached() -> dict | None:
            run = self.get(f"flow_runs/{flow_run}")
            return run if run["state_type"] in names else None

        return wait_for(reached, seconds)

    def stop(self) -> None:
        """End every program that was started, and its group."""
        for process in reversed(self._started):
            for number in (signal.SIGTERM, signal.SIGKILL):
                if process.poll() is None:
                    os.killpg(process.pid, number)
                    try:
                        process.wait(10)
                    except subprocess.TimeoutExpired:
                        continue


def wait_for(condition, seconds: float):
    """What the condition returns, once it is true."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if value := condition():
                return value
        except OSError:
            pass
        time.sleep(0.2)
    raise AssertionError("waited in vain")


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def endless_pids(store: Store) -> list[int]:
    """Launcher and rank of the endless stage, once both run."""

    def started() -> list[int] | None:
        found = list(store.root.glob("work/download/*/*.pid"))
        return [int(path.read_text()) for path in found] if len(found) == 2 and all(p.read_text() for p in found) else None

    return wait_for(started, 60)


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    """The server, with everything deployed, and a worker that was started from elsewhere."""
    live = Live(tmp_path_factory.mktemp("live"))
    try:
        live.start(*PREFECT, "server", "start", "--port", str(live.port), "--no-ui")
        wait_for(lambda: live.get("health"), 120)
        live.prefect("work-pool", "create", "cpu", "--type", "process")
        live.prefect("work-pool", "create", "gpu", "--type", "process")
        live.prefect("--no-prompt", "deploy", "--all", "--prefect-file", "deployments/prefect.yaml")
        live.start(*PREFECT, "worker", "start", "--pool", "cpu", cwd=live.folder)
        yield live
    finally:
        live.stop()


def test_a_stage_is_deployed_run_and_cached_on_a_worker(live):
    parameters = ["--param", f"recipe={live.recipe}", "--param", "instance=rows"]
    flow_run = submit(live, "download/cpu", *parameters)
    assert live.wait_for_state(flow_run, "COMPLETED", "FAILED", "CRASHED")["state_type"] == "COMPLETED"
    (manifest,) = live.store.manifests("download")
    assert manifest.prefect_run == flow_run
    assert (live.store.action_path("download", manifest.fingerprint) / "prefect.json").is_file()
    again = submit(live, "download/cpu", *parameters)
    assert live.wait_for_state(again, "COMPLETED", "FAILED", "CRASHED")["state_type"] == "COMPLETED"
    assert [m.prefect_run for m in live.store.manifests("download")] == [flow_run]


def test_a_missing_upstream_fails_with_its_sentence(live):
    flow_run = submit(live, "mix/cpu", "--param", f"recipe={live.recipe}")
    run = live.wait_for_state(flow_run, "COMPLETED", "FAILED", "CRASHED")
    assert run["state_type"] == "FAILED"
    assert "mix of recipe 'tiny' needs dedup, which the store" in run["state"]["message"].replace("download[rows], ", "")


def test_the_server_refuses_a_setting_that_does_not_exist(live):
    said = live.prefect("deployment", "run", "train/gpu", "--param", 'settings={"learning_ratee": 1}', check=False)
    assert "'learning_ratee' was unexpected" in said


def test_deploying_again_updates_the_schedule(live):
    live.prefect("--no-prompt", "deploy", "--all", "--prefect-file", "deployments/prefect.yaml")
    (schedule,) = live.get("deployments/name/pipeline/weekly")["schedules"]
    assert schedule["slug"] == "weekly"
    assert schedule["active"] is False


def test_a_cancelled_run_leaves_no_process_and_no_lock(live):
    store = Store(live.folder / "cancelled")
    live.prefect(
        "--no-prompt", "deploy", "tests/flows/programs.py:endless", "--name", "cpu", "--pool", "cpu", "--prefect-file", pull_file(live)
    )
    flow_run = submit(live, "endless/cpu", "--param", f"recipe={live.recipe}", "--param", f"store={store.root}")
    pids = endless_pids(store)
    live.prefect("flow-run", "cancel", flow_run)
    assert live.wait_for_state(flow_run, "CANCELLED", "CRASHED", "FAILED")["state_type"] == "CANCELLED"
    wait_for(lambda: not any(map(alive, pids)), 30)
    assert not any(is_locked(path) for path in store.root.glob("work/*/*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_flow_process_leaves_no_process_and_no_lock(live, number):
    store = Store(live.folder / f"killed-{number}")
    flow = live.start(sys.executable, "-m", "tests.flows.programs", str(live.recipe), str(store.root))
    pids = endless_pids(store)
    assert all(map(alive, pids))
    flow.send_signal(number)
    assert flow.wait(60) != 0
    wait_for(lambda: not any(map(alive, pids)), 30)
    assert not any(is_locked(path) for path in store.root.glob("work/*/*"))
    assert not list(store.root.glob("actions/*/*/manifest.json"))


def submit(live: Live, deployment: str, *parameters: str) -> str:
    """Ask for a run; returns its id."""
    said = live.prefect("deployment", "run", deployment, *parameters)
    return said.partition("UUID: ")[2].split()[0]


def pull_file(live: Live) -> str:
    """A prefect file with the pull step alone."""
    path = live.folder / "prefect.yaml"
    path.write_text(yaml.safe_dump({"pull": [{"prefect.deployments.steps.set_working_directory": {"directory": str(ROOT)}}]}))
    return str(path)
