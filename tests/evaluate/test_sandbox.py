"""Hostile programs in the real sandbox: each promise of pesc.evaluate.sandbox is attacked."""

from __future__ import annotations

import gzip
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pesc.errors import EvaluationError
from pesc.evaluate import sandbox
from pesc.evaluate.sandbox import Limits, require_isolation, run_program, run_programs
from pesc.evaluate.sandbox.syscall_filter import NUMBERS, build_filter

pytestmark = pytest.mark.skipif(sys.platform != "linux" or platform.machine() not in NUMBERS, reason="needs Linux on x86_64 or aarch64")
SHORT = Limits(cpu_seconds=1, wall_seconds=10, memory_bytes=256 << 20)


def test_the_promises_hold_on_this_machine():
    assert require_isolation().passed


def test_programs_that_compute_and_print_pass():
    good = [
        "assert sorted([3, 1, 2]) == [1, 2, 3]",
        "import collections, dataclasses, decimal, functools, hashlib, heapq, itertools, json, math, random, re, statistics, string, typing\nprint(math.pi)",
        "from dataclasses import dataclass\n@dataclass\nclass P:\n    x: int\nassert P(1) == P(1)",
        "import threading\nt = threading.Thread(target=print, args=('hi',)); t.start(); t.join()",
        "import asyncio\nasync def f(): return 3\nassert asyncio.run(f()) == 3",
    ]
    assert [outcome.status for outcome in run_programs(good, SHORT)] == ["passed"] * len(good)


@pytest.mark.parametrize(
    ("program", "status", "reason"),
    [
        ("assert 1 == 2", "failed", "AssertionError"),
        ("def f(:", "failed", "SyntaxError"),
        ("import sys; sys.exit(0)", "failed", "SystemExit"),
        ("import os; os._exit(0)", "failed", "left before the end"),
        ("raise KeyboardInterrupt", "failed", "KeyboardInterrupt"),
        ("def f(): return f()\nf()", "failed", "RecursionError"),
        ("input()", "failed", "EOFError"),
        ("while True: pass", "timeout", "cpu"),
        ("import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass", "timeout", "cpu"),
        ("x = []\nwhile True: x.append(bytearray(1 << 24))", "failed", "MemoryError"),
        ("bytearray(64 << 30)", "failed", "MemoryError"),
        ("import mmap; mmap.mmap(-1, 64 << 30)", "failed", "OSError"),
        ("import os; os.abort()", "killed", "SIGABRT"),
        ("import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(60,)).start()", "failed", "RuntimeError"),
    ],
)  # fmt: skip
def test_how_a_program_ends(program, status, reason):
    outcome = run_program(program, SHORT)
    assert (outcome.status, outcome.reason) == (status, reason)


def test_sleepers_are_ended_by_the_wall_clock():
    started = time.monotonic()
    outcome = run_program("import time; time.sleep(60)", Limits(wall_seconds=0.7))
    assert (outcome.status, outcome.reason) == ("timeout", "wall")
    assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    "program",
    [
        "import os\nwhile True: os.fork()",
        "import subprocess; subprocess.run(['true'])",
        "import os; os.system('true') == 0 or (_ for _ in ()).throw(PermissionError())",
        "import os; os.execv('/bin/true', ['true'])",
        "import multiprocessing as m\np = m.get_context('fork').Process(target=print); p.start()",
        "import os; os.kill(os.getppid(), 9)",
        "import os; os.killpg(0, 9)",
    ],
)
def test_no_other_process(program):
    assert run_program(program, SHORT).reason == "PermissionError"


@pytest.mark.parametrize("family", ["AF_INET", "AF_INET6", "AF_UNIX", "AF_NETLINK"])
def test_no_network(family):
    outcome = run_program(
        f"import socket; socket.socket(socket.{family}, socket.SOCK_RAW if 'NETLINK' in '{family}' else socket.SOCK_STREAM)", SHORT
    )
    assert (outcome.status, outcome.reason) == ("failed", "PermissionError")


def test_no_network_through_raw_system_calls():
    number = {"x86_64": 41, "aarch64": 198}[platform.machine()]
    program = f"import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\nassert libc.syscall({number}, 2, 1, 0) == -1\nassert ctypes.get_errno() == 1"
    assert run_program(program, SHORT).passed


def test_no_change_to_any_file(tmp_path):
    file = tmp_path / "victim"
    file.write_text("precious")
    tmp_path.chmod(0o777)
    file.chmod(0o666)
    victim, folder = repr(str(file)), repr(str(tmp_path))
    attacks = [  # one a kind of call that changes a file system
        f"open({victim}, 'w')", f"open({victim}, 'r+')", f"open({victim}, 'a')", f"import os; os.open({victim}, os.O_TRUNC)",
        f"import os; os.truncate({victim}, 0)", f"import os; os.remove({victim})", f"import os; os.rename({victim}, {victim} + 'x')",
        f"import os; os.chmod({victim}, 0)", f"import os; os.link({victim}, 'link')", f"import os; os.symlink('a', {folder} + '/link')",
        f"import os; os.mkdir({folder} + '/made')", f"import os; os.utime({victim})", f"import os; os.mkfifo({folder} + '/fifo')",
        f"import os; os.open({folder}, os.O_TMPFILE | os.O_RDWR)", "open('own', 'w')", "import tempfile; tempfile.TemporaryFile()",
    ]  # fmt: skip
    for attack, outcome in zip(attacks, run_programs(attacks, SHORT), strict=True):
        assert outcome.status == "failed", attack
        assert outcome.reason in {"PermissionError", "FileNotFoundError"}, (attack, outcome)
    assert file.read_text() == "precious"
    assert [path.name for path in tmp_path.iterdir()] == ["victim"]


def test_secrets_are_out_of_reach(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret-token")
    assert run_program("import os; assert 'HF_TOKEN' not in os.environ and 'HOME' not in os.environ", SHORT).passed
    secret = tmp_path / "credentials"
    secret.write_text("secret")
    outcome = run_program(f"open({str(secret)!r}).read()", SHORT)
    if not outcome.reads_confined:
        pytest.skip("this kernel offers no Landlock: reading is not confined")
    assert outcome.reason == "PermissionError"
    assert run_program(f"open('/proc/{os.getpid()}/environ').read()", SHORT).reason == "PermissionError"


def test_output_is_capped_and_never_blocks():
    outcome = run_program("print('x' * 10_000_000)", SHORT)
    assert outcome.passed
    assert len(outcome.output) == SHORT.output_bytes


def test_threads_do_not_outlive_the_program():
    program = "import threading, time\nfor _ in range(20): threading.Thread(target=time.sleep, args=(60,)).start()"
    started = time.monotonic()
    assert run_program(program, SHORT).passed
    assert time.monotonic() - started < 10


def test_nothing_is_left_behind(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    run_programs(["pass", "while True: pass", "import os; os._exit(3)"], SHORT)
    assert list(tmp_path.iterdir()) == []


def test_a_program_dies_with_whoever_started_it():
    """SIGKILL of the parent, which can clean nothing up."""
    code = "from pesc.evaluate.sandbox import *\nrun_program(\"import time\\nprint('up', flush=True)\\ntime.sleep(300)\", Limits(wall_seconds=300))"
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[2])
    try:
        guard = _wait_for(lambda: _children(parent.pid))
    finally:
        parent.kill()
        parent.wait()
    assert _wait_for(lambda: not Path(f"/proc/{guard[0]}").exists() or _is_zombie(guard[0]))


def _children(pid: int) -> list[int]:
    return [int(child) for task in Path(f"/proc/{pid}/task").glob("*/children") for child in task.read_text().split()]


def _is_zombie(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def _wait_for(condition, seconds: float = 20):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.02)
    pytest.fail("it did not happen in time")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")
def test_an_ordinary_user_has_the_same_sandbox(tmp_path):
    code = "import os\nfrom pesc.evaluate.sandbox import require_isolation\nassert os.getuid() == 65534\nprint(require_isolation().status)"
    environment = {**os.environ, "TMPDIR": "/tmp", "PYTHONDONTWRITEBYTECODE": "1"}
    identity = {"user": 65534, "group": 65534, "extra_groups": []}
    try:
        done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], env=environment, capture_output=True, **identity)
    except PermissionError:
        pytest.skip("another user cannot read this interpreter")
    assert done.stdout.strip() == b"passed", done.stderr


def test_without_the_filter_nothing_runs(tmp_path, monkeypatch):
    """A machine that refuses seccomp: the guard says so, and the program is never compiled."""
    guard = tmp_path / "guard.py"
    guard.write_text(sandbox.GUARD.read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "syscall_filter.py").write_text("def install_filter():\n    raise OSError(1, 'seccomp filter refused')\n")
    monkeypatch.setattr(sandbox, "GUARD", guard)
    with pytest.raises(EvaluationError, match=r"cannot be isolated.*refused"):
        run_program("open('/tmp/should-not-exist', 'w')")


def test_a_filter_that_allows_too_much_is_noticed(tmp_path, monkeypatch):
    guard = tmp_path / "guard.py"
    guard.write_text(sandbox.GUARD.read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "syscall_filter.py").write_text("def install_filter():\n    pass\n")
    monkeypatch.setattr(sandbox, "GUARD", guard)
    with pytest.raises(EvaluationError, match="does not hold"):
        require_isolation()


@pytest.mark.parametrize("machine", sorted(NUMBERS))
def test_filters_fit_the_kernels_limit(machine):
    code = build_filter(machine, 4242)
    assert len(code) % 8 == 0
    assert len(code) // 8 < 4096


def test_canonical_solutions_of_humaneval_pass(shared_data):
    rows = [json.loads(line) for line in (shared_data / "data/benchmarks/humaneval_test.jsonl").read_text(encoding="utf-8").splitlines()]
    from pesc.evaluate.tasks.code import run_humaneval, score

    chosen = rows[::12]
    outcomes = run_humaneval([[row["canonical_solution"]] for row in chosen], chosen)
    assert [score(row, [outcome])["pass@1"] for row, outcome in zip(chosen, outcomes, strict=True)] == [1.0] * len(chosen)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(300)
def test_all_canonical_solutions_of_humaneval_and_mbpp_pass(shared_data):
    from pesc.evaluate.tasks.code import run_humaneval, run_mbpp

    def read(name: str) -> list[dict]:
        path = shared_data / "data/benchmarks" / name
        text = gzip.decompress(path.read_bytes()).decode() if name.endswith(".gz") else path.read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]

    problems = read("humaneval_test.jsonl")
    outcomes = run_humaneval([[row["canonical_solution"]] for row in problems], problems)
    assert [row["task_id"] for row, outcome in zip(problems, outcomes, strict=True) if outcome[0]["status"] != "passed"] == []
    problems = read("mbpp_test.jsonl")
    outcomes = run_mbpp([[row["code"]] for row in problems], problems)
    assert [(row["task_id"], outcome[0]) for row, outcome in zip(problems, outcomes, strict=True) if outcome[0]["status"] != "passed"] == []
    wrong = problems[1:] + problems[:1]  # each problem gets its neighbour's solution
    outcomes = run_mbpp([[row["code"]] for row in wrong], problems)
    assert [row["task_id"] for row, outcome in zip(problems, outcomes, strict=True) if outcome[0]["status"] == "passed"] == []


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("wrong", ["    return None\n", "    pass\n", "    raise NotImplementedError\n"])
def test_wrong_solutions_of_humaneval_score_nothing(shared_data, wrong):
    from pesc.evaluate.tasks.code import run_humaneval

    rows = [json.loads(line) for line in (shared_data / "data/benchmarks/humaneval_test.jsonl").read_text(encoding="utf-8").splitlines()]
    outcomes = run_humaneval([[wrong]] * len(rows), rows)
    assert [row["task_id"] for row, outcome in zip(rows, outcomes, strict=True) if outcome[0]["status"] == "passed"] == []


ATTACKS = {
    "fork bomb": "import os\n    while True: os.fork()",
    "infinite loop": "while True: pass",
    "64 GB": "bytearray(64 << 30)",
    "socket": "import socket; socket.create_connection(('127.0.0.1', 1))",
    "writing outside": "open({victim!r}, 'w').write('gone')",
    "killing the parent": "import os; os.kill(os.getppid(), 9)",
    "killing the evaluator": "import os; os.kill({pid}, 9)",
    "deleting files": "import os, shutil; os.remove({victim!r}); shutil.rmtree({folder!r})",
    "reading the environment": "import os; assert 'HF_TOKEN' in os.environ or open('/proc/{pid}/environ').read()",
    "a shell": "import os; assert os.system('touch {folder}/made') == 0",
    "leaving early": "import os; os._exit(0)",
}


@pytest.mark.slow
def test_attacks_inside_a_benchmark_run_score_nothing_and_the_run_goes_on(tmp_path, model_dir, monkeypatch):
    """The whole stage, with hostile answers and honest ones in the model's mouth, one after the other."""
    from pesc.evaluate import harness
    from pesc.evaluate.language_model import JournaledLM
    from pesc.evaluate.results import read_result, read_samples
    from tests.evaluate.builders import PROBLEMS, code_config, context

    monkeypatch.setenv("HF_TOKEN", "secret-token")
    folder, victim, data = tmp_path / "precious", tmp_path / "precious/victim", tmp_path / "data"
    folder.mkdir(mode=0o777)
    victim.write_text("precious")
    data.mkdir()
    bodies = {name: "    " + text.format(pid=os.getpid(), victim=str(victim), folder=str(folder)) + "\n" for name, text in ATTACKS.items()}
    answers, rows = {}, []
    for number, body in enumerate(bodies.values()):
        for kind, answer in (("attack", body + "    return a + b\n"), ("honest", PROBLEMS[0]["canonical_solution"])):
            prompt = f"# {kind} {number}\n{PROBLEMS[0]['prompt']}"
            rows.append({**PROBLEMS[0], "task_id": f"{kind}/{number}", "prompt": prompt})
            answers[prompt] = answer
    (data / "problems.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    monkeypatch.setattr(JournaledLM, "generate_until", lambda self, requests: [answers[request.args[0]] for request in requests])
    ctx = context(tmp_path / "run", code_config(), model_dir, data)
    before = _children(os.getpid())
    harness.build(ctx)
    outcomes = [sample.score for sample in read_samples(ctx.out)]
    assert dict(zip(bodies, outcomes[0::2], strict=True)) == dict.fromkeys(bodies, 0.0)
    assert outcomes[1::2] == [1.0] * len(bodies)
    assert read_result(ctx.out).value == 0.5
    assert [path.name for path in folder.iterdir()] == ["victim"]
    assert victim.read_text() == "precious"
    assert _children(os.getpid()) == before
    assert "secret-token" not in (ctx.out / "samples.jsonl").read_text()
