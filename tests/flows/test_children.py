"""Children of a flow run: what their ends mean, when nobody takes them up, how they are cancelled."""

from types import SimpleNamespace
from uuid import uuid4

import pytest
from prefect.client.schemas.objects import FlowRun, WorkPoolStatus
from prefect.states import Cancelled, Cancelling, Crashed, Failed, Pending, Running, Scheduled

from flows import children
from flows.children import Pickup, cancel, error_of
from pesc.errors import DataError, InterruptedStageError, StageFailedError, TrainingOutOfMemoryError, WorkerLostError
from tasks.retries import TRIED_AGAIN


def run_in(state, **fields):
    return FlowRun(id=uuid4(), flow_id=uuid4(), name="train[pesc] tiny 3f2a91bc", state=state, **fields)


@pytest.mark.parametrize(
    ("message", "kind", "sentence"),
    [
        ("DataError: row 3 has no answer: give it one.", DataError, "row 3 has no answer: give it one."),
        ("TrainingOutOfMemoryError: no room.\nThe log.", TrainingOutOfMemoryError, "no room.\nThe log."),
        ("ValueError: a defect", StageFailedError, "train[pesc] failed: Flow run encountered an exception: ValueError: a defect"),
        ("Path: not an error of ours", StageFailedError, "not an error of ours"),
    ],
)
def test_a_failed_child_has_its_own_class_and_sentence(message, kind, sentence):
    error = error_of("train[pesc]", run_in(Failed(message=f"{children.FAILURE}{message}")))
    assert type(error) is kind
    assert sentence in str(error)


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        ("Execution was aborted by a termination signal.", WorkerLostError),
        ("Process exited with status code: 143. Process received SIGTERM via the container runtime.", WorkerLostError),
        ("No sign of life for 540 s: the worker or its machine is gone.", WorkerLostError),
        ("Process exited with status code: -9. Process was killed.", StageFailedError),
        ("Process exited with status code: 137. Process was killed, likely due to an out-of-memory (OOM) condition.", StageFailedError),
        ("Flow run could not start: no such file", StageFailedError),
    ],
)
def test_only_a_worker_that_was_taken_away_is_another_try(message, kind):
    error = error_of("train[pesc]", run_in(Crashed(message=message)))
    assert type(error) is kind
    assert isinstance(error, TRIED_AGAIN) is (kind is WorkerLostError)
    assert message in str(error)
    assert "train[pesc] tiny 3f2a91bc" in str(error)


def test_a_cancelled_child_is_an_interruption():
    assert type(error_of("train[pesc]", run_in(Cancelled()))) is InterruptedStageError


@pytest.mark.parametrize(
    ("status", "cause"),
    [
        (WorkPoolStatus.NOT_READY, "no worker of the work pool 'gpu' is alive. Start one: python -m deployments.worker --pool gpu"),
        (WorkPoolStatus.PAUSED, "the work pool 'gpu' is paused. Let it go on: prefect work-pool resume gpu"),
        (WorkPoolStatus.READY, "the workers of 'gpu' are busy, or none of them serves the queue 'train', or it is at its limit"),
    ],
)
def test_a_child_that_nobody_takes_up_is_complained_of_less_and_less_often(status, cause):
    now = [0.0]
    pickup = Pickup("train[pesc]", clock=lambda: now[0])
    client = SimpleNamespace(read_work_pool=lambda name: SimpleNamespace(status=status, name=name))
    waiting = run_in(Scheduled(), work_pool_name="gpu", work_queue_name="train")
    said = []
    for second in range(0, 1800, 5):
        now[0] = float(second)
        if complaint := pickup.complaint(waiting, client):
            said.append((second, complaint))
    assert [second for second, _ in said] == [60, 180, 420, 900]
    assert cause in said[0][1]
    assert "train[pesc] (flow run 'train[pesc] tiny 3f2a91bc') has waited 60 s for a worker" in said[0][1]
    now[0] = 5000.0
    assert pickup.complaint(run_in(Running()), client) is None
    assert "waited 5000 s" in pickup.complaint(run_in(Pending(), work_pool_name="gpu"), client)


class Server:
    """Answers as Prefect's does: a scheduled run that is to be cancelled is Cancelled at once."""

    def __init__(self, state, start_time=None):
        self.run, self.set = run_in(state, start_time=start_time), []

    def read_flow_run(self, _id):
        return self.run

    def set_flow_run_state(self, _id, state, force=False):
        self.set.append((state.name, force))
        self.run.state = Cancelled() if self.run.state.is_scheduled() else state


@pytest.mark.parametrize(
    ("state", "started", "steps"),
    [
        (Scheduled(), None, [("Cancelling", False)]),
        (Pending(), None, [("Cancelling", False), ("Cancelled", True)]),
        (Running(), "2026-01-05T02:00:00Z", [("Cancelling", False)]),
        (Cancelled(), None, []),
    ],
)
def test_what_runs_is_told_to_stop_and_what_has_not_begun_never_does(state, started, steps):
    server = Server(state, started)
    cancel(server, server.run.id)
    assert server.set == steps
    assert server.run.state.is_cancelling() or server.run.state.is_cancelled()


def test_a_child_that_is_being_cancelled_is_not_told_again(monkeypatch):
    runs, told = [run_in(Running()), run_in(Cancelling())], []
    monkeypatch.setattr(children, "children_of", lambda *_: runs)
    monkeypatch.setattr(children, "cancel", lambda _client, child: told.append(child))
    assert children.cancel_children(None, uuid4()) == runs[:1]
    assert told == [runs[0].id]
