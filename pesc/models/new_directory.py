"""A directory that appears whole or not at all.

    with new_directory(Path("models/sparse")) as building:
        ...                                      # fill `building`

Contract: `out` is refused before anything is built when it is there and not empty.  The files are synced, then the directory is renamed; on an
error, a full disk or Ctrl-C everything is removed again, parents that were made for it included.

Pitfall: a process that is killed outright leaves `.NAME.XXXX.partial` beside `out`; it is never read, and can be deleted.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from pesc.errors import CancelledError, ModelError, StoreError, disk_sentence
from pesc.store.disk import sync_path


@contextlib.contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """The empty sibling of `out` that becomes it.  Raises ModelError for an `out` in use or a disk that refuses, CancelledError on Ctrl-C."""
    place = check_free(out)
    made, building = [], place.parent / f".{place.name}.{secrets.token_hex(4)}.partial"
    try:
        made = _make_parents(place.parent)
        building.mkdir()
        yield building
        _sync_tree(building)
        os.rename(building, place)  # over an empty directory, if there is one
        sync_path(place.parent)
    except BaseException as error:
        shutil.rmtree(building, ignore_errors=True)
        for directory in reversed(made):
            with contextlib.suppress(OSError):
                directory.rmdir()
        if isinstance(error, KeyboardInterrupt):
            raise CancelledError(f"Interrupted: nothing was written to {out}.") from None
        if isinstance(error, OSError):
            raise ModelError(_sentence(error, out)) from error
        raise


@contextlib.contextmanager
def emptied_on_failure(out: Path) -> Iterator[None]:
    """For a directory that is there already: whatever stops the work inside, nothing is left in it.  A disk that refuses is a StoreError."""
    try:
        yield
    except BaseException as error:
        for path in out.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if isinstance(error, OSError) and (sentence := disk_sentence(error, out.parent)):
            raise StoreError(sentence) from error
        raise


def check_free(out: Path) -> Path:
    """Where `out` is.  Raises ModelError when it cannot become a new directory; for long work, ask before it."""
    place = out.expanduser().resolve()
    if place.is_dir() and any(place.iterdir()):
        raise ModelError(f"{out} is not empty: give a new directory with --out, or remove that one first.")
    if place.exists() and not place.is_dir():
        raise ModelError(f"{out} is a file: give a new directory with --out.")
    return place


def _make_parents(parent: Path) -> list[Path]:
    """Make the directories that are missing above; returns them, outermost first."""
    missing = [path for path in (parent, *parent.parents) if not path.exists()][::-1]
    parent.mkdir(parents=True, exist_ok=True)
    return missing


def _sentence(error: OSError, out: Path) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"The disk of {out} is full, so nothing was written: free space, or give a directory on another disk with --out."
    if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
        return f"{out} was filled by another program in the meantime, so nothing was written: give a new directory with --out."
    return f"{error.filename or out} cannot be used ({error.strerror or error}), so nothing was written to {out}."


def _sync_tree(directory: Path) -> None:
    for path in directory.rglob("*"):
        sync_path(path)
    sync_path(directory)
