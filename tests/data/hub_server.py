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
    """(kind, repository) -> files; `status` forces an answer for a repository; `requests` is what was asked."""

    files: dict[tuple[str, str], dict[str, bytes]]
    status: dict[str, int] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    url: str = ""


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
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
        self.hub.requests.append(f"{self.command} {path}")
        api = re.fullmatch(r"/api/(model|dataset)s/([^/]+/[^/]+)/(revision|tree)/(.+?)/?", path)
        file = re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if not (api or file):
            return self._error(404, "EntryNotFound")
        kind, repo = (api[1], api[2]) if api else ("dataset" if file[1] else "model", file[2])
        if forced := self.hub.status.get(repo):
            return self._error(forced, {403: "GatedRepo"}.get(forced, ""))
        files = self.hub.files.get((kind, repo))
        if files is None:
            return self._error(404, "RepoNotFound")
        revision = api[4] if api else file[3]
        if revision not in ("main", COMMIT):
            return self._error(404, "RevisionNotFound")
        if file:
            return self._file(files[file[4]]) if file[4] in files else self._error(404, "EntryNotFound")
        if api[3] == "tree":
            entries = [{"type": "file", "path": name, "size": len(data), "oid": _oid(data)} for name, data in sorted(files.items())]
            return self._json(entries)
        siblings = [{"rfilename": name, "size": len(data), "blobId": _oid(data)} for name, data in sorted(files.items())]
        return self._json({"id": repo, "modelId": repo, "sha": COMMIT, "siblings": siblings, "private": False, "tags": [], "downloads": 0})

    def _file(self, data: bytes) -> None:
        headers = {"ETag": f'"{_oid(data)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        self._send(200, data, "application/octet-stream", headers)

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), "application/json", {})

    def _error(self, status: int, code: str) -> None:
        self._send(status, b'{"error": "no"}', "application/json", {"X-Error-Code": code, "X-Error-Message": "no"} if code else {})

    def _send(self, status: int, data: bytes, kind: str, headers: dict[str, str]) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _oid(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
