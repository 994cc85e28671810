"""A local server that speaks as much of the hub's HTTP API as huggingface_hub needs: repo info, tree, and resolve."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse

COMMIT = "5f0b02c75b57c5855da9ae460ce51323ea669d8a"


@dataclass
class Hub:
    """(kind, repository) -> files of `main`; `requests` is what was asked, with the range where there was one.

    status forces an answer for a repository, or for a file of any repository.  tampered: files that are sent with other bytes than
    those that are listed.  cut_after: the connection drops after so many bytes of files, and stays away until this is None again.
    Files of large-file storage are those whose name ends in .safetensors, and those above 10 MB.
    """

    files: dict[tuple[str, str], dict[str, bytes]]
    status: dict[str, int] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    tampered: dict[str, bytes] = field(default_factory=dict)
    cut_after: int | None = None
    commit: str = COMMIT
    history: dict[str, dict[tuple[str, str], dict[str, bytes]]] = field(default_factory=dict)
    branches: dict[tuple[str, str, str], str] = field(default_factory=dict)
    """(kind, repository, branch beside main) -> commit."""
    private: set[str] = field(default_factory=set)
    url: str = ""

    def push(self, commit: str, files: dict[tuple[str, str], dict[str, bytes]]) -> None:
        """Move `main` of every repository to a new commit; the old one can still be read."""
        self.history[self.commit] = self.files
        self.commit, self.files = commit, files


@contextmanager
def serve(hub: Hub, handler: type[HubHandler] | None = None) -> Iterator[Hub]:
    handler = type("Handler", (handler or HubHandler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class HubHandler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_arguments: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlparse(self.path).path)
        wanted = self.headers.get("Range")
        self.hub.requests.append(f"{self.command} {path}" + (f" {wanted}" if wanted else ""))
        api = re.fullmatch(r"/api/(model|dataset|space)s/([^/]+/[^/]+)(?:/(revision|tree)/(.+?)/?)?", path)
        file = re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if not (api or file):
            return self._error(404, "EntryNotFound")
        kind, repo = (api[1], api[2]) if api else ("dataset" if file[1] else "model", file[2])
        if forced := self.hub.status.get(repo):
            return self._error(forced, {403: "GatedRepo"}.get(forced, ""))
        revision = (api[4] or "main") if api else file[3]
        commit = self.hub.commit if revision == "main" else self.hub.branches.get((kind, repo, revision), revision)
        if (kind, repo) not in self.hub.files:
            return self._error(404, "RepoNotFound")
        files = self.hub.files if commit == self.hub.commit else self.hub.history.get(commit)
        if files is None:
            return self._error(404, "RevisionNotFound")
        files = files[kind, repo]
        if file:
            name = file[4]
            if forced := self.hub.status.get(name):
                return self._error(forced, "")
            return self._file(name, files[name], commit) if name in files else self._error(404, "EntryNotFound")
        if api[3] == "tree":
            entries = [{"type": "file", "path": name, "size": len(data), "oid": git_id(data)} for name, data in sorted(files.items())]
            return self._json(entries)
        siblings = [listed(name, data) for name, data in sorted(files.items())]
        return self._json(
            {
                "id": repo,
                "modelId": repo,
                "sha": commit,
                "siblings": siblings,
                "private": repo in self.hub.private,
                "tags": [],
                "downloads": 0,
            }
        )

    def _file(self, name: str, data: bytes, commit: str) -> None:
        headers = {"ETag": f'"{git_id(data)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        data, status = self.hub.tampered.get(name, data), 200
        if asked := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            headers["Content-Range"] = f"bytes {asked[1]}-{len(data) - 1}/{len(data)}"
            data, status = data[int(asked[1]) :], 206
        self._send(status, data, "application/octet-stream", headers)

    def _json(self, value: object, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), "application/json", {})

    def _error(self, status: int, code: str) -> None:
        self._send(status, b'{"error": "no"}', "application/json", {"X-Error-Code": code, "X-Error-Message": "no"} if code else {})

    def _send(self, status: int, data: bytes, kind: str, headers: dict[str, str]) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.hub.cut_after is not None and "/resolve/" in self.path:
            self.close_connection = len(data) > self.hub.cut_after
            data = data[: self.hub.cut_after]
            self.hub.cut_after -= len(data)
        self.wfile.write(data)


def is_large(name: str, size: int) -> bool:
    """Whether the hub keeps a file in large-file storage."""
    return name.endswith(".safetensors") or size > 10_000_000


def listed(name: str, data: bytes) -> dict[str, object]:
    """A file as the hub lists it; the blob of a large file is its pointer."""
    if not is_large(name, len(data)):
        return {"rfilename": name, "size": len(data), "blobId": git_id(data)}
    lfs = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return {"rfilename": name, "size": len(data), "blobId": git_id(b"pointer"), "lfs": lfs}


def git_id(data: bytes) -> str:
    """The id of a git blob."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
