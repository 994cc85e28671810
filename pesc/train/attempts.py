"""Trying again: when training goes on by itself from its last checkpoint, and how long it waits for the other machines."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from pesc.errors import PeerLostError, PreemptedError, RankKilledError, TrainingHungError
from pesc.stage import BuildResult, Execution

logger = logging.getLogger(__name__)
PAUSE_SECONDS = 2.0  # the other machines must notice as well, and end, before they can be met again


class NotMetError(PeerLostError):
    """The machines did not meet, so nothing was trained."""


def run_attempts(
    attempt: Callable[[int], BuildResult],
    execution: Execution,
    pause: Callable[[float], None] = time.sleep,
    now: Callable[[], float] = time.monotonic,
) -> BuildResult:
    """`attempt(number)`, again while a process or a machine was lost or hung and `execution.restarts` allows it.

    Meetings that fail cost no restart, but end after `execution.join_timeout` seconds.  Every other error is raised at once.
    """
    restarts, number, waiting_since = 0, 0, now()
    while True:
        try:
            result = attempt(number)
            return BuildResult({**result.metrics, "restarts": restarts}, result.provenance) if restarts else result
        except NotMetError as error:
            if now() - waiting_since >= execution.join_timeout:
                raise PeerLostError(str(error)) from error
            logger.info("%s", error)
        except (PreemptedError, RankKilledError, TrainingHungError) as error:
            if restarts >= execution.restarts:
                raise
            restarts, waiting_since = restarts + 1, now()
            logger.warning("%s Restart %d of %d.", error, restarts, execution.restarts)
        number += 1
        pause(PAUSE_SECONDS)
