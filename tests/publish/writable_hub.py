"""The hub's API for writing, served here: repositories, branches, large-file storage (in one piece and in parts), commits.

A commit is refused as a whole when it names a large file that was not sent, or stands on another commit than the branch.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import struct
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

from tests.data.hub_server import Hub, HubHandler, git_id, is_large, serve

TOKEN, READER = "hf_may_write_to_org", "hf_may_only_read"


@dataclass
class WritableHub(Hub):
    """stored: SHA-256 -> bytes.  puts: what was sent to large-file storage.  part_bytes: files above it are sent in parts.

    stalled_after: once so many files have been stored, further ones are received and never answered; `stalled` is set then.
    dead_after: once so many files have been stored, every connection is dropped.  xet: a directory in which hf_xet keeps files itself.
    """

    files: dict[tuple[str, str], dict[str, bytes]] = field(default_factory=dict)
    stored: dict[str, bytes] = field(default_factory=dict)
    parts: dict[str, dict[int, bytes]] = field(default_factory=dict)
    puts: list[str] = field(default_factory=list)
    commits: list[dict[str, Any]] = field(default_factory=list)
    part_bytes: int | None = None
    stalled_after: int | None = None
    stalled: threading.Event = field(default_factory=threading.Event)
    release: threading.Event = field(default_factory=threading.Event)
    dead_after: int | None = None
    damages: set[str] = field(default_factory=set)
    """Files that are listed with other bytes than were committed."""
    ignores: set[str] = field(default_factory=set)
    """Files that a .gitignore of the repository excludes."""
    xet: str | None = None

    def tree(self, repo: str, branch: str = "main") -> dict[str, bytes]:
        """Files of a branch."""
        commit = self.branches.get(("model", repo, branch), self.commit)
        files = self.files if commit == self.commit else self.history[commit]
        return {name: data for name, data in files["model", repo].items() if name != ".gitattributes"}


@contextmanager
def serve_writable(hub: WritableHub) -> Iterator[WritableHub]:
    with serve(hub, _Handler):
        try:
            yield hub
        finally:
            hub.release.set()


_FILE = struct.Struct("<4QIIQ")
"""Of a shard of Xet: hash, flags, entries, unused; a file of all ones ends the list."""


def read_xet(root: Path, url: str, repo: str) -> dict[str, bytes]:
    """SHA-256 -> bytes of every file in a store of hf_xet, put together again by hf_xet."""
    import hf_xet

    files = {}
    for shard in (root / "xet/xorbs/shards").glob("*.mdb"):
        data, place = shard.read_bytes(), 48
        while (header := _FILE.unpack_from(data, place))[0] != 2**64 - 1:
            *words, flags, entries, _ = header
            sizes = [struct.unpack_from("<I", data, place + 48 * (1 + entry) + 36)[0] for entry in range(entries)]
            place += 48 * (1 + entries * (2 if flags & 1 << 31 else 1)) + (48 if flags & 1 << 30 else 0)
            files["".join(f"{word:016x}" for word in words)] = sum(sizes)
    stored = {}
    with tempfile.TemporaryDirectory() as folder:
        refresh = f"{url}/api/models/{repo}/xet-write-token/main"
        with hf_xet.XetSession().new_file_download_group(token_refresh_url=refresh) as group:
            for name, size in files.items():
                group.start_download_file(hf_xet.XetFileInfo(name, size), f"{folder}/{name}")
        for name in files:
            content = Path(folder, name).read_bytes()
            stored[hashlib.sha256(content).hexdigest()] = content
    return stored


class _Handler(HubHandler):
    hub: WritableHub

    def do_GET(self) -> None:
        path = unquote(urlparse(self.path).path)
        if re.fullmatch(r"/api/models/[^/]+/[^/]+/xet-write-token/.+", path):
            self.hub.requests.append(f"GET {path}")
            if self.hub.xet is None:
                return self._error(404, "")
            return self._json({"accessToken": "xet", "exp": 9_999_999_999, "casUrl": f"local://{self.hub.xet}"})
        if self._token() not in (None, TOKEN, READER):
            return self._send(401, b"{}", "application/json", {"X-Error-Message": "Invalid credentials in Authorization header"})
        super().do_GET()

    def do_POST(self) -> None:
        path = unquote(urlparse(self.path).path)
        self.hub.requests.append(f"POST {path}")
        body = self._body()
        if done := re.fullmatch(r"/lfs/done/(\w+)", path):
            return self._finish_parts(done[1], json.loads(body))
        if self._token() != TOKEN:
            reader = self._token() == READER
            text = "Forbidden: you must use a write token" if reader else "Invalid credentials in Authorization header"
            return self._send(403 if reader else 401, b"{}", "application/json", {"X-Error-Message": text})
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if batch := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            return self._batch(batch[1], json.loads(body))
        if verify := re.fullmatch(r"/lfs/verify/(\w+)", path):
            return self._json({}) if verify[1] in self.hub.stored else self._error(404, "")
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(branch|preupload|commit)/(.+)", path)
        if api is None or ("model", api[1]) not in self.hub.files:
            return self._error(404, "RepoNotFound")
        if forced := self.hub.status.get(f"{api[2]} {api[1]}"):
            return self._error(forced, "")
        if api[2] == "branch":
            return self._branch(api[1], api[3])
        return self._preupload(api[1], api[3], json.loads(body)) if api[2] == "preupload" else self._commit(api[1], api[3], body)

    def do_PUT(self) -> None:
        path, hub = unquote(urlparse(self.path).path), self.hub
        oid, _, part = path.removeprefix("/lfs/put/").partition("/")
        data = self._body()
        if hub.dead_after is not None and len(hub.stored) >= hub.dead_after:
            self.close_connection = True
            return None
        if hub.stalled_after is not None and len(hub.stored) >= hub.stalled_after:
            hub.stalled.set()
            hub.release.wait(120)
            self.close_connection = True
            return None
        hub.puts.append(path)
        if part:
            hub.parts.setdefault(oid, {})[int(part)] = data
            return self._send(200, b"", "text/plain", {"ETag": hashlib.md5(data).hexdigest()})
        return self._store(oid, data)

    def _store(self, oid: str, data: bytes) -> None:
        if hashlib.sha256(data).hexdigest() != oid:
            return self._error(400, "")
        self.hub.stored[oid] = data
        return self._json({})

    def _finish_parts(self, oid: str, body: dict[str, Any]) -> None:
        parts = self.hub.parts.pop(oid)
        assert [(entry["partNumber"], entry["etag"]) for entry in body["parts"]] == [
            (number, hashlib.md5(parts[number]).hexdigest()) for number in sorted(parts)
        ]
        self._store(oid, b"".join(parts[number] for number in sorted(parts)))

    def _create(self, body: dict[str, Any]) -> None:
        repo = f"{body['organization']}/{body['name']}"
        if body["organization"] != "org":
            return self._send(403, b"{}", "application/json", {"X-Error-Message": f"You have no rights to {body['organization']}"})
        url = {"url": f"{self.hub.url}/{repo}"}
        if ("model", repo) in self.hub.files:
            return self._json(url, 409)
        self._push("model", repo, "main", {".gitattributes": b"*.safetensors filter=lfs\n"})
        if body.get("visibility") == "private":
            self.hub.private.add(repo)
        return self._json(url)

    def _branch(self, repo: str, branch: str) -> None:
        self.hub.branches["model", repo, branch] = self.hub.commit
        self._json({})

    def _files(self, repo: str, branch: str) -> dict[str, bytes] | None:
        commit = self.hub.commit if branch == "main" else self.hub.branches.get(("model", repo, branch))
        files = self.hub.files if commit == self.hub.commit else self.hub.history.get(commit or "")
        return files and files["model", repo]

    def _preupload(self, repo: str, branch: str, body: dict[str, Any]) -> None:
        files = self._files(repo, branch)
        if files is None:
            return self._error(404, "RevisionNotFound")
        answers = []
        for file in body["files"]:
            large = is_large(file["path"], file["size"])
            held = files.get(file["path"])
            digest = None if held is None else hashlib.sha256(held).hexdigest() if large else git_id(held)
            mode = {"uploadMode": "lfs" if large else "regular", "shouldIgnore": file["path"] in self.hub.ignores}
            answers.append({"path": file["path"], **mode, "oid": digest})
        return self._json({"files": answers})

    def _batch(self, repo: str, body: dict[str, Any]) -> None:
        if ("model", repo) not in self.hub.files:
            return self._error(404, "RepoNotFound")
        objects = []
        for item in body["objects"]:
            entry = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.hub.stored:
                entry["actions"] = self._actions(item["oid"], item["size"])
            objects.append(entry)
        return self._json({"transfer": "basic", "objects": objects})

    def _actions(self, oid: str, size: int) -> dict[str, Any]:
        base, chunk = f"{self.hub.url}/lfs", self.hub.part_bytes
        verify = {"href": f"{base}/verify/{oid}"}
        if chunk is None or size <= chunk:
            return {"upload": {"href": f"{base}/put/{oid}"}, "verify": verify}
        numbers = range(1, -(-size // chunk) + 1)
        header = {"chunk_size": str(chunk), **{f"{number:05}": f"{base}/put/{oid}/{number}" for number in numbers}}
        return {"upload": {"href": f"{base}/done/{oid}", "header": header}, "verify": verify}

    def _commit(self, repo: str, branch: str, body: bytes) -> None:
        lines = [json.loads(line) for line in body.splitlines()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        current = self.hub.commit if branch == "main" else self.hub.branches["model", repo, branch]
        if header.get("parentCommit") not in (None, current):
            return self._error(412, "")
        files = dict(self._files(repo, branch) or {})
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "deletedFile":
                del files[value["path"]]
            elif line["key"] == "lfsFile":
                if self.hub.xet is not None and value["oid"] not in self.hub.stored:
                    self.hub.stored |= read_xet(Path(self.hub.xet), self.hub.url, repo)
                if value["oid"] not in self.hub.stored:
                    return self._error(400, "")
                files[value["path"]] = self.hub.stored[value["oid"]]
        for name in self.hub.damages & files.keys():
            files[name] += b"!"
        commit = self._push("model", repo, branch, files)
        self.hub.commits.append({"repo": repo, "branch": branch, "oid": commit, **header})
        return self._json({"success": True, "commitOid": commit, "commitUrl": f"{self.hub.url}/{repo}/commit/{commit}"})

    def _push(self, kind: str, repo: str, branch: str, files: dict[str, bytes]) -> str:
        commit = hashlib.sha1(repr((branch, sorted(files), len(self.hub.history), len(self.hub.commits))).encode()).hexdigest()
        if branch == "main":
            self.hub.push(commit, {**self.hub.files, (kind, repo): files})
        else:
            old = self.hub.branches[kind, repo, branch]
            before = self.hub.files if old == self.hub.commit else self.hub.history[old]
            self.hub.history[commit] = {**before, (kind, repo): files}
            self.hub.branches[kind, repo, branch] = commit
        return commit

    def _token(self) -> str | None:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        pieces = []
        while size := int(self.rfile.readline(), 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)
