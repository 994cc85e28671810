"""SIGKILL in the middle of a benchmark, of the process that evaluates or of the one that waits for it: the next run does only the rest."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pesc.evaluate import harness
from pesc.evaluate.journal import Journal
from tests.evaluate.builders import choice_config, code_config, context

PROGRAM = """
import sys
from pathlib import Path
from pesc.launch.isolated import build_isolated
from pesc.pipeline import stage_named
from tests.evaluate.builders import choice_config, code_config, context
config = {"scored": choice_config, "generated": code_config}[sys.argv[1]]()
build_isolated(stage_named("evaluate"), context(Path(sys.argv[2]), config, Path(sys.argv[3]), Path(sys.argv[4]), batch_size=16))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "victim"), [("scored", "child"), ("generated", "parent")])
def test_after_a_kill_only_the_rest_is_asked(tmp_path, model_dir, data_dir, kind, victim, monkeypatch):
    config = {"scored": choice_config, "generated": code_config}[kind]()
    data = _many_rows(tmp_path / "data", data_dir)
    whole = context(tmp_path / "whole", config, model_dir, data, batch_size=16)
    harness.build(whole)
    total = _lines(whole.work)
    assert total == 4, "chunks"

    root = tmp_path / "killed"
    done = _kill_at_half(kind, root, model_dir, data, total, victim)
    assert 0 < done < total, "it was to be killed on the way"
    assert list((root / "out").iterdir()) == [], "nothing is published of half a benchmark"
    (root / "out").rmdir()
    asked = []
    monkeypatch.setattr(Journal, "put", lambda self, key, answers, put=Journal.put: (asked.append(key), put(self, key, answers))[1])
    again = context(root, config, model_dir, data, batch_size=16)
    harness.build(again)
    assert len(asked) == total - done
    for name in ("results.json", "samples.jsonl"):
        assert (again.out / name).read_bytes() == (whole.out / name).read_bytes()


def _many_rows(folder: Path, data_dir: Path) -> Path:
    """Four chunks of problems and four of questions, each with a number of its own."""
    import gzip

    folder.mkdir()
    rows = (data_dir / "choices.jsonl").read_text(encoding="utf-8").splitlines()
    questions = [rows[n % len(rows)].replace('{"question": "', f'{{"question": "Number {n}. ', 1) for n in range(250)]
    (folder / "choices.jsonl").write_text("\n".join(questions) + "\n", encoding="utf-8")
    first = gzip.decompress((data_dir / "problems.jsonl.gz").read_bytes()).decode().splitlines()[0]
    problems = [first.replace('"prompt": "', f'"prompt": "# {n}\\n', 1) for n in range(100)]
    (folder / "problems.jsonl.gz").write_bytes(gzip.compress(("\n".join(problems) + "\n").encode()))
    return folder


def _lines(work: Path) -> int:
    path = work / "answers.jsonl"
    return path.read_text(encoding="utf-8").count("\n") if path.exists() else 0


def _kill_at_half(kind: str, root: Path, model: Path, data: Path, total: int, victim: str) -> int:
    """Start the stage as the runner does, kill when half of the chunks are answered; how many were answered then."""
    repository = Path(__file__).parents[2]
    root.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, kind, str(root), str(model), str(data)], cwd=repository, env=environment)
    deadline = time.monotonic() + 400
    while _lines(root / "work") < total // 2:
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.001)
    child = _children(process.pid)[0]
    os.kill(child if victim == "child" else process.pid, signal.SIGKILL)
    process.wait()
    while Path(f"/proc/{child}").exists() and Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline, "the evaluating process outlives its parent"
        time.sleep(0.01)
    return _lines(root / "work")


def _children(pid: int) -> list[int]:
    return [int(child) for task in Path(f"/proc/{pid}/task").glob("*/children") for child in task.read_text().split()]
