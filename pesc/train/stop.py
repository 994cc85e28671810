"""A wish to stop, remembered until the step has ended."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from types import FrameType


class StopRequest:
    """Remembers SIGTERM, so that the ranks can save before they end; before training begins SIGTERM ends the process.

    A file has the same effect without a deadline.
    """

    def __init__(self, stop_file: Path) -> None:
        self._stop_file = stop_file
        self._signal: int | None = None
        self._is_deferring = False
        signal.signal(signal.SIGTERM, self._receive)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        self._signal = number
        if not self._is_deferring:
            sys.exit(128 + number)

    def defer(self) -> None:
        """From now on a stop waits for the end of the step."""
        self._is_deferring = True

    @property
    def code(self) -> float:
        """0: go on, 1: the file asks for a stop, 2: a signal does.  The ranks act on the highest of all."""
        if self._signal is not None:
            return 2.0
        return 1.0 if self._stop_file.exists() else 0.0

    @staticmethod
    def reason(code: float) -> str:
        """A code in words."""
        return "signal" if code >= 2.0 else "stop file"
