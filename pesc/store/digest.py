"""Digests of values, files and trees.  SHA-256 throughout, as lower-case hex."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pesc.errors import StoreError


@dataclass(frozen=True)
class FileEntry:
    """One file of a tree: its path with '/', its size in bytes, and the SHA-256 of its bytes."""

    path: str
    size: int
    sha256: str


def canonical_json(value: Any) -> bytes:
    """The one spelling of a JSON value: sorted keys, no spaces, UTF-8, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def digest_json(value: Any) -> str:
    """SHA-256 of a value's canonical JSON."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def digest_file(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def list_files(root: Path) -> Iterator[Path]:
    """Regular files below `root`, sorted by relative path.  Raises StoreError for a link or a special file."""
    for path in sorted(root.rglob("*"), key=lambda p: p.relative_to(root).as_posix()):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise StoreError(f"{path} is a link or a special file; objects hold regular files only. Replace it by a copy.")
        if path.is_file():
            yield path


def digest_tree(root: Path) -> tuple[str, list[FileEntry]]:
    """Digest and listing of a directory.  Empty directories and permissions do not count."""
    paths = list(list_files(root))
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        sums = list(pool.map(digest_file, paths))
    entries = [FileEntry(p.relative_to(root).as_posix(), p.stat().st_size, s) for p, s in zip(paths, sums, strict=True)]
    return digest_json([[e.path, e.size, e.sha256] for e in entries]), entries
