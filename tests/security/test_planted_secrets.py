"""Secrets are planted wherever a run could find some; then every byte that it has left behind is searched for them."""

from __future__ import annotations

import json
import os
import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest
from prefect.blocks.system import Secret
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_DATABASE_CONNECTION_URL

from flows.pipeline import pipeline
from pesc import pipeline as table
from pesc.errors import RecipeError
from pesc.recipe import load_recipe
from tests.flows import observe

pytestmark = pytest.mark.usefixtures("prefect_server")
PLANTED = {
    "HF_TOKEN": "hf_PlantedPlantedPlanted1234", "WANDB_API_KEY": "0badc0de0badc0de0badc0de0badc0de0badc0de", "AWS_ACCESS_KEY_ID": "AKIAPLANTEDPLANTED12",
    "AWS_SECRET_ACCESS_KEY": "pl4nted/aws+secret/key", "AWS_SESSION_TOKEN": "pl4nted-session-token", "MLFLOW_TRACKING_PASSWORD": "pl4nted-mlflow",
    "MLFLOW_TRACKING_URI": "https://ada:pl4nted-tracking@mlflow.example.org", "PREFECT_SERVER_API_AUTH_STRING": "admin:pl4nted-auth",
}  # fmt: skip
NEVER = [
    *(value for name, value in PLANTED.items() if "URI" not in name), "pl4nted-tracking", "pl4nted-auth", "hf_NotInTheEnvironment12345",
    "pl4nted-in-a-url", "pl4nted-signature", "pl4nted%2Faws%2Bsecret%2Fkey", "cGw0bnRlZC9hd3Mrc2VjcmV0L2tleQ==",
]  # fmt: skip


@pytest.fixture
def leaky(recipe_file, monkeypatch):
    """The path of a recipe whose `dedup` says all that it knows; `leaky(isolated)` installs it."""
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)

    def install(isolated: bool) -> str:
        stage = replace(table._BY_NAME["dedup"], builder="tests.security.leaks:build", isolated=isolated)
        monkeypatch.setitem(table._BY_NAME, "dedup", stage)
        return recipe_file

    return install


def everything(store: Path, flow_run_id) -> dict[str, str]:
    """Every text that a run has left: the store's files, and what the server has of it."""
    found = {str(path.relative_to(store)): path.read_text(errors="replace") for path in store.rglob("*") if path.is_file()}
    mine = {"flow_runs": {"id": {"any_": [str(flow_run_id)]}}}
    with get_client(sync_client=True) as client:

        def ask(path: str, body: dict) -> str:
            return json.dumps(client.request("POST", path, json=body).json())

        found["flow run"] = json.dumps(client.request("GET", f"/flow_runs/{flow_run_id}").json())
        found["task runs"] = ask("/task_runs/filter", mine)
        found["artifacts"] = ask("/artifacts/filter", {"artifacts": {"flow_run_id": {"any_": [str(flow_run_id)]}}})
        found["logs"] = ask("/logs/filter", {"logs": {"flow_run_id": {"any_": [str(flow_run_id)]}}, "limit": 200})
        found["events"] = ask("/events/filter", {"limit": 50})
    return found


def database() -> bytes:
    """The server's database, with what is still in its journal."""
    path = Path(str(PREFECT_API_DATABASE_CONNECTION_URL.value()).partition(":///")[2])
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA wal_checkpoint(FULL)")
    return b"".join(file.read_bytes() for file in path.parent.glob(f"{path.name}*"))


@pytest.mark.parametrize("isolated", [True, False], ids=["in a process of its own", "in the flow's process"])
@pytest.mark.parametrize("end", ["well", "sentence", "defect", "killed"])
def test_no_planted_secret_is_anywhere_afterwards(leaky, store, monkeypatch, capfd, end, isolated):
    if end == "killed" and not isolated:
        pytest.skip("it would kill the test")
    monkeypatch.setenv("PESC_TEST_END", end)
    monkeypatch.setattr("tasks.reporting.progress.ARTIFACT_SECONDS", 0.0)
    state = pipeline(recipe=leaky(isolated), store=str(store.root), until=["dedup"], return_state=True)
    assert state.is_completed() == (end == "well"), state.message
    run = state.state_details.flow_run_id
    observe.task_states(run, 2)
    observe.logs(run, "to go on" if end != "well" else "Finished in state Completed")
    observe.logs(run, "***")  # lines travel by themselves: the first task's end says nothing of the second's
    found = everything(store.root, run)
    said = capfd.readouterr()
    found |= {"stdout": said.out, "stderr": said.err, "database": database().decode(errors="replace")}
    if not isolated:
        del found["stdout"]  # of the builder's own print, in this process
    assert {(where, secret) for where, text in found.items() for secret in NEVER if secret in text} == set()
    assert "***" in found["logs"], "what was hidden was there to be hidden"
    if isolated or end == "well":
        assert any("***" in text for where, text in found.items() if where.startswith(("actions/", "work/")))
    assert "progress ***" in found["artifacts"]


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"sources": {"rows": {"uri": "https://ada:pl4nted-pw@example.org/rows.jsonl"}}}, "sources.rows.uri holds a URL with a password"),
        ({"description": "hf_PlantedPlantedPlanted1234"}, "description holds an access token"),
        ({"sources": {"rows": {"uri": "https://x/y?sig=pl4nted-sig"}}}, "sources.rows.uri holds a URL with a signature"),
        ({"execution": {"master": "0badc0de0badc0de0badc0de0badc0de0badc0de:1"}}, "execution.master holds the value of WANDB_API_KEY"),
        ({"report": {"replicates": {"pesc": ["ghp_" + "a1" * 18]}}}, "report.replicates.pesc holds an access token"),
        ({"arms": {"hf_PlantedPlantedPlanted1234": {"method": "dense"}}}, "a name in arms holds an access token"),
    ],
)
def test_a_recipe_with_a_secret_is_refused_without_repeating_it(recipe_file, store, monkeypatch, tmp_path, changes, where):
    import yaml

    monkeypatch.setenv("WANDB_API_KEY", PLANTED["WANDB_API_KEY"])
    path = tmp_path / "secret.yaml"
    path.write_text(yaml.safe_dump({"extends": recipe_file, **changes}))
    with pytest.raises(RecipeError, match="Take it out, and give it through the environment") as error:
        load_recipe(str(path))
    assert where in str(error.value)
    state = pipeline(recipe=str(path), store=str(store.root), return_state=True)
    assert where in state.message
    text = database().decode(errors="replace") + "".join(p.read_text(errors="replace") for p in store.root.rglob("*") if p.is_file())
    assert not any(secret in text for secret in ("pl4nted-pw", "PlantedPlanted", "pl4nted-sig", PLANTED["WANDB_API_KEY"], "a1a1a1a1"))


def test_an_override_with_a_secret_is_refused_without_repeating_it(recipe_file):
    for text in (
        "sources.rows.uri=https://ada:pl4nted-pw@example.org/x",
        "description=hf_PlantedPlantedPlanted1234",
        "hf_PlantedPlantedPlanted1234",
    ):
        with pytest.raises(RecipeError) as error:
            load_recipe(recipe_file, [text])
        assert "lanted" not in str(error.value)


def test_secrets_come_from_blocks_where_the_environment_has_none(recipe_file, store, monkeypatch):
    """The stage's process has it; afterwards this one has not, and it is shown nowhere."""
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "of-the-environment-not-of-the-block")
    Secret(value="hf_OfABlockOfABlockOfABlock12").save("hf-token", overwrite=True)
    Secret(value="of-the-block-and-unused").save("wandb-api-key", overwrite=True)
    Secret(value="nobody-asked-for-it").save("another", overwrite=True)
    stage = replace(table._BY_NAME["dedup"], builder="tests.security.test_planted_secrets:build_length", isolated=True)
    monkeypatch.setitem(table._BY_NAME, "dedup", stage)
    try:
        state = pipeline(recipe=recipe_file, store=str(store.root), until=["dedup"], return_state=True)
    finally:
        for name in ("hf-token", "wandb-api-key", "another"):
            Secret.load(name).__class__.delete(name)
    ref = state.result()["dedup"].ref
    metrics = store.manifest("dedup", ref.fingerprint).metrics
    assert metrics == {"hf": "*** of 29", "wandb": "*** of 35", "others": 0}
    assert "HF_TOKEN" not in os.environ
    found = everything(store.root, state.state_details.flow_run_id)
    assert not any(secret in text for text in found.values() for secret in ("OfABlock", "of-the-environment", "of-the-block"))


def build_length(ctx):
    """What it was given: the value, which will be hidden, and its length."""
    from pesc.stage import BuildResult

    (ctx.out / "data.json").write_text('"x"')
    others = sum("nobody-asked-for-it" in value or "of-the-block-and-unused" in value for value in os.environ.values())
    given = {"hf": os.environ["HF_TOKEN"], "wandb": os.environ["WANDB_API_KEY"]}
    return BuildResult(metrics={**{name: f"{value} of {len(value)}" for name, value in given.items()}, "others": others})
