"""A real server with its UI, a real worker, the deployments over builders that take seconds, and a browser."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.data.card_recipe import small_recipe
from tests.deployments.servers import PREFECT, ROOT, PrefectServer, wait_for
from tests.ui.browser import PROGRAM, Browser

LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 512,
}  # fmt: skip


class Stage:
    """What the tests play on: server, worker, recipe, and the files that steer the builders."""

    def __init__(self, server: PrefectServer, folder: Path) -> None:
        self.server, self.folder, self.store = server, folder, folder / "store"
        self.scores, self.fail, self.recipe = folder / "scores.json", folder / "fail", folder / "small.yaml"
        server.environment |= {
            "PESC_STORE": str(self.store), "PESC_HOME": str(ROOT), "PESC_TEST_SCORES": str(self.scores), "PESC_TEST_FAIL": str(self.fail),
            "PESC_TEST_STEP_SECONDS": "0",
        }  # fmt: skip
        self.write_recipe()
        server.post("work_pools/", {"name": "cpu", "type": "process"})
        self.deploy("pipeline", "train", "evaluate", "gc", "fsck")

    def write_recipe(self) -> None:
        """Forty rows, three arms, two benchmarks."""
        questions = [
            f"How many moons has planet number {n}, and which is the largest?" if n % 2 else f"Write {n} lines about the sea."
            for n in range(40)
        ]
        arms = {"pesc": {"method": "pesc"}, "qlora": {"method": "qlora"}, "base": {"method": "dense"}}
        recipe = small_recipe(self.folder / "sources", questions, mix={"total": 20, "weights": {"general": 1}}, arms=arms)
        recipe["evaluate"] = {
            "benchmarks": {"quiz": {"task": "arc_easy", "metric": "acc"}, "exam": {"task": "arc_challenge", "metric": "acc"}}
        }
        (self.folder / "sources" / "base" / "config.json").write_text(json.dumps(LLAMA))
        self.recipe.write_text(yaml.safe_dump(recipe))

    def deploy(self, *flows: str) -> None:
        """The flows of `tests.ui.programs`, as deployments/prefect.yaml has the real ones."""
        environment = {
            name: value for name, value in self.server.environment.items() if name.startswith("PESC_TEST_") or name == "PESC_STORE"
        }
        pool = {"name": "cpu", "work_queue_name": "default", "job_variables": {"env": environment}}
        deployments = [
            {
                "name": "cpu", "entrypoint": f"tests.ui.programs.{flow}", "tags": ["pesc"], "work_pool": pool,
                "parameters": {"recipe": str(self.recipe)} if flow not in ("gc", "fsck") else {},
            }
            for flow in flows
        ]  # fmt: skip
        pull = [{"prefect.deployments.steps.set_working_directory": {"directory": str(ROOT)}}]
        path = self.folder / "prefect.yaml"
        path.write_text(yaml.safe_dump({"name": "pesc", "pull": pull, "deployments": deployments}))
        self.server.prefect("--no-prompt", "deploy", "--all", "--prefect-file", str(path))

    def deployment(self, name: str) -> str:
        return self.server.get(f"deployments/name/{name}/cpu")["id"]

    def submit(self, flow: str, variables: dict[str, str] | None = None, **parameters: Any) -> str:
        """Ask for a run; variables: of the worker's environment."""
        body: dict[str, Any] = {"parameters": parameters, "state": {"type": "SCHEDULED"}}
        if variables:
            body["job_variables"] = {"env": {**self.server.environment, **variables}}
        return self.server.post(f"deployments/{self.deployment(flow)}/create_flow_run", body)["id"]

    def end(self, flow_run: str, state: str = "COMPLETED", seconds: float = 240) -> dict[str, Any]:
        """The run, once it has ended, as it should."""
        run = self.server.wait_for_state(flow_run, "COMPLETED", "FAILED", "CRASHED", "CANCELLED", seconds=seconds)
        assert run["state_type"] == state, run["state"]
        return run

    def artifacts(self, flow_run: str) -> dict[str, dict[str, Any]]:
        """A run's artifacts by key."""
        found = self.server.post("artifacts/filter", {"artifacts": {"flow_run_id": {"any_": [flow_run]}}, "limit": 200})
        return {artifact["key"]: artifact for artifact in found}


@pytest.fixture(scope="session")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """The server with its UI, and a worker."""
    folder = tmp_path_factory.mktemp("ui")
    with PrefectServer(folder / "server", ui=True) as server:
        stage = Stage(server, folder)
        server.start(*PREFECT, "worker", "start", "--pool", "cpu", cwd=folder)
        wait_for(lambda: server.post("work_pools/cpu/workers/filter", {}), 120, "the worker")
        yield stage


@pytest.fixture(scope="session")
def first_run(stage: Stage) -> str:
    """A run of everything, with a benchmark at 40."""
    stage.scores.write_text("[40, 40]")
    run = stage.submit("pipeline")
    stage.end(run, seconds=400)
    return run


@pytest.fixture
def browser(stage: Stage, tmp_path: Path) -> Iterator[Browser]:
    """A window; skips where there is no Chromium, or nothing that drives it."""
    if PROGRAM is None:
        pytest.skip("no chromium to look at the UI with: apt-get install chromium")
    pytest.importorskip("playwright.sync_api", reason="playwright drives the browser: pip install playwright")
    pictures = Path(os.environ.get("PESC_TEST_PICTURES") or tmp_path / "pictures")
    with Browser(stage.server.url.removesuffix("/api"), pictures) as window:
        yield window
