"""Who is building an action, among machines that have only a remote in common.

    with hold_lease(remote, stage, fingerprint, label, patience, until_found=True):
        ...                                    # nobody else builds it, or its result is in the remote by now: look first

A lease is a small file `leases/<stage>/<fp>/<n>` that its holder renews from a thread. Who finds one waits until the result is there, or
until the lease has been given back or not renewed for as long as it promises; then it takes over by creating number n + 1, which only
one can. A lease that is given back without a result stays, as a note, until the next number is there: numbers never start again, or one
that waited long could take a number that is held.

Key contracts
- No clocks are compared: a waiting process watches the file change by its own clock. So an expired lease costs its duration once.
- A lease whose holder was a process of this very machine that has ended is taken over at once.
- A lease is a courtesy: when it is lost (a machine slept, a server ignores conditions) two machines build the same bytes, and the first
  manifest wins.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from pesc.errors import RemoteError
from pesc.store.machine import is_alive, machine
from pesc.store.patience import Patience
from pesc.store.remote import Remote

logger = logging.getLogger(__name__)
LEASE_SECONDS = 60.0
LONGEST_SECONDS = 600.0
POLL_SECONDS = (0.5, 5.0)
"""First and longest wait between two looks."""


@dataclass(frozen=True)
class Claim:
    """What somebody wants to build.  seconds: how long a lease holds without being renewed."""

    stage: str
    fingerprint: str
    label: str
    seconds: float = field(default_factory=lambda: LEASE_SECONDS)

    @property
    def folder(self) -> str:
        """Where its leases lie."""
        return f"leases/{self.stage}/{self.fingerprint}"


@contextlib.contextmanager
def hold_lease(remote: Remote, claim: Claim, patience: Patience, until_found: bool) -> Iterator[None]:
    """Hold the lease of an action, or (`until_found`) go on without it as soon as the remote has its result.

    Raises StoreBusyError at the patience's limit, RemoteError.
    """
    mine = {**_signature(), "label": claim.label, "seconds": claim.seconds, "since": datetime.now(UTC).isoformat(timespec="seconds")}
    name = _acquire(remote, claim, mine, patience, until_found)
    if name is None:
        yield
        return
    ended = threading.Event()
    thread = threading.Thread(target=_renew, args=(remote, name, mine, ended), name="pesc-lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(timeout=5)
        with contextlib.suppress(RemoteError):  # it expires
            _give_back(remote, claim, name, mine)


def _give_back(remote: Remote, claim: Claim, name: str, mine: dict[str, Any]) -> None:
    if remote.knows(claim.stage, claim.fingerprint):
        remote.place.remove(name, tries=1)
    else:
        remote.place.write(name, json.dumps({**mine, "released": True}).encode(), tries=1)


def _acquire(remote: Remote, claim: Claim, mine: dict[str, Any], patience: Patience, until_found: bool) -> str | None:
    """Name of the lease that is held now; None when the result is there."""
    watch, poll = _Watch(), POLL_SECONDS[0]
    remote.check()
    while not (until_found and remote.manifest(claim.stage, claim.fingerprint, fresh=True)):
        current = max(_numbers(remote, claim), default=None)
        if current is not None:
            held = _parse(remote.place.read(f"{claim.folder}/{current}"))
            if held is None:  # released just now
                continue
            if not watch.is_over(current, held):
                patience.wait(claim.label, _holder(held), poll)
                poll = min(poll * 1.5, POLL_SECONDS[1])
                continue
        name = f"{claim.folder}/{0 if current is None else current + 1}"
        if remote.place.create(name, json.dumps(mine).encode()) or _is_mine(remote, name, mine):
            if max(_numbers(remote, claim), default=0) > int(name.rpartition("/")[2]):  # it was free because it is long past
                remote.place.remove(name)
                continue
            if current is not None:
                if not watch.last.get("released"):
                    logger.warning("%s was being done by %s, which has gone; it is taken over.", claim.label, _holder(watch.last))
                remote.place.remove(f"{claim.folder}/{current}")
            return name
    return None


def _numbers(remote: Remote, claim: Claim) -> list[int]:
    found = (name.rpartition("/")[2] for name in remote.place.names(claim.folder))
    return [int(number) for number in found if re.fullmatch(r"[0-9]{1,9}", number)]


def _is_mine(remote: Remote, name: str, mine: dict[str, Any]) -> bool:
    """Whether it was this process's own request that came first (the answer was lost and the driver asked again)."""
    there = _parse(remote.place.read(name))
    return there is not None and there.get("token") == mine["token"]


class _Watch:
    """Watches one lease by this machine's clock."""

    def __init__(self) -> None:
        self.last: dict[str, Any] = {}
        self._seen: tuple[int, Any, Any] | None = None
        self._since = 0.0

    def is_over(self, number: int, held: dict[str, Any]) -> bool:
        """Whether the holder has gone: it gave the lease back, its process on this machine has ended, or it has not renewed for too long."""
        self.last = held
        if held.get("released") or _ended_here(held):
            return True
        now, state = time.monotonic(), (number, held.get("token"), held.get("beat"))
        if state != self._seen:
            self._seen, self._since = state, now
        promised = held.get("seconds")
        return now - self._since > (min(promised, LONGEST_SECONDS) if isinstance(promised, int | float) else LEASE_SECONDS)


def _renew(remote: Remote, name: str, mine: dict[str, Any], ended: threading.Event) -> None:
    beat = 0
    while not ended.wait(mine["seconds"] / 4):
        beat += 1
        try:
            remote.place.write(name, json.dumps({**mine, "beat": beat}).encode())
        except Exception as error:  # a lease that is lost costs a second build at most
            logger.debug("The lease %s was not renewed: %s", name, error)


def _signature() -> dict[str, Any]:
    """Who this process is; `machine` differs between machines, boots and containers."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "machine": machine(), "token": secrets.token_hex(8)}


def _ended_here(held: dict[str, Any]) -> bool:
    is_of_here = bool(held.get("machine")) and held["machine"] == machine() and isinstance(held.get("pid"), int)
    return is_of_here and not is_alive(held["pid"])


def _parse(data: bytes | None) -> dict[str, Any] | None:
    """What a lease says; an empty mapping, which expires like any other, when nobody can read it; None when it is gone."""
    if data is None:
        return None
    try:
        found = json.loads(data)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _holder(held: dict[str, Any]) -> str:
    return f"process {held.get('pid', '?')} on {held.get('host', 'another machine')} since {held.get('since', '?')}"
