"""Where a remote lies: whole or absent, created once, and every failure a sentence."""

import os
import stat
import subprocess
import sys
import threading
import time

import pytest

from pesc.errors import RemoteError, TransientRemoteError
from pesc.store import places
from pesc.store.machine import machine_mark
from pesc.store.places import Stopped, open_place


@pytest.fixture
def place(remote_url, monkeypatch):
    monkeypatch.setattr(places, "FIRST_WAIT_SECONDS", 0.01)
    return open_place(remote_url)


def test_what_is_written_is_read_and_listed_and_removed(place):
    assert place.read("a/b") is None
    assert place.size("a/b") is None
    assert place.names("a") == []
    place.write("a/b", b"one")
    place.write("a/b", b"three")
    assert place.read("a/b") == b"three"
    assert place.size("a/b") == 5
    assert place.read_range("a/b", 1, 3) == b"hr"
    assert place.names("a") == ["a/b"]
    place.remove("a/b")
    place.remove("a/b")
    assert place.read("a/b") is None


def test_a_name_is_created_once(place):
    assert place.create("x", b"first")
    assert not place.create("x", b"second")
    assert place.read("x") == b"first"


def test_of_many_that_create_at_the_same_moment_one_is_told_so(place):
    place.read("x")
    told = []
    threads = [threading.Thread(target=lambda n=n: told.append((n, place.create("x", str(n).encode())))) for n in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winners = [n for n, won in told if won]
    assert len(winners) == 1
    assert place.read("x") == str(winners[0]).encode()


def test_a_file_is_sent_with_its_bytes_counted(place, tmp_path):
    source = tmp_path / "source"
    source.write_bytes(os.urandom(40 << 20))
    counted = []
    place.upload(source, "files/f", counted.append)
    assert sum(counted) == 40 << 20
    assert place.size("files/f") == 40 << 20
    assert place.read_range("files/f", (40 << 20) - 7, (40 << 20) + 5) == source.read_bytes()[-7:]
    assert not place.read_range("files/f", 41 << 20, 42 << 20)


def test_a_stopped_upload_leaves_nothing(place, tmp_path):
    if place.url.startswith("memory:"):
        pytest.skip("memory:// writes in place; it is no place of a real remote")
    source = tmp_path / "source"
    source.write_bytes(os.urandom(40 << 20))

    def stop(more):
        if more > 0:
            raise Stopped

    with pytest.raises(Stopped):
        place.upload(source, "files/f", stop)
    assert place.size("files/f") is None
    assert place.names("files") == []


def test_a_directory_s_files_are_read_only_and_a_killed_writer_s_rest_is_removed(tmp_path):
    place = open_place(str(tmp_path))
    (tmp_path / "files").mkdir()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    rest, other = (tmp_path / "files" / f".f.{machine_mark()}.{pid}.ab" for pid in (dead.pid, os.getpid()))
    rest.write_bytes(b"half")
    other.write_bytes(b"half")
    (tmp_path / "source").write_bytes(b"whole")
    place.upload(tmp_path / "source", "files/f", lambda _n: None)
    assert not rest.exists()
    assert other.exists(), "its writer lives"
    assert stat.S_IMODE((tmp_path / "files" / "f").stat().st_mode) == 0o444
    assert place.names("files") == ["files/f"]


def test_the_upload_of_another_container_with_this_host_s_name_is_left_alone_for_a_week(tmp_path, monkeypatch):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    monkeypatch.setattr("os.getpid", lambda: dead.pid)  # as this machine sees a process of another one's numbers
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr("pesc.store.places.machine_mark", lambda: "another")
        theirs = open_place(str(tmp_path))._new_file("files/f")
        _, coming = theirs.__enter__()
        coming.write_bytes(b"half")
    place = open_place(str(tmp_path))
    place.write("files/f", b"mine")
    assert coming.exists()
    os.utime(coming, (time.time() - 8 * 86_400,) * 2)
    place.write("files/f", b"mine")
    assert not coming.exists()


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("s3://user:secret@bucket/x", "holds a name or a password"),
        ("ftp://host/x", "unknown scheme"),
        ("remote", "must be an absolute path"),
        ("s3:///x", "of the form s3://bucket/path"),
        ("s3://bucket/x?versionId=3", "of the form s3://bucket/path"),
    ],
)
def test_a_url_that_cannot_be_one_is_refused(url, told):
    with pytest.raises(RemoteError, match=told) as caught:
        open_place(url)
    assert "secret" not in str(caught.value)


def test_a_missing_directory_is_a_sentence_and_is_not_made(tmp_path):
    place = open_place(str(tmp_path / "unmounted"))
    for call in (lambda: place.read("x"), lambda: place.create("x", b""), lambda: place.names("x"), lambda: place.size("x")):
        with pytest.raises(RemoteError, match=r"no such directory\. Mount it"):
            call()
    assert not (tmp_path / "unmounted").exists()


def test_a_missing_bucket_is_a_sentence(bucket, tmp_path):
    place = open_place("s3://nobody-made-this/pesc")
    (tmp_path / "f").write_bytes(b"x")
    for call in (
        lambda: place.read("x"), lambda: place.create("x", b""), lambda: place.names("x"), lambda: place.size("x"),
        lambda: place.upload(tmp_path / "f", "x", lambda _n: None),
    ):  # fmt: skip
        with pytest.raises(RemoteError, match=r"s3://nobody-made-this/pesc is not there: no such bucket"):
            call()


def test_no_credentials_are_a_sentence(bucket, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(RemoteError, match=r"refuses access.*give credentials"):
        open_place(bucket.url).write("x", b"y")


def test_a_server_that_is_gone_is_tried_again_and_then_a_sentence(monkeypatch, bucket):
    monkeypatch.setattr(places, "FIRST_WAIT_SECONDS", 0.01)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(TransientRemoteError, match=r"did not answer in 5 tries \(.*Without PESC_REMOTE"):
        open_place(bucket.url).read("x")


def test_a_busy_server_is_asked_again(bucket, monkeypatch):
    monkeypatch.setattr(places, "FIRST_WAIT_SECONDS", 0.01)
    place = open_place(bucket.url)
    place.write("x", b"y")
    (bucket.server.folder / "busy").write_text("3")
    assert place.read("x") == b"y"
    assert [r["status"] for r in bucket.requests()].count(503) == 3


def test_a_driver_that_is_not_installed_is_named():
    code = (
        "import sys; sys.modules['s3fs'] = None\nfrom pesc.store.places import open_place\nfrom pesc.errors import RemoteError\n"
        "try: open_place('s3://bucket/x').read('y')\nexcept RemoteError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "The remote s3://bucket/x needs the package s3fs, which is not installed: pip install 'pesc[s3]'.\n"
