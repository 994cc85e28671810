"""A server beside this process's own work: started, asked by this process alone, and ended with it.

    with BackgroundServer(vllm, place, room, log_path, dtype="float32", max_model_len=4096) as server:
        ...  # ask server.url for the model server.name

It listens on a free port of 127.0.0.1 and calls the model by a name that nobody else uses, so that a server that took the port first
refuses the requests instead of answering them with another model.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import threading
import time
from pathlib import Path
from typing import IO

from pesc.errors import ServeError
from pesc.launch import supervise
from pesc.serve.directory import Place, make_served
from pesc.serve.environment import Vllm
from pesc.serve.server import Health, ServerOptions, build_argv, clean_command, how_it_ended, own_variables

_QUIET = ("--uvicorn-log-level", "warning")  # else a line for each request
_GRACE_SECONDS = 10.0
_TAIL_LINES = 20


class BackgroundServer:
    """vLLM's server, from `with` to its end.  To be used in the main thread: the server dies with the thread that started it.

    room: an empty directory for links and generated code.  log_path: continued where it exists.
    """

    def __init__(
        self, vllm: Vllm, place: Place, room: Path, log_path: Path, *, dtype: str, max_model_len: int, tensor_parallel_size: int = 1
    ):
        self._options = ServerOptions(
            port=free_port(), name=f"pesc-{secrets.token_hex(8)}", max_model_len=max_model_len, dtype=dtype,
            tensor_parallel_size=tensor_parallel_size, extra=_QUIET,
        )  # fmt: skip
        self._argv = build_argv(vllm, make_served(place, room, vllm.cpu, trust=False), self._options)
        self._room, self._log_path = room, log_path
        self._health = Health(self._options.url, lambda: None)
        self._leaving = threading.Event()
        self._open = contextlib.ExitStack()

    @property
    def url(self) -> str:
        """Where it answers, without the path."""
        return self._options.url

    @property
    def name(self) -> str:
        """What it calls the model."""
        return self._options.name

    @property
    def max_model_len(self) -> int:
        """Longest prompt with reply, in tokens."""
        return self._options.max_model_len or 0

    def __enter__(self) -> BackgroundServer:
        """Start it and wait until it answers.  Raises ServeError, with the end of its log, when it ends instead."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(supervise.termination_raised())
            log: IO[str] = stack.enter_context(self._log_path.open("a", encoding="utf-8", errors="replace"))
            command = clean_command(self._argv, os.environ)
            self._process = supervise.start(command, own_variables(os.environ, self._room))
            self._output = supervise.Output(self._process, log, None)
            self._reader = threading.Thread(target=self._read, name="vllm-log", daemon=True)
            self._reader.start()
            stack.callback(self._end)
            self._wait()
            self._open = stack.pop_all()
        return self

    def __exit__(self, *_error: object) -> None:
        """End it and everything that it started."""
        self._open.close()

    def failure(self, seconds: float) -> str | None:
        """A sentence on how it ended, if it does within so many seconds; None while it lives."""
        end = time.monotonic() + seconds
        while self._process.poll() is None:
            if time.monotonic() > end:
                return None
            time.sleep(0.1)
        self._reader.join(2.0)  # the log's last lines
        return how_it_ended(self._process.returncode, self._health.answered, self._log_path)

    def _wait(self) -> None:
        while not self._health.answered:
            if reason := self.failure(0.2):
                tail = "\n".join(self._output.tail.splitlines()[-_TAIL_LINES:])
                raise ServeError(f"{reason} The end of that log:\n{tail}" if tail else reason)
            self._health.step()

    def _read(self) -> None:
        while not self._leaving.is_set() and self._output.pump(0.2):
            pass

    def _end(self) -> None:
        self._leaving.set()
        self._reader.join()
        supervise.stop(self._process, self._output, _GRACE_SECONDS)
        supervise.kill_group(self._process.pid, signal.SIGKILL)
        self._output.close()


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
