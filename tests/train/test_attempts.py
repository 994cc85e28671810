from __future__ import annotations

import pytest

from pesc.errors import PeerLostError, PreemptedError, RankKilledError, TrainingFailedError, TrainingHungError
from pesc.stage import BuildResult, Execution
from pesc.train.attempts import PAUSE_SECONDS, NotMetError, run_attempts


def run(ends, **settings):
    """Attempts that end with `ends`, one after the other, on a clock that only pauses move.  Returns the result and how many there were."""
    clock, numbers = [0.0], []

    def attempt(number):
        numbers.append(number)
        end = ends[number] if number < len(ends) else ends[-1]
        if isinstance(end, Exception):
            raise end
        return end

    def pause(seconds):
        clock[0] += seconds

    try:
        return run_attempts(attempt, Execution(**settings), pause, lambda: clock[0]), numbers
    except Exception as error:
        error.add_note(str(len(numbers)))
        raise


DONE = BuildResult({"loss": 1.0})


def test_what_was_lost_is_tried_again_as_often_as_allowed():
    result, numbers = run([PeerLostError("gone"), RankKilledError("killed"), TrainingHungError("stopped"), DONE], restarts=3)
    assert (numbers, result.metrics) == ([0, 1, 2, 3], {"loss": 1.0, "restarts": 3})
    with pytest.raises(PreemptedError, match="taken") as caught:
        run([PreemptedError("taken")], restarts=3)
    assert caught.value.__notes__ == ["4"]


def test_nothing_is_tried_again_unless_asked_and_the_users_errors_never_are():
    for error, settings in ((PeerLostError("gone"), {}), (TrainingFailedError("the loss is nan"), {"restarts": 5})):
        with pytest.raises(type(error)) as caught:
            run([error], **settings)
        assert caught.value.__notes__ == ["1"]


def test_machines_that_do_not_meet_are_waited_for_without_costing_a_restart_and_not_for_ever():
    absent = NotMetError("nobody came")
    assert run([absent, absent, DONE], join_timeout=60)[1] == [0, 1, 2]
    with pytest.raises(PeerLostError, match="nobody came") as caught:
        run([PeerLostError("gone"), absent], restarts=1, join_timeout=20)
    assert type(caught.value) is PeerLostError
    assert caught.value.__notes__ == [str(1 + int(20 / PAUSE_SECONDS))]
