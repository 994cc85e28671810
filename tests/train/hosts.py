"""Two "hosts" on this machine: network namespaces with a cable between them."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from pesc.launch import supervise
from pesc.launch.guard import PARENT_VARIABLE


@dataclass(frozen=True)
class Host:
    """A namespace and its address on the cable."""

    namespace: str
    address: str

    def popen(self, argv: list[str], output: Path, environment: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
        """Start a command here; what it says goes to the end of a file."""
        environment = {**supervise.child_environment(), **(environment or {}), PARENT_VARIABLE: str(os.getpid())}
        with output.open("ab") as file:
            return subprocess.Popen(
                [sys.executable, "-m", "pesc.launch.guard", "--", "ip", "netns", "exec", self.namespace, *argv],
                env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file,
            )  # fmt: skip

    def pids(self) -> list[int]:
        """Everything that runs here."""
        answer = subprocess.run(["ip", "netns", "pids", self.namespace], capture_output=True, text=True, check=False)
        return [int(pid) for pid in answer.stdout.split()]

    def kill(self) -> None:
        """SIGKILL all of it, as a power cut does."""
        while pids := self.pids():
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def two_hosts() -> Iterator[list[Host]]:
    """Two namespaces, 10.213.77.1 and .2; skips where they cannot be made.  Nothing of them is left."""
    if not sys.platform.startswith("linux") or not shutil.which("ip"):
        pytest.skip("network namespaces need Linux and the command `ip`")
    mark = uuid.uuid4().hex[:6]
    hosts = [Host(f"pesc-{mark}-{number}", f"10.213.77.{number}") for number in (1, 2)]
    try:
        try:
            for host in hosts:
                _ip("netns", "add", host.namespace)
            ends = [f"pv{mark}{number}" for number in (1, 2)]
            _ip("link", "add", ends[0], "netns", hosts[0].namespace, "type", "veth", "peer", "name", ends[1], "netns", hosts[1].namespace)
            for host, end in zip(hosts, ends, strict=True):
                _ip("-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", end)
                for link in ("lo", end):
                    _ip("-n", host.namespace, "link", "set", link, "up")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here (they need root): {error.stderr.strip()}")
        yield hosts
    finally:
        for host in hosts:
            host.kill()
            subprocess.run(["ip", "netns", "del", host.namespace], capture_output=True, check=False)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], capture_output=True, text=True, check=True)
