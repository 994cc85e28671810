"""One JSON event a line, on a stdout that other writers share.

A line holds an event from the marker (an ASCII record separator, which no library prints, and a word) to its end.  What stands
before the marker is somebody's unfinished line.  An event is written with one system call, so that short ones (under 4 KiB, a
pipe's atomic size) are never torn by another process.

Kinds: {"event": "progress", done, total, unit, message, fields} and {"event": "log", level, name, message}; a program may add its own.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from pesc.stage import Progress

MARKER = "\x1epesc "
_LOCK = threading.Lock()
_STDOUT = 1

Event = Mapping[str, Any]


def encode(event: Event) -> bytes:
    """The line of an event.  The JSON is ASCII without line breaks."""
    return f"{MARKER}{json.dumps(event, separators=(',', ':'))}\n".encode("ascii")


def emit(event: Event, descriptor: int = _STDOUT) -> None:
    """Write one event.  A reader that has gone away is no error of the writer."""
    line = encode(event)
    with _LOCK:
        try:
            while line:
                line = line[os.write(descriptor, line) :]
        except BrokenPipeError:
            pass


def parse(line: str) -> tuple[str, dict[str, Any] | None]:
    """Split a line into other output and the event it ends with, if there is one."""
    noise, marker, text = line.partition(MARKER)
    if not marker:
        return line, None
    try:
        event = json.loads(text)
    except json.JSONDecodeError:
        return line, None
    if not isinstance(event, dict) or not isinstance(event.get("event"), str):
        return line, None
    return noise, event


class ProgressEmitter:
    """Emits progress events, at most one every `interval` seconds, and always the last one."""

    def __init__(self, interval: float = 0.2, send: Callable[[Event], None] = emit) -> None:
        self._interval = interval
        self._send = send
        self._last = float("-inf")

    def __call__(self, progress: Progress) -> None:
        """Emit, or drop what came too soon."""
        now = time.monotonic()
        if now - self._last < self._interval and progress.done < progress.total:
            return
        self._last = now
        self._send(
            {
                "event": "progress",
                "done": progress.done,
                "total": progress.total,
                "unit": progress.unit,
                "message": progress.message,
                "fields": dict(progress.fields),
            }
        )


class LogEmitter(logging.Handler):
    """A logging handler that sends records as events."""

    def emit(self, record: logging.LogRecord) -> None:
        """Send one record; a traceback travels inside the message."""
        try:
            emit({"event": "log", "level": record.levelno, "name": record.name, "message": self.format(record)})
        except Exception:
            self.handleError(record)


def relay(event: Event, on_progress: Callable[[Progress], None]) -> bool:
    """Give a progress event to `on_progress` and a log event to logging; False when it is of another kind."""
    if event["event"] == "progress":
        on_progress(Progress(event["done"], event["total"], event["unit"], event["message"], event["fields"]))
        return True
    if event["event"] == "log":
        logging.getLogger(event["name"]).log(int(event["level"]), "%s", event["message"])
        return True
    return False
