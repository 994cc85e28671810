"""What a source reference means, which of its files are wanted, and the digest of local ones.

hub:ORG/NAME@REV             a model of the hub             hub:datasets/ORG/NAME@REV    a data set of the hub
pypi:NAME==VERSION           the contents of a wheel        file:PATH or PATH            a local directory or file
s3://, gs://, https:// …     a file or a folder that fsspec can read
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import re
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from pesc.data.config import SourceConfig
from pesc.errors import SourceError

SKIPPED_DIRECTORIES = frozenset({".git", ".cache", "__pycache__"})
"""Bookkeeping of other tools, never part of a local source."""
URL_SCHEMES = ("s3", "gs", "gcs", "az", "abfs", "http", "https", "sftp", "hdfs", "memory")
"""What is handed to fsspec; each has a driver of its own, some in a package of their own (s3fs, gcsfs, adlfs)."""
FORMS = "hub:ORG/NAME@REV, hub:datasets/ORG/NAME@REV, pypi:NAME==VERSION, a URL (s3://, gs://, https:// …), or a local path (file:PATH)"
RENAMED = {
    "ise-uiuc/magicoder_oss_instruct_75k": "ise-uiuc/Magicoder-OSS-Instruct-75K",
    "ise-uiuc/magicoder_evol_instruct_110k": "ise-uiuc/Magicoder-Evol-Instruct-110K",
}
"""Old ids of hub data sets, in lower case -> the id they have now."""
_SETTLED_NS = 2_000_000_000
"""A file changed less than this long ago may change again within one tick of its clock: its digest is not remembered."""


@dataclass(frozen=True)
class HubSource:
    """A repository of the hub at a revision that may move."""

    kind: str
    """model or dataset."""
    repo: str
    revision: str
    requested_repo: str = ""
    """The old id that the reference names, when `repo` is what it is called now."""


@dataclass(frozen=True)
class PypiSource:
    """One release of a package."""

    name: str
    version: str


@dataclass(frozen=True)
class LocalSource:
    """A directory or a single file on this machine."""

    path: Path


@dataclass(frozen=True)
class UrlSource:
    """A file or a folder at a URL."""

    url: str


Source = HubSource | PypiSource | LocalSource | UrlSource


def parse_uri(uri: str) -> Source:
    """Read a reference.  Raises SourceError naming the reference and the known forms."""
    scheme, colon, rest = uri.partition(":")
    if not colon or "/" in scheme or scheme in {"", ".", ".."}:
        return LocalSource(Path(uri).expanduser())
    if scheme == "file":
        return LocalSource(Path(re.sub(r"^//(?=/)", "", rest)).expanduser())
    if scheme == "hub":
        return _parse_hub(uri, rest)
    if scheme == "pypi":
        match = re.fullmatch(r"([A-Za-z0-9][A-Za-z0-9._-]*)==([A-Za-z0-9][A-Za-z0-9.!+_-]*)", rest)
        if not match:
            raise SourceError(f"Source {uri!r} must name one release of a package: write pypi:NAME==VERSION.")
        return PypiSource(*match.groups())
    if scheme in URL_SCHEMES and rest.startswith("//"):
        return _parse_url(uri)
    raise SourceError(f"Source {uri!r} has the unknown scheme {scheme!r}: write {FORMS}.")


def _parse_hub(uri: str, rest: str) -> HubSource:
    match = re.fullmatch(r"(datasets/)?([\w.-]+/[\w.-]+)@([\w./-]+)", rest)
    if not match:
        raise SourceError(f"Source {uri!r} must name a repository and a revision: write hub:ORG/NAME@REV or hub:datasets/ORG/NAME@REV.")
    datasets, repo, revision = match.groups()
    kind, current = "dataset" if datasets else "model", RENAMED.get(repo.lower()) if datasets else None
    return HubSource(kind, current, revision, repo) if current else HubSource(kind, repo, revision)


def _parse_url(uri: str) -> UrlSource:
    if urlsplit(uri).password is not None:  # not shown: it would be in logs and manifests
        raise SourceError("The URL of a source holds a password. Take it out and give it through the environment of the fsspec driver.")
    if not urlsplit(uri).netloc and not uri.startswith("memory:"):
        raise SourceError(f"Source {uri!r} names no host or bucket. Write SCHEME://HOST/PATH.")
    return UrlSource(uri)


def matches(path: str, globs: Sequence[str]) -> bool:
    """Whether a relative path is wanted.  No globs: everything is."""
    return not globs or any(
        fnmatch.fnmatchcase(path, glob) or (glob.startswith("**/") and fnmatch.fnmatchcase(path, glob[3:])) for glob in globs
    )


def select_paths(paths: Iterable[str], globs: Sequence[str], what: str) -> list[str]:
    """The wanted paths, sorted.  Raises SourceError when a glob finds nothing: a typo must not shrink a source."""
    paths = sorted(paths)
    for glob in globs:
        if not any(matches(path, (glob,)) for path in paths):
            shown = ", ".join(paths[:8]) + (", …" if len(paths) > 8 else "")
            raise SourceError(f"{what} has no file that matches {glob!r}. Mend the glob; its files are: {shown or 'none'}.")
    if not paths:
        raise SourceError(f"{what} has no files. Check that it is the right source.")
    return [path for path in paths if matches(path, globs)]


def wanted_files(config: SourceConfig, paths: list[str], what: str) -> list[str]:
    """The files to keep: the include globs, and the GGUF file when there is one."""
    globs = (*config.include, config.gguf_file) if config.gguf_file and config.include else config.include
    if config.gguf_file and config.gguf_file not in paths:
        held = ", ".join(path for path in paths if path.endswith(".gguf")) or "none"
        raise SourceError(f"{what} has no file {config.gguf_file!r} (gguf_file). Its GGUF files: {held}.")
    if outside := [path for path in paths if path.startswith("/") or ".." in path.split("/")]:
        raise SourceError(f"{what} lists the file {outside[0]!r}, which would be written outside of its folder. Do not use this source.")
    chosen = select_paths(paths, globs, what)
    return [config.gguf_file] if config.gguf_file and not config.include else chosen


def check_digest(config: SourceConfig, path: Path, what: str) -> str:
    """SHA-256 of a fetched file; raises SourceError when the recipe pins another one."""
    actual = digest_bytes(path)
    if config.sha256 and actual != config.sha256:
        raise SourceError(
            f"{what}: {path.name} has the SHA-256 {actual}, but the recipe pins {config.sha256}. "
            "If the file was republished on purpose, check it and pin the new digest; otherwise do not use it."
        )
    return actual


def check_single(config: SourceConfig, base: Path, paths: list[str], what: str) -> str:
    """`check_digest` of the one file that a source selects; raises SourceError when it selects more."""
    if len(paths) != 1:
        raise SourceError(f"{what} pins a sha256, which is of one file, but selects {len(paths)} files. Narrow `include` or drop the pin.")
    return check_digest(config, base / paths[0], what)


def list_local(root: Path) -> Iterator[Path]:
    """Regular files of a local source in the order of their relative paths; links to files count as files."""
    if root.is_file():
        yield root
        return
    found: list[Path] = []
    for folder, names, files in os.walk(root):
        names[:] = [name for name in names if name not in SKIPPED_DIRECTORIES]
        found += [path for name in files if (path := Path(folder, name)).is_file()]
    yield from sorted(found, key=lambda path: path.relative_to(root).as_posix())


def require_local(source: LocalSource) -> Path:
    """The path of a local source.  Raises SourceError when there is nothing, naming the place looked at."""
    if not source.path.exists():
        raise SourceError(f"There is no file or directory {source.path} (looked in {Path.cwd()}). Check the path of this source.")
    return source.path


def digest_bytes(path: Path) -> str:
    """SHA-256 of a file, as lower-case hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def local_digest(uri: str) -> str | None:
    """Content digest of a local source, for the fingerprint; None for sources that are pinned by their reference.

    SHA-256 over the sorted relative paths and the SHA-256 of each file.  Digests are remembered by (path, inode, size, mtime)
    in the user's cache directory, so planning with a large local model stays cheap.  Raises SourceError for a missing path.
    """
    source = parse_uri(uri)
    if not isinstance(source, LocalSource):
        return None
    root = require_local(source)
    memory = _DigestMemory()
    whole = hashlib.sha256()
    for path in list_local(root):
        relative = path.name if root.is_file() else path.relative_to(root).as_posix()
        whole.update(f"{relative}\0{memory.digest(path)}\n".encode())
    memory.save()
    return whole.hexdigest()


class _DigestMemory:
    """Digests of local files that have not changed since they were last read.  Losing it costs time, nothing else."""

    def __init__(self) -> None:
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        self.path = Path(cache) / "pesc" / "digests.json"
        self.entries: dict[str, list[str]] = {}
        self.changed = False
        try:
            loaded = json.loads(self.path.read_text())
            self.entries = loaded if isinstance(loaded, dict) else {}
        except (OSError, ValueError):
            pass

    def digest(self, path: Path) -> str:
        stat = path.stat()
        key, stamp = str(path.resolve()), f"{stat.st_ino}:{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ctime_ns}"
        known = self.entries.get(key)
        if known and len(known) == 2 and known[0] == stamp:
            return known[1]
        digest = digest_bytes(path)
        if time.time_ns() - max(stat.st_mtime_ns, stat.st_ctime_ns) > _SETTLED_NS:
            self.entries[key], self.changed = [stamp, digest], True
        return digest

    def save(self) -> None:
        if not self.changed:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self.path.parent, delete=False) as stream:
                json.dump(self.entries, stream)
            os.replace(stream.name, self.path)
        except OSError:  # a read-only home is no reason to fail a plan
            pass
