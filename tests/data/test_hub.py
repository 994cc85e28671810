"""Hub sources against a server that speaks the hub's API; each download runs in a process of its own, as huggingface_hub reads its
settings when it is imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.data.builders import tree_bytes
from tests.data.hub_server import COMMIT, Hub, serve

ROWS = b'{"query": "1+1", "response": "2"}\n' * 50
PROGRAM = """
import json, sys
from pathlib import Path
from pesc.data.config import SourceConfig
from pesc.data.download import build
from pesc.errors import PescError
from pesc.stage import StageContext
answers = []
for number, settings in enumerate(json.loads(sys.argv[1])):
    root = Path(sys.argv[2]) / str(number)
    (root / "out").mkdir(parents=True)
    (root / "work").mkdir()
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
