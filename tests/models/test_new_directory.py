"""A directory appears whole or not at all."""

import errno
import os

import pytest

from pesc.errors import CancelledError, ModelError
from pesc.models.new_directory import new_directory


def everything(root):
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*"))


def half_fill(out, then):
    with new_directory(out) as building:
        (building / "half").write_text("x")
        then()


def throw(error):
    raise error


@pytest.mark.parametrize("state", ["new", "empty", "below a missing parent"])
def test_it_appears_when_it_is_whole(tmp_path, state):
    out = tmp_path / ("deep/er/out" if state == "below a missing parent" else "out")
    if state == "empty":
        out.mkdir()
    with new_directory(out) as building:
        assert building.parent == out.parent
        (building / "sub").mkdir()
        (building / "sub/file").write_text("x")
        assert not (out / "sub").exists()
    assert everything(out) == ["sub", "sub/file"]
    assert not list(out.parent.glob(".*"))


FAILURES = {
    "an error of the builder": (ModelError("no such layer"), ModelError, "no such layer"),
    "a defect": (ZeroDivisionError(), ZeroDivisionError, "^$"),
    "Ctrl-C": (KeyboardInterrupt(), CancelledError, "nothing was written"),
    "a full disk": (OSError(errno.ENOSPC, "No space left on device"), ModelError, "is full, so nothing was written"),
    "a file that may not be read": (PermissionError(errno.EACCES, "Permission denied", "/m/a"), ModelError, r"/m/a cannot be used \(Perm"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_nothing_is_left_after_a_failure(tmp_path, case):
    raised, expected, message = FAILURES[case]
    with pytest.raises(expected, match=message):
        half_fill(tmp_path / "made/for/it", lambda: throw(raised))
    assert everything(tmp_path) == []


def test_a_failure_keeps_what_was_there(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(ZeroDivisionError):
        half_fill(tmp_path / "out", lambda: 1 / 0)
    assert everything(tmp_path) == ["out"]


@pytest.mark.parametrize(("make", "message"), [("directory", "is not empty"), ("file", "is a file")])
def test_what_is_in_use_is_refused_before_anything_is_built(tmp_path, make, message):
    if make == "directory":
        (tmp_path / "out").mkdir()
        (tmp_path / "out/kept").write_text("x")
    else:
        (tmp_path / "out").write_text("x")
    before = everything(tmp_path)
    with pytest.raises(ModelError, match=message), new_directory(tmp_path / "out"):
        pytest.fail("built")
    assert everything(tmp_path) == before


def test_another_program_that_was_faster_keeps_its_files(tmp_path):
    def fill():
        (tmp_path / "out").mkdir()
        (tmp_path / "out/theirs").write_text("x")

    with pytest.raises(ModelError, match="filled by another program"):
        half_fill(tmp_path / "out", fill)
    assert everything(tmp_path) == ["out", "out/theirs"]


def test_files_are_synced_before_the_rename(tmp_path, monkeypatch):
    calls = []
    sync, rename = os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda d: (calls.append(os.readlink(f"/proc/self/fd/{d}").rsplit("/", 1)[-1]), sync(d)))
    monkeypatch.setattr(os, "rename", lambda a, b: (calls.append("rename"), rename(a, b)))
    with new_directory(tmp_path / "out") as building:
        (building / "file").write_text("x")
    assert calls == ["file", building.name, "rename", tmp_path.name]
