"""Workers in processes of their own: separate disks and one bucket, or one disk; killed at any point, eight at once."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import yaml

from pesc.store import Store
from pesc.store.maintenance import fsck
from tests.fake_stages import tiny_recipe_dict
from tests.store.bucket import ROOT
from tests.store.builders import made

MB = 1 << 20


class Workers:
    """Starts workers, and waits for them; what is still there at the end is killed."""

    def __init__(self, folder: Path, **environment: str) -> None:
        self.folder, self.trace = folder, folder / "trace"
        self.recipe = folder / "tiny.yaml"
        self.recipe.write_text(yaml.safe_dump(tiny_recipe_dict(folder / "sources")))
        self.environment = {"PYTHONPATH": str(ROOT), "TRACE": str(self.trace), **environment}
        self.started: list[subprocess.Popen[str]] = []

    def start(self, what: str, store: Path, **environment: str) -> subprocess.Popen[str]:
        rest = [str(self.recipe)] if what == "run" else []
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.store.worker", what, str(store), *rest], cwd=ROOT, text=True, env={**os.environ, **self.environment, **environment},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        self.started.append(process)
        return process

    def finish(self, process: subprocess.Popen[str]) -> tuple[dict, str]:
        out, err = process.communicate(timeout=240)
        assert process.returncode == 0, err
        return (json.loads(out) if out else {}), err

    def built(self) -> Counter[str]:
        return Counter(self.trace.read_text().split()) if self.trace.exists() else Counter()

    def stop(self) -> None:
        for process in self.started:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


@pytest.fixture
def workers(tmp_path):
    made_workers = Workers(tmp_path)
    yield made_workers
    made_workers.stop()


def wait_until(condition, process: subprocess.Popen[str], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end
        time.sleep(0.02)


def settled(measure, still_seconds: float = 1.0) -> int:
    """What is measured, once it has not changed for a while."""
    value, since = measure(), time.monotonic()
    while time.monotonic() - since < still_seconds:
        time.sleep(0.1)
        if (now := measure()) != value:
            value, since = now, time.monotonic()
    return value


def kill(process: subprocess.Popen[str]) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.slow
def test_a_second_worker_builds_nothing_and_each_file_moves_once(workers, bucket, tmp_path):
    first, _ = workers.finish(workers.start("run", tmp_path / "first", PESC_REMOTE=bucket.url))
    assert set(workers.built().values()) == {1}
    sent = bucket.moved("PUT")
    assert sent
    assert set(sent.values()) == {1}
    assert not bucket.moved("GET")
    second, _ = workers.finish(workers.start("run", tmp_path / "second", PESC_REMOTE=bucket.url))
    assert {how for _, how in second.values()} == {"hit"}
    assert {a: digest for a, (digest, _) in first.items()} == {a: digest for a, (digest, _) in second.items()}
    assert workers.built() == Counter(list(first))
    assert not bucket.moved("GET"), "nothing was read, so nothing is pulled"
    assert not (tmp_path / "second" / "objects").exists()
    assert bucket.moved("PUT") == sent
    workers.finish(workers.start("pull", tmp_path / "second", PESC_REMOTE=bucket.url))
    assert bucket.moved("GET") == Counter({sha: 1 for sha, count in bucket.moved("GET").items() if count})
    assert set(bucket.moved("GET")) <= set(sent)
    report = fsck(Store(tmp_path / "second"))
    assert report.is_clean
    assert report.num_objects == len({digest for digest, _ in first.values()})
    assert fsck(Store(tmp_path / "first")).is_clean


@pytest.mark.slow
def test_a_worker_pulls_what_it_reads_and_no_more(workers, bucket, tmp_path):
    first, _ = workers.finish(workers.start("run", tmp_path / "first", PESC_REMOTE=bucket.url))
    recipe = yaml.safe_load(workers.recipe.read_text())
    recipe["evaluate"]["benchmarks"]["exam"] = {"task": "arc_challenge", "metric": "acc"}
    workers.recipe.write_text(yaml.safe_dump(recipe))
    second, _ = workers.finish(workers.start("run", tmp_path / "second", PESC_REMOTE=bucket.url))
    assert {address for address, (_, how) in second.items() if how == "built"} == {"evaluate[pesc/exam]", "evaluate[qlora/exam]", "report"}
    here = {path.name for path in (tmp_path / "second" / "objects").iterdir()}
    read_by_report = {a for a in first if a.startswith(("dedup", "mix", "tokenize", "train", "merge", "evaluate", "routing"))}
    assert here == {digest for a, (digest, _) in second.items() if a in read_by_report or second[a][1] == "built"}
    assert set(bucket.moved("GET").values()) == {1}


@pytest.mark.slow
@pytest.mark.parametrize("disks", ["one disk", "separate disks"])
def test_of_eight_at_once_each_action_is_built_once_and_all_succeed(workers, tmp_path, disks, request):
    environment = {"BUILD_SECONDS": "0.2"}
    if disks == "separate disks":
        environment["PESC_REMOTE"] = request.getfixturevalue("bucket").url
    stores = [tmp_path / (f"disk-{n}" if disks == "separate disks" else "disk") for n in range(8)]
    results = [workers.finish(process) for process in [workers.start("run", store, **environment) for store in stores]]
    digests = [{address: digest for address, (digest, _) in outcomes.items()} for outcomes, _ in results]
    assert all(found == digests[0] for found in digests)
    assert workers.built() == Counter(digests[0].keys())
    assert any("is being done by process" in err and "its result is waited for" in err for _, err in results)
    for store in set(stores):
        report = fsck(Store(store, remote=None))
        assert report.is_clean
        assert report.leftovers == []
    if disks == "separate disks":
        assert set(request.getfixturevalue("bucket").moved("PUT").values()) == {1}


def big_object(store: Store, count: int, size: int = MB // 2):
    return made(store, {f"shard-{n:02d}": os.urandom(size) for n in range(count)})


@pytest.mark.slow
def test_a_push_that_is_killed_goes_on_where_it_was(workers, bucket, tmp_path):
    store = Store(tmp_path / "here", bucket.url)
    manifest = big_object(store, 24)
    bucket.slow(0.3)
    process = workers.start("push", store.root, PESC_REMOTE=bucket.url, THREADS="3")
    wait_until(lambda: len(bucket.moved("PUT")) >= 6, process)
    kill(process)
    time.sleep(0.5)  # what the server has received it may still write
    complete = bucket.moved("PUT")
    assert 6 <= len(complete) < 24
    assert Store(tmp_path / "there", bucket.url).find("mix", manifest.fingerprint) is None, "no manifest, no action"
    bucket.slow(None)
    workers.finish(workers.start("push", store.root, PESC_REMOTE=bucket.url))
    sent = bucket.moved("PUT")
    assert len(sent) == 24
    assert {sha: sent[sha] for sha in complete} == complete, "what was complete was not sent again"
    path = Store(tmp_path / "there", bucket.url).open(manifest.ref)
    assert path.name == manifest.output.digest
    assert fsck(Store(tmp_path / "there")).is_clean


@pytest.mark.slow
def test_a_pull_that_is_killed_goes_on_where_it_was_within_a_file_too(workers, bucket, tmp_path):
    store, there = Store(tmp_path / "here", bucket.url), tmp_path / "there"
    manifest = made(store, {"shard": os.urandom(24 * MB), "config": b"{}"})
    store.share(manifest)
    bucket.slow(0.2)
    process = workers.start("pull", there, PESC_REMOTE=bucket.url, THREADS="2", PIECE=str(MB))
    notes = there / "work" / "pull" / manifest.output.digest / "parts"

    def pieces():
        return sum(len(path.read_text().split()) for path in notes.glob("*.pieces"))

    wait_until(lambda: pieces() >= 8, process)
    kill(process)
    have = pieces()
    assert 8 <= have < 24
    assert not (there / "objects").exists()
    assert fsck(Store(there)).is_clean
    before = settled(lambda: bucket.moved_bytes("GET"))  # what the killed process had asked for is still being sent
    bucket.slow(None)
    workers.finish(workers.start("pull", there, PESC_REMOTE=bucket.url, PIECE=str(MB)))
    assert bucket.moved_bytes("GET") - before <= (24 - have) * MB + 2
    assert fsck(Store(there)).is_clean
    assert Store(there, remote=None).find("mix", manifest.fingerprint) == manifest


@pytest.mark.slow
def test_killed_again_and_again_a_pull_ends_and_is_whole(workers, bucket, tmp_path):
    store, there = Store(tmp_path / "here", bucket.url), tmp_path / "there"
    manifest = big_object(store, 16)
    store.share(manifest)
    bucket.slow(0.1)
    work, kills, chance = there / "work" / "pull" / manifest.output.digest, 0, random.Random(8)

    def progress():
        with contextlib.suppress(OSError):  # files come and go
            notes = sum(len(path.read_text().split()) for path in (work / "parts").glob("*.pieces"))
            return notes + 2 * len(list((work / "out").glob("*")))
        return 0

    for _ in range(20):
        before = progress()
        process = workers.start("pull", there, PESC_REMOTE=bucket.url, THREADS="2", PIECE=str(MB // 4))
        while process.poll() is None and progress() < before + 4:
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.3))
        if process.poll() is not None:
            workers.finish(process)
            break
        kill(process)
        kills += 1
        assert fsck(Store(there)).is_clean
    assert kills >= 3
    assert Store(there, remote=None).find("mix", manifest.fingerprint) == manifest
    assert fsck(Store(there)).is_clean


@pytest.mark.slow
def test_a_killed_builder_s_lease_is_taken_over(workers, bucket, tmp_path):
    environment = {"PESC_REMOTE": bucket.url, "LEASE_SECONDS": "3"}
    process = workers.start("run", tmp_path / "first", BUILD_SECONDS="60", **environment)
    wait_until(lambda: any(name.startswith("leases/") for name in bucket.names()), process)
    kill(process)
    for name in [name for name in bucket.names() if name.startswith("leases/")]:  # as if it had been another machine
        place = f"{bucket.name}/pesc/{name}"
        bucket.files.pipe_file(place, json.dumps({**json.loads(bucket.files.cat_file(place)), "machine": "another"}).encode())
    started = time.monotonic()
    outcomes, err = workers.finish(workers.start("run", tmp_path / "second", **environment))
    assert time.monotonic() - started >= 3
    assert {how for _, how in outcomes.values()} == {"built"}
    assert f"was being done by process {process.pid} on" in err
    assert not [name for name in bucket.names() if name.startswith("leases/")]
