"""Local files, and wheels through the real pip, from a local index that needs no network."""

from __future__ import annotations

import hashlib
import os
import stat
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from pesc.data.config import SourceConfig
from pesc.data.download import build
from pesc.errors import SourceError
from tests.data.builders import run_stage, tree_bytes, write_wheel


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that pip takes for the whole world."""
    for name in list(os.environ):
        if name.startswith("PIP_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    files = {"rows/data/a.jsonl": '{"q": 1}\n', "rows/data/b.jsonl": "{}\n", "rows/__init__.py": ""}
    return write_wheel(tmp_path / "index", "rows", "1.2", files)


def test_a_directory_is_copied_with_the_wanted_files_alone(tmp_path):
    source = tmp_path / "src"
    (source / "deep").mkdir(parents=True)
    (source / "a.txt").write_text("one")
    (source / "deep" / "b.txt").write_text("two")
    (source / "c.bin").write_bytes(b"\0" * 3_000_000)
    out, result = run_stage(build, SourceConfig(uri=str(source), include=("*.txt",)), tmp_path / "run")
    assert tree_bytes(out) == {"a.txt": b"one", "deep/b.txt": b"two"}
    assert result.metrics == {"files": 2, "bytes": 6}


def test_a_copy_does_not_follow_later_changes_of_its_source(tmp_path):
    source = tmp_path / "a.txt"
    source.write_text("before")
    source.chmod(0o600)
    out, _ = run_stage(build, SourceConfig(uri=f"file:{source}"), tmp_path / "run")
    with source.open("r+") as stream:
        stream.write("AFTER!")
    assert (out / "a.txt").read_text() == "before"
    assert (out / "a.txt").stat().st_ino != source.stat().st_ino
    assert stat.S_IMODE((out / "a.txt").stat().st_mode) == 0o644


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"uri": "nowhere/at/all"}, "There is no file or directory nowhere/at/all"),
        ({"uri": "carrier:pigeon"}, "unknown scheme 'carrier'"),
        ({"uri": ".", "sha256": "0" * 64, "include": ("a*",)}, "0{64}"),
        ({"uri": ".", "sha256": "0" * 64}, "selects 2 files"),
        ({"uri": ".", "gguf_file": "model.gguf"}, "has no file 'model.gguf'"),
    ],
)
def test_a_source_that_cannot_be_used_says_why(tmp_path, monkeypatch, settings, says):
    folder = tmp_path / "cwd"
    folder.mkdir()
    for name in ("a", "b"):
        (folder / name).write_text(name)
    monkeypatch.chdir(folder)
    with pytest.raises(SourceError, match=says):
        run_stage(build, SourceConfig(**settings), tmp_path / "run")


def test_a_wheel_is_fetched_by_pip_without_its_dependencies(tmp_path, index):
    digest = hashlib.sha256(index.read_bytes()).hexdigest()
    config = SourceConfig(uri="pypi:rows==1.2", sha256=digest, include=("rows/data/*",), license="MIT")
    out, result = run_stage(build, config, tmp_path / "run")
    assert tree_bytes(out) == {"rows/data/a.jsonl": b'{"q": 1}\n', "rows/data/b.jsonl": b"{}\n"}
    assert result.provenance == {"uri": "pypi:rows==1.2", "license": "MIT", "revision": "1.2", "archive": index.name, "sha256": digest}
    assert {stat.S_IMODE(path.stat().st_mode) for path in out.rglob("*.jsonl")} == {0o644}


def test_another_digest_names_both_and_the_file(tmp_path, index):
    actual = hashlib.sha256(index.read_bytes()).hexdigest()
    with pytest.raises(SourceError) as error:
        run_stage(build, SourceConfig(uri="pypi:rows==1.2", sha256="0" * 64), tmp_path / "run")
    assert all(part in str(error.value) for part in (actual, "0" * 64, index.name))
    assert not list((tmp_path / "run" / "out").iterdir())


def test_a_missing_release_names_those_that_exist(tmp_path, index):
    with pytest.raises(SourceError, match=r"no wheel of rows==9\.9 .* are 1\.2"):
        run_stage(build, SourceConfig(uri="pypi:rows==9.9"), tmp_path / "run")


def test_a_missing_package_says_so(tmp_path, index):
    with pytest.raises(SourceError, match=r"the package index has no wheel of nothing-here==1"):
        run_stage(build, SourceConfig(uri="pypi:nothing-here==1"), tmp_path / "run")


def test_no_network_is_a_sentence_without_host_or_password(tmp_path, index, monkeypatch):
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://user:secret@127.0.0.1:9/simple")
    with pytest.raises(SourceError, match="no network to the package index") as error:
        run_stage(build, SourceConfig(uri="pypi:rows==1.2"), tmp_path / "run")
    assert "127.0.0.1" not in str(error.value)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("evil", ["../evil.txt", "/evil.txt", "rows/../../evil.txt"])
def test_an_archive_cannot_write_outside(tmp_path, index, evil):
    with zipfile.ZipFile(index, "a") as archive:
        archive.writestr(evil, "boo")
    with pytest.raises(SourceError, match="unsafe entry"):
        run_stage(build, SourceConfig(uri="pypi:rows==1.2"), tmp_path / "run")
    assert not list(tmp_path.rglob("evil.txt"))


def test_a_link_in_an_archive_is_refused(tmp_path, index):
    with zipfile.ZipFile(index, "a") as archive:
        info = zipfile.ZipInfo("rows/link")
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(info, "/etc/passwd")
    with pytest.raises(SourceError, match="unsafe entry 'rows/link'"):
        run_stage(build, SourceConfig(uri="pypi:rows==1.2"), tmp_path / "run")


PROGRAM = """
import sys
from pesc.launch.child import run_child
run_child([sys.executable, "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(60)"], {}, lambda line: print(line, flush=True))
"""


def test_a_child_dies_with_a_killed_parent():
    """Real SIGKILL of the process that downloads: its pip or its converter does not live on."""
    parent = subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    assert Path(f"/proc/{child}").exists()
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 20
    while _alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _alive(child)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
