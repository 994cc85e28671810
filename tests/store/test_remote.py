"""Two stores that meet in a remote: what one has made the other finds, pulls when it reads, and believes only when it is right."""

import json
import os
from pathlib import Path

import pytest

from pesc.errors import RemoteError, StoreError
from pesc.store import Store, remote
from pesc.store.digest import digest_json
from pesc.store.maintenance import fsck
from pesc.store.manifest import Manifest
from pesc.store.remote import file_name, open_remote
from tests.store.builders import made


@pytest.fixture(autouse=True)
def _nothing_remembered(monkeypatch):
    monkeypatch.setattr(remote, "_OPEN", {})


@pytest.fixture
def here(tmp_path, remote_url):
    return Store(tmp_path / "here", remote_url)


@pytest.fixture
def there(tmp_path, remote_url):
    """Another machine's store, with the same remote."""
    return Store(tmp_path / "there", remote_url)


def another_process(monkeypatch):
    """What was remembered of remotes is gone."""
    monkeypatch.setattr(remote, "_OPEN", {})


FILES = {"data.bin": b"rows" * 1000, "nested/empty": b"", "nested/same": b"rows" * 1000}


def test_what_one_machine_shares_another_finds_and_pulls_when_it_reads(here, there):
    manifest = made(here, FILES, records={"log.txt": b"built\n", "tensorboard/events": b"e"})
    assert there.find("mix", manifest.fingerprint) is None
    assert here.owes(manifest)
    assert here.share(manifest) == manifest
    assert not here.owes(manifest)
    found = there.find("mix", manifest.fingerprint)
    assert found == manifest
    assert not there.root.exists(), "a HIT takes the manifest alone, and writes nothing"
    path = there.open(found.ref)
    assert {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file()} == FILES
    assert all(p.stat().st_mode & 0o222 == 0 for p in path.rglob("*") if p.is_file())
    assert (there.action_path("mix", manifest.fingerprint) / "tensorboard" / "events").read_bytes() == b"e"
    report = fsck(there)
    assert report.is_clean
    assert report.leftovers == []
    assert there.alone().find("mix", manifest.fingerprint) == manifest
    assert not there.owes(manifest)


def test_the_manifest_comes_last_and_without_it_there_is_nothing(here, there, monkeypatch):
    manifest = made(here, FILES)

    def refuse(*_a, **_k):
        raise RemoteError("the power is gone")

    with monkeypatch.context() as patch:
        patch.setattr(remote.Remote, "commit", refuse)
        with pytest.raises(RemoteError, match="the power is gone"):
            here.share(manifest)
    assert here.owes(manifest)
    assert there.find("mix", manifest.fingerprint) is None


def test_what_is_equal_is_sent_once_and_linked_on_this_disk(here, there):
    dense = os.urandom(3 << 20)
    model, sparse = made(here, {"model": dense}), made(here, {"model": dense, "bank": b"bank"}, kind="sparse")
    here.share(model)
    place = open_remote(here.remote.url).place
    sent = []
    original = type(place).upload
    type(place).upload = lambda self, path, name, on_bytes: (sent.append(name), original(self, path, name, on_bytes))[1]
    try:
        here.share(sparse)
    finally:
        type(place).upload = original
    assert len(sent) == 1
    first, second = there.open(model.ref), there.open(sparse.ref)
    assert (first / "model").stat().st_ino == (second / "model").stat().st_ino
    assert fsck(there).is_clean


def test_an_equal_file_that_is_damaged_here_is_pulled_and_not_linked(here, there):
    model, sparse = made(here, {"model": b"m" * 100}), made(here, {"model": b"m" * 100, "bank": b"bank"}, kind="sparse")
    here.share(model)
    here.share(sparse)
    path = there.open(model.ref) / "model"
    path.chmod(0o644)
    path.write_bytes(b"x" * 100)
    assert (there.open(sparse.ref) / "model").read_bytes() == b"m" * 100


def test_an_object_that_lost_a_file_is_pulled_again(here, there):
    manifest = made(here, FILES)
    here.share(manifest)
    (there.open(manifest.ref) / "data.bin").unlink()
    assert there.find("mix", manifest.fingerprint) == manifest
    assert (there.open(manifest.ref) / "data.bin").read_bytes() == FILES["data.bin"]
    assert fsck(there).is_clean


@pytest.mark.parametrize("pieces", ["0", "0\n8"], ids=["some of it", "all of it"])
def test_bytes_that_a_power_loss_took_from_a_pull_are_not_the_remote_s_fault(here, there, pieces, monkeypatch, caplog):
    """A note of a piece may be on the disk when the piece is not."""
    monkeypatch.setattr("pesc.store.transfer.PIECE", 8)
    manifest = made(here, {"data.bin": b"rows of data"})
    here.share(manifest)
    sha256, parts = manifest.output.files[0].sha256, there.root / "work" / "pull" / manifest.output.digest / "parts"
    parts.mkdir(parents=True)
    (parts / sha256).write_bytes(bytes(12))
    (parts / f"{sha256}.pieces").write_text(pieces)
    assert (there.open(manifest.ref) / "data.bin").read_bytes() == b"rows of data"
    assert "the whole file is fetched again" in caplog.text
    assert there.remote.damaged() == set()


def test_what_is_damaged_there_is_said_so_also_after_an_earlier_pull(here, there, monkeypatch):
    monkeypatch.setattr("pesc.store.transfer.PIECE", 8)
    manifest = made(here, {"data.bin": b"rows of data"})
    here.share(manifest)
    sha256, parts = manifest.output.files[0].sha256, there.root / "work" / "pull" / manifest.output.digest / "parts"
    here.remote.place.write(file_name(sha256), b"rows of DATA")
    parts.mkdir(parents=True)
    (parts / sha256).write_bytes(b"rows of ")
    (parts / f"{sha256}.pieces").write_text("0")
    with pytest.raises(RemoteError, match="has other bytes than its name says"):
        there.open(manifest.ref)
    assert there.remote.damaged() == {sha256}


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda place, name: place.write(name, b"ROWS" * 1000), "has other bytes than its name says"),
        (lambda place, name: place.write(name, b"rows"), "is shorter than its manifest says"),
        (lambda place, name: place.remove(name), "is not there"),
    ],
    ids=["other bytes", "shorter", "gone"],
)
def test_a_damaged_file_is_refused_by_name_and_mended_by_the_next_push(here, there, damage, told):
    from pesc.mirror import push

    manifest = made(here, FILES)
    here.share(manifest)
    name = file_name(next(f.sha256 for f in manifest.output.files if f.path == "data.bin"))
    damage(here.remote.place, name)
    with pytest.raises(RemoteError, match=rf"(data\.bin|nested/same) cannot be pulled: .*{name} {told}.*`pesc push` from a machine"):
        there.open(manifest.ref)
    assert not there.object_path(manifest.output.digest).exists()
    assert there.alone().find("mix", manifest.fingerprint) is None
    assert push(here, [manifest]).num_files == 1
    assert (there.open(manifest.ref) / "data.bin").read_bytes() == FILES["data.bin"]
    assert push(here, [manifest]).num_files == 0


def test_a_file_that_is_damaged_here_does_not_spread(here, there):
    manifest = made(here, {"data.bin": b"rows" * 1000})
    path = here.object_path(manifest.output.digest) / "data.bin"
    path.chmod(0o644)
    path.write_bytes(b"ROWS" * 1000)
    with pytest.raises(StoreError, match=r"data\.bin is damaged or gone, and was not sent.*fsck --repair"):
        here.share(manifest)
    assert there.find("mix", manifest.fingerprint) is None


def test_a_lost_log_does_not_keep_a_result_at_home(here, there):
    manifest = made(here, FILES, records={"log.txt": b"one", "events.jsonl": b"two"})
    (here.action_path("mix", manifest.fingerprint) / "log.txt").unlink()
    here.share(manifest)
    there.open(manifest.ref)
    assert [file.path for file in there.find("mix", manifest.fingerprint).records] == ["events.jsonl"]


def test_the_first_writer_s_result_stands_and_is_used_by_the_second(here, there):
    first, second = made(here, {"data": b"first"}), made(there, {"data": b"second"})
    assert first.fingerprint == second.fingerprint
    here.share(first)
    assert there.find("mix", second.fingerprint) == second
    assert there.share(second).output.digest == first.output.digest
    assert there.find("mix", second.fingerprint) == first
    assert (there.open(first.ref) / "data").read_bytes() == b"first"
    assert not there.owes(first)


def test_a_newer_refresh_replaces_the_result_for_everybody(here, there, monkeypatch):
    old = made(here, {"data": b"old"})
    here.share(old)
    there.open(old.ref)
    new = made(here, {"data": b"new"}, refreshed=True, started_at="2026-01-02T00:00:00+00:00")
    assert here.share(new) == new
    another_process(monkeypatch)
    assert there.find("mix", old.fingerprint) == new
    assert (there.open(new.ref) / "data").read_bytes() == b"new"
    assert there.alone().find("mix", old.fingerprint) == new
    older = made(there, {"data": b"older"}, refreshed=True, started_at="2026-01-01T12:00:00+00:00")
    assert there.share(older) == new, "a refresh that began before the one that stands does not replace it"


def test_a_refresh_with_the_same_bytes_changes_nothing(here, there):
    old = made(here, {"data": b"old"})
    here.share(old)
    new = made(here, {"data": b"old"}, refreshed=True, started_at="2026-01-02T00:00:00+00:00")
    assert here.share(new).output.digest == old.output.digest
    assert here.remote.place.names("replaced") == []


def test_a_remote_of_a_newer_format_is_refused(here, there):
    here.share(made(here, FILES))
    here.remote.place.write("format", b"7\n")
    remote._OPEN.clear()
    with pytest.raises(RemoteError, match=r"has the format '7', and this pesc knows 1\. Use a newer pesc"):
        there.find("mix", "a" * 64)


# -- nothing leaves its folder ---------------------------------------------------------------------------------------------------


def plant(store: Store, manifest: Manifest, change) -> None:
    """Share an action and change its manifest in the remote; its digest is made to fit, so that only the paths can be refused."""
    store.share(manifest)
    data = manifest.model_dump(mode="json")
    change(data)
    output = data["output"]
    if output["digest"] == manifest.output.digest:
        output["digest"] = digest_json(sorted([f["path"], f["size"], f["sha256"]] for f in output["files"]))
        output["size_bytes"] = sum(f["size"] for f in output["files"])
    store.remote.place.write(f"actions/mix/{manifest.fingerprint}.json", json.dumps(data).encode())
    remote._OPEN.clear()


def renamed(path):
    def change(data):
        data["output"]["files"][0]["path"] = path

    return change


def record(path):
    def change(data):
        data["records"] = [{**data["output"]["files"][0], "path": path}]

    return change


def two_of_one_name(data):
    data["output"]["files"].append(data["output"]["files"][0])


def file_and_folder(data):
    data["output"]["files"].append({**data["output"]["files"][0], "path": data["output"]["files"][0]["path"] + "/below"})


def foreign_digest(data):
    data["output"]["digest"] = "../../../escaped"


def other_digest(data):
    data["output"]["digest"] = "0" * 64


def other_action(data):
    data["key"]["config"] = {"another": 1}


def no_digest(data):
    data["output"]["files"][0]["sha256"] = "../../../../escaped"


@pytest.mark.parametrize(
    "change",
    [
        *map(renamed, ["../escaped", "/tmp/escaped", "a/../../escaped", "a//b", "./a", "a/.", "..", "", "a\0b"]),
        *map(record, ["../escaped", "/escaped", "manifest.json", "prefect.json/x", "remotes.json"]),
        two_of_one_name, file_and_folder, foreign_digest, other_digest, other_action, no_digest,
    ],
)  # fmt: skip
def test_a_manifest_that_would_leave_its_folder_is_refused_before_anything_is_written(change, tmp_path):
    (tmp_path / "remote").mkdir()
    here, there = (Store(tmp_path / name, str(tmp_path / "remote")) for name in ("here", "there"))
    plant(here, made(here, {"data.bin": b"rows"}), change)
    before = sorted(tmp_path.rglob("*"))
    fingerprint = next(key[1] for key in here.remote.actions())
    with pytest.raises(
        RemoteError,
        match=r"The manifest .*\.json is (damaged, or|not believed).*(outside of its folder|the store's own|comes twice|file and a folder|no name|"
        r"digest|another action|SHA-256).*Remove it there",
    ):
        there.find("mix", fingerprint)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_link_in_the_remote_or_in_the_workspace_gives_nothing_away(tmp_path):
    (tmp_path / "remote").mkdir()
    here, there = (Store(tmp_path / name, str(tmp_path / "remote")) for name in ("here", "there"))
    manifest = made(here, {"data.bin": b"rows"})
    here.share(manifest)
    (tmp_path / "secret").write_bytes(b"word")
    file = tmp_path / "remote" / file_name(manifest.output.files[0].sha256)
    file.unlink()
    file.symlink_to(tmp_path / "secret")
    with pytest.raises(RemoteError, match="other bytes than its name says"):
        there.open(manifest.ref)
    file.unlink()
    file.write_bytes(b"rows")
    out = there.root / "work" / "pull" / manifest.output.digest / "out"
    out.mkdir(parents=True, exist_ok=True)
    (out / "data.bin").symlink_to(tmp_path / "secret")
    assert (there.open(manifest.ref) / "data.bin").read_bytes() == b"rows"
    assert not (there.open(manifest.ref) / "data.bin").is_symlink()
    assert (tmp_path / "secret").read_bytes() == b"word"


def test_the_marks_are_of_one_remote(here, there, tmp_path):
    manifest = made(here, FILES)
    here.share(manifest)
    (tmp_path / "second").mkdir()
    assert Store(here.root, str(tmp_path / "second")).owes(manifest)
    assert not Path(tmp_path / "second" / "format").exists()
