"""What orchestration costs: nothing that a user waits for, beside stages of minutes and days."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from pesc.launch.supervise import child_environment
from pesc.recipe import load_recipe
from pesc.run import run_recipe
from pesc.store import Store
from tests.flows.real_recipe import write_recipe

pytestmark = [pytest.mark.benchmark, pytest.mark.timeout(900)]
ROOT = Path(__file__).resolve().parents[2]
CACHED_SECONDS, SERVER_SECONDS, STAGE_SECONDS = 3.0, 20.0, 0.5


def show(title: str, rows: list[tuple[str, float, float | None]]) -> None:
    print(f"\n{title}\n| | s | bar |\n| :-- | --: | --: |")
    for name, seconds, bar in rows:
        print(f"| {name} | {seconds:.2f} | {f'{bar:g}' if bar else '–'} |")


def timed(*command: str, **environment: str) -> float:
    """Seconds of a program that must end well."""
    started = time.monotonic()
    variables = {**{k: v for k, v in child_environment().items() if not k.startswith("PREFECT_")}, **environment}
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return time.monotonic() - started


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A recipe of ten stages (15 actions), and a store that has every result."""
    folder = tmp_path_factory.mktemp("finished")
    recipe, store = str(write_recipe(folder / "sources")), Store(folder / "store")
    run_recipe(load_recipe(recipe), store)
    return recipe, str(store.root), folder


def test_a_pipeline_that_is_finished_costs_seconds(finished):
    recipe, store, folder = finished
    alone = min(timed("pesc.cli", "run", recipe, "--store", store) for _ in range(3))
    home = str(folder / "home")
    first = timed("flows.pipeline", recipe, "--store", store, PREFECT_HOME=home)
    again = timed("flows.pipeline", recipe, "--store", store, PREFECT_HOME=home)
    show(
        "15 actions of ten stages, all cached",
        [
            ("pesc run", alone, CACHED_SECONDS),
            ("with a temporary Prefect server, on a new PREFECT_HOME", first, SERVER_SECONDS),
            ("with a temporary Prefect server", again, SERVER_SECONDS),
        ],
    )
    assert alone <= CACHED_SECONDS
    assert max(first, again) <= SERVER_SECONDS


def test_an_action_costs_half_a_second_of_prefect_on_a_running_server(prefect_server, fakes, tmp_path, recipe_file):
    from flows.pipeline import pipeline

    bare, store = Store(tmp_path / "bare"), Store(tmp_path / "store")
    pipeline(recipe=recipe_file, store=str(tmp_path / "warm"), until=["mix"])  # imports, connections
    started = time.monotonic()
    actions = len(run_recipe(load_recipe(recipe_file), bare))
    plain = time.monotonic() - started
    seconds = {}
    for name in ("built", "cached"):
        started = time.monotonic()
        outcomes = pipeline(recipe=recipe_file, store=str(store.root))
        seconds[name] = time.monotonic() - started
        assert {outcome.how for outcome in outcomes.values()} == {"built" if name == "built" else "hit"}
    each = {name: (total - (plain if name == "built" else 0)) / actions for name, total in seconds.items()}
    show(
        f"Prefect's share of an action, {actions} actions in one flow run, its artifacts included",
        [("an action that is built", each["built"], STAGE_SECONDS), ("an action that is cached", each["cached"], STAGE_SECONDS)],
    )
    print(f"the whole run: {seconds['built']:.1f} s built, {seconds['cached']:.1f} s cached; without Prefect {plain:.2f} s")
    assert max(each.values()) <= STAGE_SECONDS
