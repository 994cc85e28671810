"""The store's promises: all or nothing, first writer wins, one builder at a time, and nothing believed that is not there."""

import errno
import fcntl
import hashlib
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from pesc.errors import StoreBusyError, StoreError
from pesc.store import Manifest, Store, maintenance
from pesc.store.maintenance import fsck, gc
from pesc.store.manifest import Key, Output, OutputFile
from pesc.store.workspace import is_locked


def commit(store: Store, stage: str = "mix", inputs: dict[str, Manifest] | None = None, content: bytes = b"rows", **config) -> Manifest:
    inputs = inputs or {}
    key = Key(stage=stage, code_version=1, config=config, inputs={k: m.output.digest for k, m in inputs.items()})
    with store.workspace(stage, key.fingerprint, stage) as workspace:
        workspace.clear_output()
        (workspace.out / "data.bin").write_bytes(content)
        digest, entries = store.publish(workspace.out)
        output = Output(digest=digest, size_bytes=1, files=[OutputFile(**e.__dict__) for e in entries])
        manifest = Manifest(
            address=stage, recipe="r", fingerprint=key.fingerprint, key=key, output=output, started_at="2026-01-01T00:00:00", seconds=1,
            input_fingerprints={k: m.fingerprint for k, m in inputs.items()},
        )  # fmt: skip
        store.commit(manifest)
        workspace.discard()
    return manifest


def test_a_committed_action_is_found_and_its_files_are_read_only(store):
    made = commit(store, a=1)
    found = store.find("mix", made.fingerprint)
    assert found == made
    path = store.open(made.ref) / "data.bin"
    assert path.read_bytes() == b"rows"
    assert path.stat().st_mode & 0o222 == 0
    assert not store.workspace_path("mix", made.fingerprint).exists()


def test_equal_bytes_share_one_object(store):
    first, second = commit(store, a=1), commit(store, a=2)
    assert first.fingerprint != second.fingerprint
    assert first.output.digest == second.output.digest
    assert len(list((store.root / "objects").iterdir())) == 1


def test_fingerprint_covers_stage_version_config_and_inputs():
    base = {"stage": "mix", "code_version": 1, "config": {"a": 1}, "inputs": {"rows": "x"}}
    variants = [{**base, "stage": "dedup"}, {**base, "code_version": 2}, {**base, "config": {"a": 2}}, {**base, "inputs": {"rows": "y"}}]
    prints = {Key(**v).fingerprint for v in [base, *variants]}
    assert len(prints) == 5
    text = b'{"code_version":1,"config":{"a":1},"format":1,"inputs":{"rows":"x"},"stage":"mix"}'
    assert Key(**base).fingerprint == hashlib.sha256(text).hexdigest(), "the fingerprint's format changed: raise FORMAT"


def test_an_action_whose_object_lost_a_file_is_a_miss(store):
    made = commit(store)
    (store.object_path(made.output.digest) / "data.bin").unlink()
    assert store.find("mix", made.fingerprint) is None
    with pytest.raises(StoreError, match="not whole"):
        store.open(made.ref)


def test_a_damaged_manifest_is_a_sentence(store):
    made = commit(store)
    (store.action_path("mix", made.fingerprint) / "manifest.json").write_text("{")
    with pytest.raises(StoreError, match="fsck --repair"):
        store.find("mix", made.fingerprint)


def test_committing_drops_prefects_record_of_the_earlier_result(store):
    made = commit(store)
    record = store.action_path("mix", made.fingerprint) / "prefect.json"
    record.write_text("{}")
    store.commit(made)
    assert not record.exists()


def test_publishing_over_a_damaged_object_replaces_it(store):
    made = commit(store)
    path = store.object_path(made.output.digest) / "data.bin"
    path.chmod(0o644)
    path.write_bytes(b"rot!")
    commit(store, a=2)
    assert path.read_bytes() == b"rows"


def _hold(root: Path, ready, seconds: float) -> None:
    with Store(root).workspace("train", "f" * 64, "train"):
        ready.set()
        time.sleep(seconds)


@pytest.fixture
def holder(store):
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=_hold, args=(store.root, ready, 60))
    process.start()
    assert ready.wait(30)
    yield process
    process.kill()
    process.join()


def test_a_second_process_is_told_who_holds_the_workspace(store, holder):
    with pytest.raises(StoreBusyError, match=rf"process {holder.pid} .* since"), store.workspace("train", "f" * 64, "train[pesc]"):
        pass
    assert is_locked(store.workspace_path("train", "f" * 64))


def test_a_killed_holder_frees_the_workspace_and_leaves_its_scratch(store, holder):
    scratch = store.workspace_path("train", "f" * 64) / "checkpoint"
    scratch.write_text("step 100")
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    with store.workspace("train", "f" * 64, "train") as workspace:
        assert (workspace.root / "checkpoint").read_text() == "step 100"


def test_where_locks_are_those_of_nfs_the_care_of_the_store_reads_them(store, monkeypatch):
    """NFS makes byte-range locks of `flock`: an exclusive one wants a descriptor that may write."""
    with store.workspace("train", "e" * 64, "train") as workspace:
        (workspace.root / "checkpoint").write_text("half")
    monkeypatch.setattr("fcntl.flock", fcntl.lockf)
    assert not is_locked(store.workspace_path("train", "e" * 64))
    assert fsck(store).leftovers == [store.workspace_path("train", "e" * 64)]
    assert gc(store, [], 0.0).workspaces == [store.workspace_path("train", "e" * 64)]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_a_sentence(store, monkeypatch, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.raises(StoreError, match=r"gives no locks .* Mount it with locks"), store.workspace("train", "e" * 64, "train"):
        pass


def test_fsck_is_clean_after_normal_work_and_names_damage(store):
    made = commit(store)
    assert fsck(store).is_clean
    path = store.object_path(made.output.digest) / "data.bin"
    path.chmod(0o644)
    path.write_bytes(b"rot!")  # same size: only the digest can tell
    assert store.find("mix", made.fingerprint) is not None
    report = fsck(store)
    assert len(report.problems) == 2
    assert made.output.digest in report.problems[0]
    fsck(store, repair=True)
    assert fsck(store).is_clean
    assert store.find("mix", made.fingerprint) is None
    assert list((store.root / "damaged").iterdir()), "repair sets aside, it does not delete"


def test_an_unfinished_workspace_is_reported_but_is_no_damage(store):
    with store.workspace("train", "a" * 64, "train"):
        pass
    report = fsck(store)
    assert report.is_clean
    assert [p.name for p in report.leftovers] == ["a" * 64]


def _age(store: Store, days: float) -> None:
    then = time.time() - days * 86_400
    for path in store.root.rglob("*"):
        os.utime(path, (then, then))


def test_gc_keeps_what_is_kept_and_everything_it_was_made_from(store):
    rows = commit(store, "dedup", content=b"1")
    mixed = commit(store, "mix", {"rows": rows}, content=b"2")
    other = commit(store, "mix", content=b"3", seed=7)
    _age(store, 100)
    dry = gc(store, keep=[("mix", mixed.fingerprint)], keep_days=30)
    assert [p.name for p in dry.actions] == [other.fingerprint]
    assert [p.name for p in dry.objects] == [other.output.digest]
    assert store.find("mix", other.fingerprint), "a dry run removes nothing"
    gc(store, keep=[("mix", mixed.fingerprint)], keep_days=30, delete=True)
    assert store.find("mix", other.fingerprint) is None
    assert store.find("mix", mixed.fingerprint)
    assert store.find("dedup", rows.fingerprint)
    assert fsck(store).is_clean


def test_gc_keeps_the_recent_and_what_a_recent_run_used(store):
    old, used = commit(store, content=b"1", seed=1), commit(store, content=b"2", seed=2)
    _age(store, 100)
    fresh = commit(store, content=b"3", seed=3)
    store.record_run("r", "now", {"mix": used.fingerprint})
    report = gc(store, keep=[], keep_days=30)
    assert {p.name for p in report.actions} == {old.fingerprint}
    assert fresh.fingerprint not in {p.name for p in report.actions}


def test_gc_keeps_what_has_lately_been_an_input(store):
    """Of a run that goes on elsewhere and has no record here yet."""
    old, read = commit(store, content=b"1", seed=1), commit(store, content=b"2", seed=2)
    _age(store, 100)
    store.note_use(read.ref)
    assert {p.name for p in gc(store, keep=[], keep_days=30).actions} == {old.fingerprint}
    assert store.action_path("mix", read.fingerprint).joinpath("manifest.json").stat().st_mtime < time.time() - 86_400


def test_gc_spares_what_comes_into_use_while_it_looks(store, monkeypatch):
    old, again = commit(store, content=b"1", seed=1), commit(store, content=b"2", seed=2)
    _age(store, 100)
    count = maintenance._unshared_bytes

    def meanwhile(path):
        store.record_run("r", "now", {"mix": again.fingerprint})
        return count(path)

    monkeypatch.setattr(maintenance, "_unshared_bytes", meanwhile)
    report = gc(store, keep=[], keep_days=30, delete=True)
    assert [p.name for p in report.actions] == [old.fingerprint]
    assert store.find("mix", again.fingerprint)
    assert store.find("mix", old.fingerprint) is None
    assert fsck(store).is_clean


def test_an_object_of_the_last_hour_stays_whatever_is_asked(store):
    (store.root / "objects" / ("a" * 64)).mkdir(parents=True)
    assert gc(store, keep=[], keep_days=0).objects == []
    _age(store, 0.1)
    assert [p.name for p in gc(store, keep=[], keep_days=0).objects] == ["a" * 64]


def test_gc_removes_what_fsck_has_set_aside_long_ago(store):
    made = commit(store)
    path = store.object_path(made.output.digest) / "data.bin"
    path.chmod(0o644)
    path.write_bytes(b"rot!")
    fsck(store, repair=True)
    _age(store, 100)
    aside = sorted((store.root / "damaged").iterdir())
    assert gc(store, keep=[], keep_days=30).damaged == [], "set aside just now, however old it is"
    for place in aside:
        number, _, name = place.name.partition("-")
        place.rename(place.with_name(f"{int(number) - 31 * 86_400 * 10**9}-{name}"))
    report = gc(store, keep=[], keep_days=30, delete=True)
    assert len(report.damaged) == len(aside) == 2
    assert list((store.root / "damaged").iterdir()) == []


def test_gc_leaves_a_held_workspace_alone(store, holder):
    with store.workspace("train", "b" * 64, "train"):
        pass
    _age(store, 100)
    report = gc(store, keep=[], keep_days=30, delete=True)
    assert [p.name for p in report.workspaces] == ["b" * 64]
    assert store.workspace_path("train", "f" * 64).exists()


def test_gc_keeps_a_workspace_whose_checkpoints_are_recent(store):
    with store.workspace("train", "c" * 64, "train") as workspace:
        (workspace.root / "checkpoints").mkdir()
    _age(store, 100)
    (workspace.root / "checkpoints" / "step_200").write_text("fresh")
    assert gc(store, keep=[], keep_days=30).workspaces == []


def test_gc_stops_at_a_manifest_that_it_cannot_read(store):
    made = commit(store)
    _age(store, 100)
    (store.action_path("mix", made.fingerprint) / "manifest.json").write_text('{"format": "of a newer pesc"}')
    with pytest.raises(StoreError, match=r"manifest\.json is damaged"):
        gc(store, keep=[], keep_days=0, delete=True)
    assert store.object_path(made.output.digest).is_dir(), "nobody knows whether that action needs it"


def test_gc_of_a_damaged_run_record_is_a_sentence(store):
    store.record_run("r", "now", {})
    (store.root / "runs" / "r" / "now.json").write_text("[")
    with pytest.raises(StoreError, match="says what a run used"):
        gc(store, keep=[], keep_days=30)


def test_an_object_that_is_wanted_again_is_not_old(store):
    made = commit(store)
    _age(store, 100)
    with store.workspace("mix", "d" * 64, "mix") as workspace:
        workspace.clear_output()
        (workspace.out / "data.bin").write_bytes(b"rows")
        store.publish(workspace.out)  # the manifest is about to be written
    assert made.output.digest not in {p.name for p in gc(store, keep=[], keep_days=30).objects}


def test_an_action_stopped_before_its_commit_is_no_damage_and_gc_removes_it(store):
    place = store.action_path("train", "e" * 64)
    place.mkdir(parents=True)
    (place / "log.txt").write_text("the disk was full when the manifest came")
    report = fsck(store)
    assert report.is_clean
    assert report.num_actions == 0
    assert report.leftovers == [place]
    _age(store, 100)
    assert gc(store, keep=[], keep_days=30, delete=True).actions == [place]
    assert not place.exists()


def test_fsck_goes_on_past_an_object_with_a_link(store):
    made = commit(store)
    (store.object_path(made.output.digest) / "link").symlink_to("/etc/hostname")
    report = fsck(store, repair=True)
    assert any(made.output.digest in problem for problem in report.problems)
    assert fsck(store).is_clean


def test_discarding_a_workspace_removes_the_lock_last(store, monkeypatch):
    from pesc.store import workspace as module

    seen = []

    def rmtree(path, **_):
        seen.append((path.name, (path.parent / ".lock").exists()))

    monkeypatch.setattr(module.shutil, "rmtree", rmtree)
    with store.workspace("mix", "a" * 64, "mix") as workspace:
        workspace.out.mkdir()
        workspace.discard()
    assert seen == [("out", True)]
    assert not (workspace.root / ".lock").exists()
