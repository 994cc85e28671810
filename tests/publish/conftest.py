"""A hub of this module, and a process with the command line in it, which is started once: the hub's client reads HF_ENDPOINT at import."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.publish.writable_hub import TOKEN, WritableHub, serve_writable
from tests.test_model_card import world  # noqa: F401  a fixture: a recipe whose models are in a store

WORKER = """
import contextlib, io, json, os, sys
from pesc import cli
assert "torch" not in sys.modules
channel = os.fdopen(os.dup(1), "w")
for line in sys.stdin:
    order = json.loads(line)
    os.environ.pop("HF_TOKEN", None)
    os.environ |= order["environment"]
    out, err, code = io.StringIO(), io.StringIO(), 0
    sys.argv = ["pesc", *order["arguments"]]
    sys.stdin = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main()
        except SystemExit as ended:
            code = ended.code or 0
    answer = {"code": code, "out": out.getvalue(), "err": err.getvalue(), "torch": "torch" in sys.modules}
    print(json.dumps(answer), file=channel, flush=True)
"""


def environment(url: str, home: Path, token: str | None = TOKEN) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy") and not name.startswith("HF_")}
    settings = {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", "COLUMNS": "200"}
    return kept | settings | ({"HF_TOKEN": token} if token else {})


@pytest.fixture(scope="module")
def running_hub():
    with serve_writable(WritableHub()) as hub:
        yield hub


@pytest.fixture
def hub(running_hub):
    """The hub, empty."""
    for name, value in vars(WritableHub()).items():
        if name != "url":
            setattr(running_hub, name, value)
    return running_hub


@pytest.fixture(scope="module")
def worker(running_hub, tmp_path_factory):
    """`worker(*arguments, token=...)` -> (exit code, standard output, standard error) of a `pesc` command; none of them may load torch."""
    process = subprocess.Popen(
        [sys.executable, "-c", WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
        env=environment(running_hub.url, tmp_path_factory.mktemp("hf")),
    )  # fmt: skip

    def run(*arguments: object, token: str | None = TOKEN, torch: bool = False, **variables: str) -> tuple[int, str, str]:
        order = {"arguments": [*map(str, arguments)], "environment": variables | ({"HF_TOKEN": token} if token else {})}
        process.stdin.write(json.dumps(order) + "\n")
        answer = json.loads(process.stdout.readline())
        assert "Traceback" not in answer["err"]
        assert torch or not answer["torch"], "publishing a directory loads no torch"
        for known in filter(None, (TOKEN, token)):
            assert known not in answer["out"] + answer["err"], "a token is never printed"
        return answer["code"], answer["out"], answer["err"]

    yield run
    process.stdin.close()
    process.wait(30)


@pytest.fixture
def publish(worker):
    def run(directory: object, *options: str, repo: str = "org/model", **more) -> tuple[int, str, str]:
        return worker("publish", directory, "--repo", repo, "--yes", *options, **more)

    return run
