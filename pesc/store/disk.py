"""Writing to this disk so that a crash leaves the old bytes or the new ones; and locks on it."""

from __future__ import annotations

import errno
import fcntl
import os
import tempfile
from pathlib import Path

from pesc.errors import StoreError


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that a reader sees the old bytes or the new ones, whatever happens in between."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        Path(name).chmod(0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    sync_path(path.parent)


def sync_path(path: Path) -> None:
    """Wait until a file's bytes, or a directory's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def take_lock(descriptor: int, kind: int, root: Path) -> bool:
    """Take a lock of `flock`; False when it would have to wait and may not.  Raises StoreError on a file system without locks."""
    try:
        fcntl.flock(descriptor, kind)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise StoreError(
                f"The file system of {root} gives no locks ({error.strerror}), and without them two processes would build in one place. "
                "Mount it with locks (NFS: version 4, or lockd and no `nolock`), or put the store elsewhere (PESC_STORE)."
            ) from None
        raise
    return True
