"""A server with a password: everything that talks to it does so with PREFECT_API_AUTH_STRING, which nobody stores."""

from __future__ import annotations

import subprocess
import sys

import pytest
import yaml

from pesc.store import Store
from tests.deployments.servers import PREFECT, ROOT, PrefectServer, wait_for
from tests.fake_stages import tiny_recipe_dict

pytestmark = pytest.mark.slow
PASSWORD = "correct-horse-battery"


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    """The server, with everything deployed, and a worker; `folder`, `recipe` and `store` lie beside it."""
    folder = tmp_path_factory.mktemp("guarded")
    with PrefectServer(folder / "server", auth=f"admin:{PASSWORD}") as server:
        server.environment["PESC_STORE"] = str(folder / "store")
        recipe = folder / "tiny.yaml"
        recipe.write_text(yaml.safe_dump(tiny_recipe_dict(folder / "sources")))
        for pool in ("cpu", "gpu"):
            server.post("work_pools/", {"name": pool, "type": "process"})
        server.prefect("--no-prompt", "deploy", "--all", "--prefect-file", "deployments/prefect.yaml")
        server.start(*PREFECT, "worker", "start", "--pool", "cpu", cwd=folder)
        wait_for(lambda: server.post("work_pools/cpu/workers/filter", {}), 120, "the worker")
        yield server, folder


def test_a_deployed_run_with_its_tasks_logs_and_artifacts(guarded):
    server, folder = guarded
    deployment = server.get("deployments/name/download/cpu")["id"]
    parameters = {"recipe": str(folder / "tiny.yaml"), "instance": "rows"}
    run = server.post(f"deployments/{deployment}/create_flow_run", {"parameters": parameters, "state": {"type": "SCHEDULED"}})["id"]
    state = server.wait_for_state(run, "COMPLETED", "FAILED", "CRASHED")
    assert state["state_type"] == "COMPLETED", state["state"]
    assert [manifest.prefect_run for manifest in Store(folder / "store").manifests("download")] == [run]
    mine = {"flow_run_id": {"any_": [run]}}
    keys = {artifact["key"] for artifact in server.post("artifacts/filter", {"artifacts": mine})}
    assert {"plan-tiny", "run-tiny", "download-rows-tiny"} <= keys
    wait_for(lambda: any("built in" in line["message"] for line in server.post("logs/filter", {"logs": mine})), 30, "the log")
    tasks = server.post("task_runs/filter", {"flow_runs": {"id": {"any_": [run]}}})
    assert [task["state_type"] for task in tasks] == ["COMPLETED"]


@pytest.mark.parametrize(("given", "code"), [(f"admin:{PASSWORD}", 0), ("admin:another-word", 1), (None, 1)])
def test_the_command_with_and_without_the_password(guarded, tmp_path, given, code):
    server, folder = guarded
    environment = {**server.environment, "PREFECT_API_AUTH_STRING": given or ""}
    command = [sys.executable, "-m", "flows.pipeline", str(folder / "tiny.yaml"), "--only", "download", "--store", str(tmp_path / "store")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == code, done.stderr
    if code:
        assert done.stderr.count("\n") == 1, "one sentence"
        assert "Set PREFECT_API_AUTH_STRING to USER:PASSWORD" in done.stderr
        assert "Traceback" not in done.stderr
    assert PASSWORD not in done.stdout + done.stderr


def test_the_password_is_nowhere_at_the_server_or_in_the_store(guarded):
    """Runs last: whatever the module has done is searched."""
    server, folder = guarded
    texts = {path: path.read_bytes() for root in (folder, server.folder) for path in root.rglob("*") if path.is_file()}
    assert len(texts) > 10
    assert [str(path) for path, data in texts.items() if PASSWORD.encode() in data] == []
