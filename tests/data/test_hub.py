"""Hub sources against a server that speaks the hub's API; each download runs in a process of its own, as huggingface_hub reads its
settings when it is imported."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.data.builders import tree_bytes
from tests.data.hub_server import COMMIT, Hub, serve

ROWS = b'{"query": "1+1", "response": "2"}\n' * 50
PROGRAM = """
import json, shutil, sys
from pathlib import Path
from pesc.data.config import SourceConfig
from pesc.data.download import build
from pesc.errors import PescError
from pesc.stage import StageContext
answers = []
for number, settings in enumerate(json.loads(sys.argv[1])):
    root = Path(sys.argv[2]) / str(number)
    shutil.rmtree(root / "out", ignore_errors=True)
    (root / "out").mkdir(parents=True)
    (root / "work").mkdir(exist_ok=True)
    try:
        result = build(StageContext("test", SourceConfig(**settings), {}, root / "out", root / "work"))
        answers.append({"metrics": result.metrics, "provenance": result.provenance})
    except PescError as error:
        answers.append({"error": f"{type(error).__name__}: {error}"})
print("RESULT " + json.dumps(answers))
"""


def fetch(root: Path, endpoint: str, *settings: dict[str, Any], offline: str = "0") -> list[dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy") and not name.startswith("HF_")}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": offline, "HF_HOME": str(root / "hf"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-c", PROGRAM, json.dumps(settings), str(root)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.partition("RESULT ")[2])


@pytest.fixture
def hub():
    model = {"config.json": b"{}", "model.safetensors": b"\0" * 4096, "pytorch_model.bin": b"old", ".gitattributes": b"*"}
    rows = {"data/train-[1].jsonl": ROWS, "data/test.jsonl": b"{}\n", "README.md": b"# card"}
    with serve(Hub({("model", "org/tiny"): model, ("dataset", "org/rows"): rows})) as hub:
        yield hub


def test_a_model_and_a_data_set_are_pinned_to_the_commit_of_their_branch(tmp_path, hub):
    model, data = fetch(
        tmp_path,
        hub.url,
        {"uri": "hub:org/tiny@main", "include": ["*.json", "*.safetensors"]},
        {"uri": "hub:datasets/org/rows@main", "include": ["data/train*"]},
    )
    assert model["provenance"]["revision"] == COMMIT
    assert model["provenance"]["requested_revision"] == "main"
    assert tree_bytes(tmp_path / "0" / "out") == {"config.json": b"{}", "model.safetensors": b"\0" * 4096}
    assert data["metrics"] == {"files": 1, "bytes": len(ROWS)}
    assert tree_bytes(tmp_path / "1" / "out") == {"data/train-[1].jsonl": ROWS}
    fetched = [request for request in hub.requests if "/resolve/" in request]
    assert all(f"/resolve/{COMMIT}/" in request for request in fetched), "files are fetched from the commit, never from the branch"
    assert not any("pytorch_model.bin" in request or "test.jsonl" in request for request in fetched)


def test_every_refusal_of_the_hub_is_a_sentence(tmp_path, hub):
    repo = {"org/gated": 403, "org/busy": 429, "org/broken": 500, "org/locked": 401}
    hub.status.update(repo)
    answers = fetch(
        tmp_path,
        hub.url,
        {"uri": "hub:org/missing@main"},
        {"uri": "hub:org/tiny@no-such-branch"},
        {"uri": "hub:org/tiny@main", "include": ["*.gguf"]},
        {"uri": "hub:org/gated@main"},
        {"uri": "hub:org/locked@main"},
        {"uri": "hub:org/broken@main"},
    )
    expected = [
        "the hub has no model org/missing",
        "has no revision 'no-such-branch'",
        "no file that matches '*.gguf'",
        "is gated",
        "refuses access (HTTP 401)",
        "HTTP 500",
    ]
    for answer, part in zip(answers, expected, strict=True):
        kind = "TransientSourceError" if part == "HTTP 500" else "SourceError"  # what a scheduler may try again
        assert answer["error"].startswith(f"{kind}: Source 'hub:")
        assert part in answer["error"]
        assert hub.url not in answer["error"]


WEIGHTS = random.Random(1).randbytes(25 << 20)
"""More than the client reads at a time, so that something has arrived when the line is cut."""


def test_a_cut_connection_is_resumed_by_the_next_run(tmp_path, hub):
    hub.files["model", "org/big"] = {"config.json": b"{}", "model.safetensors": WEIGHTS}
    hub.cut_after = 15 << 20
    (cut,) = fetch(tmp_path, hub.url, {"uri": "hub:org/big@main"})
    assert cut["error"].startswith("TransientSourceError")
    assert "running again resumes" in cut["error"]
    assert tree_bytes(tmp_path / "0" / "out") == {}
    hub.cut_after, before = None, len(hub.requests)
    (whole,) = fetch(tmp_path, hub.url, {"uri": "hub:org/big@main"})
    assert whole["metrics"]["bytes"] == len(WEIGHTS) + 2
    assert tree_bytes(tmp_path / "0" / "out") == {"config.json": b"{}", "model.safetensors": WEIGHTS}
    resumed = [request for request in hub.requests[before:] if "model.safetensors" in request]
    assert len(resumed) == 1
    assert int(resumed[0].partition("bytes=")[2].rstrip("-")) >= 10 << 20, "what had arrived is not asked for again"
    assert not list((tmp_path / "0" / "work").iterdir())


@pytest.mark.parametrize(("name", "kind"), [("model.safetensors", "SHA-256"), ("config.json", "git id")], ids=["large-file storage", "git"])
def test_bytes_that_are_not_those_of_the_commit_are_refused_and_forgotten(tmp_path, hub, name, kind):
    good = hub.files["model", "org/tiny"][name]
    hub.tampered[name] = bytes(len(good) - 1) + b"!"
    (answer,) = fetch(tmp_path, hub.url, {"uri": "hub:org/tiny@main", "include": [name]})
    assert answer["error"].startswith("SourceError")
    assert f"{name} has the {kind}" in answer["error"]
    assert tree_bytes(tmp_path / "0" / "out") == {}
    hub.tampered.clear()
    (answer,) = fetch(tmp_path, hub.url, {"uri": "hub:org/tiny@main", "include": [name]})
    assert tree_bytes(tmp_path / "0" / "out") == {name: good}


def test_a_branch_that_moves_gives_its_new_commit_and_the_old_one_stays_pinned(tmp_path, hub):
    uri, moved = {"uri": "hub:datasets/org/rows@main", "include": ["data/test*"]}, "b" * 40
    (first,) = fetch(tmp_path / "a", hub.url, uri)
    hub.push(moved, {**hub.files, ("dataset", "org/rows"): {"data/test.jsonl": b"new\n"}})
    second, pinned = fetch(tmp_path / "b", hub.url, uri, {**uri, "uri": f"hub:datasets/org/rows@{COMMIT}"})
    assert [answer["provenance"]["revision"] for answer in (first, second, pinned)] == [COMMIT, moved, COMMIT]
    assert tree_bytes(tmp_path / "b" / "0" / "out") == {"data/test.jsonl": b"new\n"}
    assert tree_bytes(tmp_path / "b" / "1" / "out") == tree_bytes(tmp_path / "a" / "0" / "out") == {"data/test.jsonl": b"{}\n"}


def test_a_run_that_was_cut_off_does_not_go_on_with_another_commit(tmp_path, hub):
    hub.files["model", "org/big"] = {"model.safetensors": WEIGHTS}
    hub.cut_after = 15 << 20
    fetch(tmp_path, hub.url, {"uri": "hub:org/big@main"})
    hub.cut_after, before = None, len(hub.requests)
    hub.push("c" * 40, {**hub.files, ("model", "org/big"): {"model.safetensors": WEIGHTS[::-1]}})
    fetch(tmp_path, hub.url, {"uri": "hub:org/big@main"})
    assert tree_bytes(tmp_path / "0" / "out") == {"model.safetensors": WEIGHTS[::-1]}
    assert not any("bytes=" in request for request in hub.requests[before:])


def test_a_data_set_is_found_under_its_old_id(tmp_path, hub):
    hub.files["dataset", "ise-uiuc/Magicoder-OSS-Instruct-75K"] = {"data.jsonl": ROWS}
    (answer,) = fetch(tmp_path, hub.url, {"uri": "hub:datasets/ise-uiuc/Magicoder_oss_instruct_75k@main"})
    assert answer["provenance"]["repository"] == "ise-uiuc/Magicoder-OSS-Instruct-75K"
    assert answer["provenance"]["requested_repository"] == "ise-uiuc/Magicoder_oss_instruct_75k"
    assert tree_bytes(tmp_path / "0" / "out") == {"data.jsonl": ROWS}


def test_a_file_that_would_be_written_elsewhere_is_refused(tmp_path, hub):
    hub.files["model", "org/evil"] = {"config.json": b"{}", "../../evil.txt": b"boo"}
    (answer,) = fetch(tmp_path, hub.url, {"uri": "hub:org/evil@main"})
    assert "'../../evil.txt', which would be written outside" in answer["error"]
    assert not list(tmp_path.rglob("evil.txt"))


def test_a_file_that_is_listed_but_missing_says_so(tmp_path, hub):
    hub.status["data/test.jsonl"] = 404
    (answer,) = fetch(tmp_path, hub.url, {"uri": "hub:datasets/org/rows@main"})
    assert "lists a file that it does not have (HTTP 404)" in answer["error"]


def test_too_many_requests_say_wait(tmp_path, hub):
    hub.status["org/tiny"] = 429
    (answer,) = fetch(tmp_path, hub.url, {"uri": "hub:org/tiny@main"})
    assert answer["error"].startswith("TransientSourceError")
    assert "too many requests (HTTP 429)" in answer["error"]


def test_no_network_and_offline_mode_are_told_apart(tmp_path):
    dead = "http://127.0.0.1:9"
    (answer,) = fetch(tmp_path / "a", dead, {"uri": "hub:org/tiny@main"})
    assert answer["error"].startswith("TransientSourceError")
    assert "there is no network to the hub" in answer["error"]
    assert "127.0.0.1" not in answer["error"]
    (answer,) = fetch(tmp_path / "b", dead, {"uri": "hub:org/tiny@main"}, offline="1")
    assert "HF_HUB_OFFLINE is set" in answer["error"]
