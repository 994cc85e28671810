"""Who builds, among machines that have only a remote in common."""

import contextlib
import json
import logging
import os
import subprocess
import sys
import threading
import time

import pytest

from pesc.errors import StoreBusyError
from pesc.store import Store, lease
from pesc.store import remote as remote_module
from pesc.store.lease import Claim, hold_lease
from pesc.store.patience import Patience
from pesc.store.remote import open_remote
from tests.store.builders import made

CLAIM = Claim("mix", "a" * 64, "mix tiny aaaaaaaa", seconds=0.6)


@pytest.fixture
def remote(remote_url, monkeypatch):
    monkeypatch.setattr(remote_module, "_OPEN", {})
    monkeypatch.setattr(lease, "POLL_SECONDS", (0.05, 0.1))
    return open_remote(remote_url)


def plant(remote, number=0, **changes):
    """A lease as another machine would have written it."""
    body = {
        "host": "node7",
        "pid": 4711,
        "machine": "node7/boot/1",
        "token": "t",
        "since": "2026-01-01T00:00:00+00:00",
        "seconds": 1.0,
        **changes,
    }
    remote.place.write(f"{CLAIM.folder}/{number}", json.dumps(body).encode())


def test_it_is_there_while_it_is_held_and_is_renewed(remote):
    with hold_lease(remote, CLAIM, Patience(), until_found=True):
        (name,) = remote.place.names("leases")
        assert name == f"{CLAIM.folder}/0"
        first = json.loads(remote.place.read(name))
        assert first["pid"] == os.getpid()
        time.sleep(0.5)
        assert json.loads(remote.place.read(name))["beat"] >= 1
    assert json.loads(remote.place.read(name))["released"] is True
    with hold_lease(remote, CLAIM, Patience(0.1), until_found=True):
        assert remote.place.names("leases") == [f"{CLAIM.folder}/1"]


def test_the_others_wait_and_one_after_another_gets_it(remote):
    running, overlaps, order = [], [], []

    def work(number):
        with hold_lease(remote, CLAIM, Patience(), until_found=True):
            overlaps.append(len(running))
            running.append(number)
            time.sleep(0.1)
            running.remove(number)
            order.append(number)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(order) == list(range(5))
    assert overlaps == [0] * 5


def test_a_held_one_is_waited_for_to_the_limit_and_named(remote, caplog):
    heard = []
    with hold_lease(remote, CLAIM, Patience(), until_found=True), caplog.at_level(logging.WARNING):  # noqa: SIM117
        with (
            pytest.raises(
                StoreBusyError, match=rf"process {os.getpid()} on .* since .*; waited 0?[1-9]? s for it.*execution\.wait_seconds"
            ),
            hold_lease(remote, CLAIM, Patience(1.2, lambda waited, holder: heard.append((waited, holder))), until_found=True),
        ):
            pytest.fail("it is held")
    assert f"process {os.getpid()} on" in heard[-1][1]
    assert "its result is waited for" in caplog.text


def test_one_that_is_not_renewed_is_taken_over(remote, caplog):
    plant(remote, number=3)
    started = time.monotonic()
    with hold_lease(remote, CLAIM, Patience(30), until_found=True):
        assert time.monotonic() - started >= 0.6
        assert remote.place.names("leases") == [f"{CLAIM.folder}/4"]
    assert "process 4711 on node7 since 2026-01-01T00:00:00+00:00, which has gone" in caplog.text


def test_one_of_a_process_of_this_machine_that_has_ended_is_taken_over_at_once(remote):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    plant(remote, pid=ended.pid, machine=lease.machine(), seconds=600)
    with hold_lease(remote, CLAIM, Patience(0.5), until_found=True):
        assert remote.place.names("leases") == [f"{CLAIM.folder}/1"]


def test_one_that_is_renewed_is_never_taken_over(remote):
    ended = threading.Event()

    def renew():
        beat = 0
        while not ended.wait(0.2):
            beat += 1
            plant(remote, beat=beat)

    plant(remote)
    thread = threading.Thread(target=renew)
    thread.start()
    try:
        with pytest.raises(StoreBusyError, match="process 4711 on node7"), hold_lease(remote, CLAIM, Patience(1.5), until_found=True):
            pytest.fail("it is held")
    finally:
        ended.set()
        thread.join()


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"seconds": "long", "pid": "x"}', b'{"seconds": 1e300}'])
def test_one_that_says_nothing_that_can_be_read_expires_too(remote, body, monkeypatch):
    monkeypatch.setattr(lease, "LEASE_SECONDS", 0.5)
    monkeypatch.setattr(lease, "LONGEST_SECONDS", 0.5)
    remote.place.write(f"{CLAIM.folder}/0", body)
    with hold_lease(remote, CLAIM, Patience(30), until_found=True):
        assert remote.place.names("leases") == [f"{CLAIM.folder}/1"]


def test_of_many_that_take_over_one_does(remote):
    plant(remote)
    inside, most = [], []

    def work():
        with hold_lease(remote, CLAIM, Patience(60), until_found=True):
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.05)
            inside.pop()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert most == [1] * 8


def test_who_waits_for_a_result_goes_on_when_it_is_there(remote, tmp_path):
    store = Store(tmp_path / "store", remote.url)
    manifest = made(store, {"data": b"rows"})
    claim = Claim("mix", manifest.fingerprint, "mix")
    remote.place.write(f"{claim.folder}/0", b"{}")

    def share():
        time.sleep(0.5)
        store.share(manifest)

    thread = threading.Thread(target=share)
    thread.start()
    with hold_lease(remote, claim, Patience(30), until_found=True):
        assert remote.manifest("mix", manifest.fingerprint) == manifest
        assert remote.place.names("leases") == [f"{claim.folder}/0"], "it has none of its own"
    thread.join()


def test_nothing_is_left_of_it_when_the_result_is_there(remote, tmp_path):
    store = Store(tmp_path / "store", remote.url)
    manifest = made(store, {"data": b"rows"})
    with hold_lease(remote, Claim("mix", manifest.fingerprint, "mix"), Patience(), until_found=True):
        store.share(manifest)
    assert remote.place.names("leases") == []


def test_a_refresh_waits_for_the_lease_and_not_for_the_result(remote, tmp_path):
    store = Store(tmp_path / "store", remote.url)
    manifest = made(store, {"data": b"rows"})
    store.share(manifest)
    with hold_lease(remote, Claim("mix", manifest.fingerprint, "mix"), Patience(), until_found=False):
        assert remote.place.names("leases")


def test_an_error_inside_ends_it(remote):
    with contextlib.suppress(ZeroDivisionError), hold_lease(remote, CLAIM, Patience(), until_found=True):
        raise ZeroDivisionError
    (name,) = remote.place.names("leases")
    assert json.loads(remote.place.read(name))["released"] is True
    assert not [t for t in threading.enumerate() if t.name == "pesc-lease"]
