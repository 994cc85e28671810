"""Sources at URLs, through fsspec's own memory file system and a local HTTP server."""

from __future__ import annotations

import hashlib
import importlib.util
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import fsspec
import pytest

from pesc.data.config import SourceConfig
from pesc.data.download import build
from pesc.errors import SourceError, TransientSourceError
from tests.data.builders import run_stage, tree_bytes

ROWS = b'{"query": "1+1", "response": "2"}\n' * 1000
SHA = hashlib.sha256(ROWS).hexdigest()


@pytest.fixture
def bucket():
    memory = fsspec.filesystem("memory")
    for name, data in {"a.jsonl": ROWS, "deep/b.jsonl": b"{}\n", "README.md": b"# rows"}.items():
        memory.pipe(f"/bucket/rows/{name}", data)
    yield "memory://bucket/rows"
    memory.rm("/bucket", recursive=True)


@pytest.fixture
def web(monkeypatch):
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status = int(self.path.strip("/").partition("/")[0])
            self.send_response(status)
            self.send_header("ETag", '"v7"')
            self.send_header("Content-Length", str(len(ROWS)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(ROWS[:500] if "cut" in self.path else ROWS)

        do_HEAD = do_GET

        def log_message(self, *_arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_folder_is_fetched_with_the_wanted_files_alone(tmp_path, bucket):
    out, result = run_stage(build, SourceConfig(uri=bucket, include=("**/*.jsonl",)), tmp_path / "run")
    assert tree_bytes(out) == {"a.jsonl": ROWS, "deep/b.jsonl": b"{}\n"}
    listing = f"a.jsonl\0{SHA}\ndeep/b.jsonl\0{hashlib.sha256(b'{}' + bytes([10])).hexdigest()}\n"
    assert result.provenance["tree_sha256"] == hashlib.sha256(listing.encode()).hexdigest()


def test_a_single_file_is_checked_against_its_pin(tmp_path, bucket):
    out, result = run_stage(build, SourceConfig(uri=f"{bucket}/a.jsonl", sha256=SHA), tmp_path / "good")
    assert (tree_bytes(out), result.provenance["sha256"]) == ({"a.jsonl": ROWS}, SHA)
    with pytest.raises(SourceError, match=f"has the SHA-256 {SHA}, but the recipe pins 0{{64}}"):
        run_stage(build, SourceConfig(uri=f"{bucket}/a.jsonl", sha256="0" * 64), tmp_path / "bad")


def test_nothing_at_a_url_is_a_sentence(tmp_path, bucket):
    with pytest.raises(SourceError, match=r"nothing at this URL|has no files"):
        run_stage(build, SourceConfig(uri=f"{bucket}/nothing"), tmp_path / "run")


@pytest.mark.skipif(importlib.util.find_spec("s3fs") is not None, reason="s3fs is installed")
def test_a_missing_driver_is_named(tmp_path):
    with pytest.raises(SourceError, match=r"needs a driver that is not installed: .*s3fs"):
        run_stage(build, SourceConfig(uri="s3://bucket/rows"), tmp_path / "run")


def test_a_file_comes_over_http_with_its_etag(tmp_path, web):
    pytest.importorskip("aiohttp")
    out, result = run_stage(build, SourceConfig(uri=f"{web}/200/data/rows.jsonl?signature=abc"), tmp_path / "run")
    assert tree_bytes(out) == {"rows.jsonl": ROWS}
    assert (result.provenance["sha256"], result.provenance["etag"]) == (SHA, "v7")


@pytest.mark.parametrize(
    ("path", "kind", "says"),
    [
        ("401/a", SourceError, "access is refused"),
        ("403/a", SourceError, "access is refused"),
        ("404/a", SourceError, "nothing at this URL"),
        ("410/a", SourceError, "HTTP 410"),
        ("429/a", TransientSourceError, "too many requests"),
        ("503/a", TransientSourceError, "HTTP 503"),
        ("200/cut", TransientSourceError, "cannot be fetched|came with"),
        ("", SourceError, "names no file"),
    ],
)
def test_every_refusal_of_a_server_is_a_sentence(tmp_path, web, path, kind, says):
    pytest.importorskip("aiohttp")
    with pytest.raises(SourceError, match=says) as error:
        run_stage(build, SourceConfig(uri=f"{web}/{path}"), tmp_path / "run")
    assert type(error.value) is kind


def test_no_server_at_all_may_be_tried_again(tmp_path, web):
    pytest.importorskip("aiohttp")
    with pytest.raises(TransientSourceError, match="cannot be fetched"):
        run_stage(build, SourceConfig(uri="http://127.0.0.1:9/rows.jsonl"), tmp_path / "run")
