"""The version of a store's layout: the file `format` in its root, and how an older store becomes one of today.

    1   no file `format`
    2   manifests list the records that lie beside them (logs, events)

A store of an older format can be read. The first write brings it up to date where that changes nothing that a reader needs; else
`pesc migrate` does, when it is told. One of a newer format is refused with a sentence. Migrations may be killed and run again.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pesc.errors import StoreError
from pesc.store.digest import FileEntry, digest_file, list_files
from pesc.store.disk import take_lock, write_atomic

STORE_FORMAT = 2
FORMAT_NAME = "format"
MANIFEST_NAME, PREFECT_NAME, REMOTES_NAME = "manifest.json", "prefect.json", "remotes.json"
OWN_NAMES = (MANIFEST_NAME, PREFECT_NAME, REMOTES_NAME)
"""Files in an action's directory that are the store's own; what else lies there are records."""


@dataclass(frozen=True)
class Migration:
    """From one format to the next.  automatic: changes nothing that a reader of the older format needs, and is done at the first write."""

    what: str
    run: Callable[[Path], int]
    automatic: bool


def read_format(root: Path) -> int:
    """The format of a store; today's for one that holds nothing yet.  Raises StoreError for one that is newer, or no number."""
    try:
        text = (root / FORMAT_NAME).read_text(encoding="ascii", errors="replace").strip()
    except (FileNotFoundError, NotADirectoryError):
        return 1 if any((root / name).is_dir() for name in ("objects", "actions")) else STORE_FORMAT
    if not text.isdigit() or int(text) < 1:
        raise StoreError(
            f"{root / FORMAT_NAME} holds {text[:20]!r} and no format's number. Was this store made by pesc? If so write {STORE_FORMAT} there."
        )
    if int(text) > STORE_FORMAT:
        raise StoreError(
            f"The store {root} has format {text}, and this pesc knows {STORE_FORMAT}. Use a newer pesc, or another store with --store or PESC_STORE."
        )
    return int(text)


def prepare(root: Path) -> None:
    """Before a write: stamp a new store, bring an older one up to date.  Raises StoreError when that wants `pesc migrate`."""
    found = read_format(root)
    if any(not MIGRATIONS[number].automatic for number in range(found, STORE_FORMAT)):
        raise StoreError(f"The store {root} has the older format {found}. `pesc migrate --store {root}` brings it to {STORE_FORMAT}.")
    if found < STORE_FORMAT or not (root / FORMAT_NAME).exists():
        migrate(root)


def migrate(root: Path) -> list[str]:
    """Bring a store to today's format; what was done, in words.  Raises StoreError for a newer one."""
    done = []
    with _lock(root):
        for number in range(read_format(root), STORE_FORMAT):
            count = MIGRATIONS[number].run(root)
            write_atomic(root / FORMAT_NAME, f"{number + 1}\n".encode())
            done.append(f"format {number} → {number + 1}: {MIGRATIONS[number].what} ({count} changed)")
        if not (root / FORMAT_NAME).exists():
            write_atomic(root / FORMAT_NAME, f"{STORE_FORMAT}\n".encode())
    return done


@contextlib.contextmanager
def _lock(root: Path) -> Iterator[None]:
    root.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(root / f".{FORMAT_NAME}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        take_lock(descriptor, fcntl.LOCK_EX, root)
        yield
    finally:
        os.close(descriptor)


def records_in(action: Path) -> list[FileEntry]:
    """What lies in an action's directory beside the store's own files."""
    paths = ((path, path.relative_to(action).as_posix()) for path in list_files(action)) if action.is_dir() else ()
    return [
        FileEntry(name, path.stat().st_size, digest_file(path))
        for path, name in paths
        if name not in OWN_NAMES and not name.startswith(".")
    ]


def _list_records(root: Path) -> int:
    """1 → 2.  A manifest that cannot be read is left for fsck."""
    changed = 0
    for path in sorted(root.glob(f"actions/*/*/{MANIFEST_NAME}")):
        with contextlib.suppress(ValueError, StoreError):
            manifest, stat = json.loads(path.read_bytes()), path.stat()
            records = [entry.__dict__ for entry in records_in(path.parent)]
            if isinstance(manifest, dict) and "records" not in manifest and records:
                write_atomic(path, json.dumps({**manifest, "records": records}, indent=1, ensure_ascii=False).encode())
                os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # `gc` goes by it
                changed += 1
    return changed


MIGRATIONS = {1: Migration("manifests list the records beside them", _list_records, automatic=True)}
