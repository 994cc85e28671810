from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pesc.launch import supervise

PROGRAMS = str(Path(__file__).with_name("programs.py"))


def alive(pid: int) -> bool:
    return supervise._started(pid) is not None


def wait_for(condition, seconds: float = 20.0, what: str = "condition"):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.02)
    raise AssertionError(f"{what} did not come within {seconds} s")


def read_pid(path: Path) -> int:
    return int(wait_for(lambda: path.exists() and path.read_text(), what=path.name))


def run_python(code: str, tmp_path: Path, **options):
    events: list[dict] = []
    options.setdefault("on_event", events.append)
    outcome = supervise.run([sys.executable, "-c", code], log_path=tmp_path / "log.txt", **options)
    return outcome, events


def test_events_and_other_output_are_told_apart(tmp_path):
    code = """
import sys; from pesc.launch.events import emit
print("noise"); sys.stdout.write("bar 10%\\rbar 20%"); sys.stdout.flush()
emit({"event": "step", "n": 1}); print("more", file=sys.stderr); emit({"event": "step", "n": 2}); sys.stdout.write("no newline"); sys.exit(7)
"""
    outcome, events = run_python(code, tmp_path)
    assert outcome.returncode == 7
    assert [event["n"] for event in events] == [1, 2]
    assert (tmp_path / "log.txt").read_text() == "noise\nbar 20%\nmore\nno newline\n"
    assert outcome.tail.splitlines()[-1] == "no newline"


def test_much_output_is_read_whole(tmp_path):
    outcome, _ = run_python("for i in range(20000): print(i, 'x' * 50)", tmp_path)
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert outcome.returncode == 0
    assert len(lines) == 20000
    assert outcome.tail.splitlines()[0].startswith("19950 ")


def test_a_command_that_does_not_exist(tmp_path):
    outcome = supervise.run(["no-such-command-here"], log_path=tmp_path / "log.txt", on_event=lambda _: None)
    assert outcome.returncode == 127
    assert "no-such-command-here" in outcome.tail


def test_a_grandchild_that_holds_the_pipe_does_not_hold_the_caller(tmp_path):
    code = "import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']).pid, flush=True)"
    start = time.monotonic()
    outcome, _ = run_python(code, tmp_path)
    assert time.monotonic() - start < 20
    wait_for(lambda: not alive(int(outcome.tail)), what="the end of the grandchild")


def test_it_refuses_a_thread(tmp_path):
    caught: list[Exception] = []

    def attempt():
        try:
            run_python("pass", tmp_path)
        except RuntimeError as error:
            caught.append(error)

    thread = threading.Thread(target=attempt)
    thread.start()
    thread.join()
    assert "main thread" in str(caught[0])


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_error_of_the_callback_stops_the_tree_and_is_raised_again(tmp_path, error):
    code = (
        "import os, time; from pesc.launch.events import emit; print('here', flush=True); emit({'event': str(os.getpid())}); time.sleep(60)"
    )
    pids = []

    def fail(event):
        pids.append(int(event["event"]))
        raise error("stop")

    with pytest.raises(error) as caught:
        run_python(code, tmp_path, on_event=fail)
    assert not alive(pids[0])
    assert "here" in caught.value.__notes__[0]


def test_a_child_that_ignores_sigterm_and_fills_the_pipe_is_killed_after_the_grace_time(tmp_path):
    code = """
import signal, os; from pesc.launch.events import emit
signal.signal(signal.SIGTERM, signal.SIG_IGN); emit({"event": str(os.getpid())})
while True: print("x" * 1000)
"""
    pids = []

    def fail(event):
        pids.append(int(event["event"]))
        raise ValueError

    start = time.monotonic()
    with pytest.raises(ValueError):  # noqa: PT011
        run_python(code, tmp_path, on_event=fail, grace_seconds=1.0)
    assert 0.9 < time.monotonic() - start < 15
    assert not alive(pids[0])


def test_a_child_may_use_the_grace_time_to_save(tmp_path):
    code = f"""
import signal, sys, time; from pesc.launch.events import emit
def save(*_):
    time.sleep(0.5); open({str(tmp_path / "saved")!r}, "w").close(); sys.exit(0)
signal.signal(signal.SIGTERM, save); emit({{"event": "go"}}); time.sleep(60)
"""

    def fail(event):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_python(code, tmp_path, on_event=fail)
    assert (tmp_path / "saved").exists()


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (signal.SIGKILL, "plain"),
        *((number, kind) for number in (signal.SIGTERM, signal.SIGINT) for kind in ("plain", "stubborn", "unguarded")),
    ],
)
def test_no_orphans_whatever_kills_the_caller(tmp_path, number, kind):
    """plain: a launcher that leaves on SIGTERM.  stubborn: it ignores it.  unguarded: a rank without a death signal.

    After SIGKILL of the caller only the death signals act, so the last two are for signals that can be handled.
    """
    if kind != "plain":
        (tmp_path / kind).touch()
    caller = subprocess.Popen(
        [sys.executable, PROGRAMS, "caller", str(tmp_path)], env=supervise.child_environment(), stderr=subprocess.DEVNULL
    )
    pids = [read_pid(tmp_path / name) for name in ("rank.pid", "launcher.pid")]
    wait_for((tmp_path / "event").exists, what="the rank's event")
    assert all(map(alive, pids))
    os.kill(caller.pid, number)
    wait_for(lambda: not any(map(alive, pids)), what="the end of launcher and rank")
    assert caller.wait(20) == {signal.SIGTERM: 128 + 15, signal.SIGINT: -2, signal.SIGKILL: -9}[number]


def test_killing_the_launcher_alone_takes_the_rank_with_it(tmp_path):
    caller = subprocess.Popen([sys.executable, PROGRAMS, "caller", str(tmp_path)], env=supervise.child_environment())
    rank, launcher = (read_pid(tmp_path / name) for name in ("rank.pid", "launcher.pid"))
    os.kill(launcher, signal.SIGKILL)
    wait_for(lambda: not alive(rank), what="the end of the rank")
    assert caller.wait(20) == 0  # the caller saw the launcher end and returned its outcome


def test_a_recorded_pid_that_belongs_to_somebody_else_is_left_alone(tmp_path):
    bystander = subprocess.Popen(["sleep", "60"])
    try:
        (tmp_path / str(bystander.pid)).write_text("12345")
        supervise.kill_recorded(tmp_path)
        assert alive(bystander.pid)
        assert not list(tmp_path.iterdir())
    finally:
        bystander.kill()
        bystander.wait()


def test_a_guard_whose_parent_is_already_gone_starts_nothing(tmp_path):
    made = tmp_path / "made"
    environment = {**supervise.child_environment(), "PESC_PARENT_PID": "1"}
    code = subprocess.run([sys.executable, "-m", "pesc.launch.guard", "--", "touch", str(made)], env=environment, check=False).returncode
    assert code == 128 + signal.SIGTERM
    assert not made.exists()


def test_the_watcher_of_other_systems_ends_the_command_with_its_parent(tmp_path):
    """Run the non-Linux path here: a parent that dies, a watcher that notices."""
    pid_file = tmp_path / "pid"
    command = [sys.executable, "-c", f"import os, time; open({str(pid_file)!r}, 'w').write(str(os.getpid())); time.sleep(60)"]
    watcher = f"import os; from pesc.launch.guard import _watch; _watch({command!r}, os.getppid())"
    parent = subprocess.Popen(
        [sys.executable, "-c", f"import subprocess, sys; subprocess.run([sys.executable, '-c', {watcher!r}])"],
        env=supervise.child_environment(),
    )
    pid = read_pid(pid_file)
    parent.kill()
    parent.wait()
    wait_for(lambda: not alive(pid), what="the end of the watched command")


def test_a_stop_does_not_wait_for_a_lock_that_an_interrupted_poll_has_left(tmp_path):
    """A signal handler that raises inside `Popen.poll` leaves its lock taken; the same is done here by hand."""
    process = supervise.start([sys.executable, "-c", "import time; time.sleep(600)"])
    with (tmp_path / "log").open("a") as log:
        output = supervise.Output(process, log, lambda _: None)
        assert process._waitpid_lock.acquire(blocking=False)
        started = time.monotonic()
        supervise.stop(process, output, 20)
        output.close()
    assert time.monotonic() - started < 15
    assert process.returncode is not None
