"""Waiting for somebody else who does the same thing: told at once and now and then, limited if asked, ended by whatever interrupts."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from pesc.errors import StoreBusyError

logger = logging.getLogger(__name__)
SAY_SECONDS = 60.0

OnWait = Callable[[float, str], None]
"""Told the seconds waited and the holder, several times a second."""


class Patience:
    """How long to wait in all, over several things; None: for ever."""

    def __init__(self, seconds: float | None = None, on_wait: OnWait = lambda _seconds, _holder: None) -> None:
        self._limit, self._on_wait = seconds, on_wait
        self._began: float | None = None
        self._said: tuple[str, float] = ("", 0.0)

    def wait(self, label: str, holder: str, seconds: float) -> None:
        """Wait a moment more for `holder`, who does what `label` says.  Raises StoreBusyError at the limit."""
        now = time.monotonic()
        if self._began is None:
            self._began = now
        waited = now - self._began
        if self._limit is not None and waited >= self._limit:
            raise StoreBusyError(
                f"{label} is being done by {holder}; waited {waited:.0f} s for it, which is the limit (execution.wait_seconds). "
                "Run again later, or stop that process: what it has done is kept."
            )
        if self._said[0] != holder or now - self._said[1] >= SAY_SECONDS:
            self._said = holder, now
            logger.warning(
                "%s is being done by %s; its result is waited for%s.", label, holder, f" ({waited:.0f} s so far)" if waited >= 1 else ""
            )
        self._on_wait(waited, holder)
        time.sleep(seconds)
