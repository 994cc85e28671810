"""Push and pull against plain copies of the same files, in one run: what verification, resuming and naming cost."""

from __future__ import annotations

import os
import shutil
import time

import pytest

from pesc.store import Store
from pesc.store import remote as remote_module
from tests.store.bucket import new_bucket, start_server
from tests.store.builders import made

COUNT, SIZE = 12, 24 << 20


def seconds_of(action) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    pytest.importorskip("moto")
    server = start_server(tmp_path)
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    yield new_bucket(server)
    server.stop()


def report(name, moved, plain):
    megabytes = COUNT * SIZE / 1e6
    print(f"\n{name}: {megabytes / moved:.0f} MB/s, plain copy {megabytes / plain:.0f} MB/s, {plain / moved:.2f} of it")


@pytest.mark.benchmark
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", ["bucket", "directory"])
def test_push_and_pull_keep_most_of_a_plain_copy_s_speed(kind, tmp_path, request, monkeypatch):
    monkeypatch.setattr(remote_module, "_OPEN", {})
    if kind == "bucket":
        s3 = request.getfixturevalue("bucket")
        url, files = s3.url, s3.files

        def plain_push(source, name):
            files.put([str(p) for p in sorted(source.iterdir())], [f"{s3.name}/{name}/{p.name}" for p in sorted(source.iterdir())])

        def plain_pull(name, target):
            files.get(files.find(f"{s3.name}/{name}"), [f"{target}/{n}" for n in range(COUNT)])
    else:
        (tmp_path / "remote").mkdir()
        url = str(tmp_path / "remote")

        def plain_push(source, name):
            shutil.copytree(source, tmp_path / name)
            os.sync()

        def plain_pull(name, target):
            shutil.copytree(tmp_path / name, target, dirs_exist_ok=True)
            os.sync()

    def tree():
        return {f"shard-{n}": os.urandom(SIZE) for n in range(COUNT)}

    here, there = Store(tmp_path / "here", url), Store(tmp_path / "there", url)
    warm = made(here, {"warm": b"up"}, kind="warm")
    here.share(warm)
    there.open(warm.ref)
    manifest = made(here, tree())
    source = here.object_path(manifest.output.digest)
    plain = seconds_of(lambda: plain_push(source, "plain"))
    pushed = seconds_of(lambda: here.share(manifest, is_trusted=True))
    report(f"push to a {kind}", pushed, plain)
    (tmp_path / "target").mkdir()
    plain_back = seconds_of(lambda: plain_pull("plain", tmp_path / "target"))
    pulled = seconds_of(lambda: there.open(manifest.ref))
    report(f"pull from a {kind}", pulled, plain_back)
    assert plain / pushed > 0.7
    assert plain_back / pulled > 0.4, "a pull hashes and syncs every file"
