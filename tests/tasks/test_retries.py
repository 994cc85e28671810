"""Tried again for a network's and a scheduler's sake, and for nothing else: every class of error, one by one."""

import threading
import time

import pytest
from prefect import flow
from prefect.states import Failed

from pesc import errors
from pesc.build import make_job
from pesc.errors import DataError, PescError, PreemptedError, TransientSourceError
from pesc.pipeline import build_graph
from tasks.execution import run_jobs_at_once
from tasks.retries import DELAYS_SECONDS, TRIED_AGAIN, retry_on, waiting_by
from tasks.table import TASKS

AGAIN = {
    "TransientError", "TransientSourceError", "TransientRemoteError", "TransientEvaluationError", "PreemptedError", "PeerLostError", "WorkerLostError",
}  # fmt: skip
CLASSES = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, PescError)]


class Run:
    """What a condition looks at of a task run."""

    name, run_count = "train[pesc] tiny", 1


@pytest.fixture
def said(monkeypatch):
    lines = []
    monkeypatch.setattr("tasks.retries.get_run_logger", lambda: type("Log", (), {"warning": lambda _s, *words: lines.append(words)})())
    return lines


@pytest.mark.parametrize("kind", [*CLASSES, ValueError, MemoryError, OSError])
def test_a_failure_is_tried_again_by_its_class_alone(kind, said):
    again = retry_on(*TRIED_AGAIN)(None, Run(), Failed(data=kind("what happened.")))
    assert again is (kind.__name__ in AGAIN)
    assert bool(said) is again


def test_every_name_in_the_list_above_is_a_class():
    assert {kind.__name__ for kind in CLASSES} >= AGAIN


def test_every_stage_waits_longer_from_try_to_try_and_not_all_at_once():
    for name, task in TASKS.items():
        assert task.retry_delay_seconds == ([5, 30] if name == "download" else list(DELAYS_SECONDS))
        assert task.retries == len(task.retry_delay_seconds)
        assert task.retry_jitter_factor == 0.5
        assert type(task.retry_condition_fn).__name__ == "function", "Prefect 3.8 takes any other callable for never"


def test_a_condition_with_a_wait_of_its_own_waits_and_asks_whether_to_go_on(said):
    waited = []
    with waiting_by(lambda seconds: bool(waited.append(seconds))):
        assert retry_on(PreemptedError)(None, Run(), Failed(data=PreemptedError("gone."))) is False
    assert 5 <= waited[0] <= 15


def flaky(monkeypatch, kinds):
    """The builder of every stage fails like this, one error a try; returns the addresses of the tries."""
    from tests import fake_stages

    attempts, build = [], fake_stages.build

    def attempt(ctx):
        attempts.append(ctx.address)
        if kind := kinds[len(attempts) - 1]:
            raise kind("it was stopped from outside (SIGTERM); run it again.")
        return build(ctx)

    monkeypatch.setattr(fake_stages, "build", attempt)
    return attempts


@pytest.mark.usefixtures("prefect_server")
@pytest.mark.parametrize(
    ("stage", "kinds", "tries"),
    [
        ("train", [PreemptedError, PreemptedError, None], 3),
        ("merge", [TransientSourceError, None], 2),
        ("download", [TransientSourceError] * 3, 3),
        ("train", [DataError], 1),
    ],
)
def test_prefect_tries_as_often_as_it_should(fakes, store, tiny_recipe, monkeypatch, stage, kinds, tries):
    from tasks.execution import run_job

    attempts = flaky(monkeypatch, kinds)
    recipe = tiny_recipe()
    job = make_job(build_graph(recipe).by_address["download[base]"], recipe, {})
    task = TASKS[stage].with_options(retry_delay_seconds=0)

    @flow
    def alone():
        return run_job(task, job, store)

    if kinds[-1]:
        with pytest.raises(kinds[-1]):
            alone()
    else:
        assert alone().how == "built"
    assert len(attempts) == tries


@pytest.mark.usefixtures("prefect_server")
def test_a_task_that_waits_in_a_thread_for_its_next_try_is_let_go_when_the_run_is_stopped(fakes, store, tiny_recipe):
    recipe = tiny_recipe()
    jobs = [(TASKS["download"], make_job(build_graph(recipe).by_address[a], recipe, {})) for a in ("download[base]", "download[rows]")]
    failed = threading.Event()

    class Stopped(BaseException):
        pass

    class Crew:
        """Builds nothing, and is stopped as soon as both have failed."""

        closed = threading.Event()

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.closed.set()

        def build(self, *_):
            failed.set()
            raise PreemptedError("the machine was taken away.")

        def turn(self):
            if failed.wait(5):
                time.sleep(0.5)
                raise Stopped

        def wait(self, seconds):
            return not self.closed.wait(seconds)

    class Runner:
        tried_again = TRIED_AGAIN

        def crew(self, _store, _slots):
            return Crew()

        def made(self, _manifest):
            return False

    @flow
    def several():
        started = time.monotonic()
        with pytest.raises(Stopped):
            list(run_jobs_at_once(jobs, 2, store, Runner()))
        return time.monotonic() - started

    assert several() < 4.5, "the shortest delay would be 5 s"
