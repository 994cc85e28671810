"""Where the bytes of a remote lie: a directory (a disk, NFS), or a bucket through fsspec (s3fs, gcsfs).

Key contracts
- A name is there with all its bytes or not at all: a directory gets a temporary file that is renamed, a bucket does so by itself.
- `create` never replaces: of several writers at the same moment one is told True (`If-None-Match` on S3, `ifGenerationMatch` on Google's
  storage, a hard link in a directory).
- What may pass (no connection, a busy server) is tried again; everything else is a sentence at once. What drivers say themselves is left
  out of it: it may hold signed URLs.
- The bucket or the directory is there before; nothing here makes it, because a typing error would.

Pitfall: a server that speaks S3 but ignores `If-None-Match` tells two writers True. Both then build the same bytes: wasteful, not wrong.
"""

from __future__ import annotations

import contextlib
import glob
import logging
import os
import random
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from pesc.errors import PescError, RemoteError, TransientRemoteError
from pesc.store.driver_errors import DRIVERS, explain, http_of
from pesc.store.machine import is_alive, machine, machine_mark

logger = logging.getLogger(__name__)
T = TypeVar("T")
OnBytes = Callable[[int], None]
"""Told how many more bytes have been moved (fewer than none when a part has to go again); may raise `Stopped`."""

TRIES = 5
FIRST_WAIT_SECONDS = 0.5
_LEFT_SECONDS = 7 * 86_400
_PART = 16 << 20
_BLOCK = 1 << 20  # much larger ones are slower: each is memory that the kernel has to clear


class Stopped(Exception):
    """Whoever waits for a transfer has gone."""


class Place(ABC):
    """Named bytes at a URL.  Names are relative, with '/'.  Every method may raise RemoteError or TransientRemoteError."""

    tries = TRIES

    def __init__(self, url: str) -> None:
        self.url = url

    def read(self, name: str, tries: int | None = None) -> bytes | None:
        """All bytes of a small file, or None when it is not there."""
        return self._try(lambda: self._read(name), tries)

    def read_range(self, name: str, start: int, stop: int) -> bytes | None:
        """The bytes from `start` to before `stop`, or None when the file is not there."""
        return self._try(lambda: self._read(name, start, stop))

    def size(self, name: str) -> int | None:
        """Bytes of a file, or None when it is not there."""
        return self._try(lambda: self._size(name))

    def write(self, name: str, data: bytes, tries: int | None = None) -> None:
        """Write a small file, over an earlier one too."""
        self._try(lambda: self._write(name, data), tries)

    def create(self, name: str, data: bytes) -> bool:
        """Write a small file that is not there yet; False, and nothing is changed, when it is."""
        return self._try(lambda: self._create(name, data))

    def upload(self, path: Path, name: str, on_bytes: OnBytes) -> None:
        """Send a local file."""

        def send() -> None:
            sent = 0

            def count(more: int) -> None:
                nonlocal sent
                sent += more
                on_bytes(more)

            try:
                self._upload(path, name, count)
            except BaseException:
                on_bytes(-sent)
                raise

        self._try(send)

    def names(self, prefix: str) -> list[str]:
        """Names of the files below a folder, sorted."""
        return sorted(self._try(lambda: self._names(prefix)))

    def remove(self, name: str, tries: int | None = None) -> None:
        """Remove a file; one that is not there is no error."""
        self._try(lambda: self._remove(name), tries)

    def _try(self, action: Callable[[], T], tries: int | None = None) -> T:
        tries = tries or self.tries
        for attempt in range(1, tries + 1):
            try:
                return action()
            except (PescError, Stopped, TypeError, AttributeError, NameError, AssertionError):  # the last ones are defects
                raise
            except Exception as error:
                failure = explain(error, self.url, tries)
                if not isinstance(failure, TransientRemoteError) or attempt == tries:
                    raise failure from error
                logger.debug("try %d of %d at %s", attempt, tries, self.url, exc_info=error)
                time.sleep(FIRST_WAIT_SECONDS * 2 ** (attempt - 1) * random.uniform(0.75, 1.25))
        raise AssertionError("tries is at least 1")

    @abstractmethod
    def _read(self, name: str, start: int = 0, stop: int | None = None) -> bytes | None: ...

    @abstractmethod
    def _size(self, name: str) -> int | None: ...

    @abstractmethod
    def _write(self, name: str, data: bytes) -> None: ...

    @abstractmethod
    def _create(self, name: str, data: bytes) -> bool: ...

    @abstractmethod
    def _upload(self, path: Path, name: str, on_bytes: OnBytes) -> None: ...

    @abstractmethod
    def _names(self, prefix: str) -> list[str]: ...

    @abstractmethod
    def _remove(self, name: str) -> None: ...


class DirectoryPlace(Place):
    """A directory that several machines see."""

    def __init__(self, url: str, root: Path) -> None:
        super().__init__(url)
        self._root = root

    def _read(self, name: str, start: int = 0, stop: int | None = None) -> bytes | None:
        def read(path: Path) -> bytes:
            with path.open("rb") as stream:
                stream.seek(start)
                return stream.read() if stop is None else stream.read(stop - start)

        return self._if_there(name, read)

    def _size(self, name: str) -> int | None:
        return self._if_there(name, lambda path: path.stat().st_size)

    def _if_there(self, name: str, action: Callable[[Path], T]) -> T | None:
        """What an action gives of a file, or None.  NFS remembers for a while that a file was not there, unless its folder is opened."""
        path = self._root / name
        try:
            return action(path)
        except FileNotFoundError:
            self._must_be_there()
        try:
            os.close(os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY))
            return action(path)
        except FileNotFoundError:
            return None

    def _write(self, name: str, data: bytes) -> None:
        with self._new_file(name) as (target, temporary):
            temporary.write_bytes(data)
            temporary.replace(target)

    def _create(self, name: str, data: bytes) -> bool:
        with self._new_file(name) as (target, temporary):
            temporary.write_bytes(data)
            try:
                os.link(temporary, target)
            except FileExistsError:
                return False
        return True

    def _upload(self, path: Path, name: str, on_bytes: OnBytes) -> None:
        with self._new_file(name) as (target, temporary), path.open("rb") as source:
            with temporary.open("wb") as sink:
                while block := source.read(_BLOCK):
                    sink.write(block)
                    on_bytes(len(block))
                sink.flush()
                os.fsync(sink.fileno())
            temporary.chmod(0o444)
            temporary.replace(target)

    def _names(self, prefix: str) -> list[str]:
        self._must_be_there()
        folder = self._root / prefix
        return [p.relative_to(self._root).as_posix() for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".")]

    def _remove(self, name: str) -> None:
        (self._root / name).unlink(missing_ok=True)

    @contextlib.contextmanager
    def _new_file(self, name: str) -> Iterator[tuple[Path, Path]]:
        """The place of a name and a temporary file beside it, which is gone afterwards; so are those that a killed process has left.

        Whether a process lives is known of this machine alone; what others have left goes when it is a week old.
        """
        self._must_be_there()
        target = self._root / name
        target.parent.mkdir(parents=True, exist_ok=True)
        for left in target.parent.glob(f".{glob.escape(target.name)}.*"):
            if _is_left(left.name.removeprefix(f".{target.name}."), left):
                left.unlink(missing_ok=True)
        temporary = target.with_name(f".{target.name}.{machine_mark()}.{os.getpid()}.{random.getrandbits(32):x}")
        try:
            yield target, temporary
        finally:
            temporary.unlink(missing_ok=True)

    def _must_be_there(self) -> None:
        if not self._root.is_dir():
            raise RemoteError(f"The remote {self.url} is not there: no such directory. Mount it or make it, or correct PESC_REMOTE.")


class BucketPlace(Place):
    """A bucket, or a folder of one, through fsspec."""

    def __init__(self, url: str, options: dict[str, Any]) -> None:
        super().__init__(url)
        self._options = options
        self._opened: tuple[int, Any, str] | None = None

    def _files(self) -> tuple[Any, str]:
        """The driver and the root.  Drivers keep a thread: a forked process needs one of its own."""
        if self._opened is None or self._opened[0] != os.getpid():
            from fsspec.core import url_to_fs

            driver, root = url_to_fs(self.url, skip_instance_cache=True, use_listings_cache=False, **self._options)
            driver.retries = 1  # s3fs's own; it would multiply with those here
            self._opened = os.getpid(), driver, root.rstrip("/")
        return self._opened[1:]

    def _read(self, name: str, start: int = 0, stop: int | None = None) -> bytes | None:
        driver, root = self._files()
        try:
            return driver.cat_file(f"{root}/{name}", start=start, end=stop)
        except FileNotFoundError as error:
            return _absent(error)
        except Exception as error:
            if http_of(error)[0] != 416:  # the range lies behind the end
                raise
            return b""

    def _size(self, name: str) -> int | None:
        driver, root = self._files()
        try:
            found = driver.info(f"{root}/{name}")
        except FileNotFoundError as error:
            return _absent(error)
        return found["size"] if found["type"] == "file" else None

    def _write(self, name: str, data: bytes) -> None:
        driver, root = self._files()
        driver.pipe_file(f"{root}/{name}", data)

    def _create(self, name: str, data: bytes) -> bool:
        driver, root = self._files()
        try:
            driver.pipe_file(f"{root}/{name}", data, mode="create")
        except FileExistsError:
            return False
        except Exception as error:
            status, code = http_of(error)
            if status == 412 or code == "PreconditionFailed":
                return False
            if status != 501 and code != "NotImplemented":
                raise
            if self._size(name) is not None:  # a server without conditional writes: the last resort
                return False
            driver.pipe_file(f"{root}/{name}", data)
        return True

    def _upload(self, path: Path, name: str, on_bytes: OnBytes) -> None:
        from fsspec.callbacks import Callback

        class Count(Callback):
            def absolute_update(self, value: int) -> None:
                self.relative_update(value - self.value)

            def relative_update(self, inc: int = 1) -> None:
                self.value += inc
                on_bytes(inc)

        driver, root = self._files()
        part = max(_PART, -(-path.stat().st_size // 9000) >> 18 << 18)  # at most 10,000 parts, of whole 256 KiB
        driver.put_file(str(path), f"{root}/{name}", callback=Count(), chunksize=part)

    def _names(self, prefix: str) -> list[str]:
        driver, root = self._files()
        return [place.removeprefix(f"{root}/") for place in driver.find(f"{root}/{prefix}")]

    def _remove(self, name: str) -> None:
        driver, root = self._files()
        with contextlib.suppress(FileNotFoundError):
            driver.rm_file(f"{root}/{name}")


def open_place(url: str) -> Place:
    """The place at a URL or a path.  Nothing is asked of it yet.  Raises RemoteError for a URL that cannot be one."""
    parts = urlsplit(url)
    if parts.password or parts.username:
        raise RemoteError(
            "The URL of the remote holds a name or a password. Take it out and give it through the environment of the driver."
        )
    if parts.scheme in ("", "file"):
        root = Path(parts.path if parts.scheme else url)
        if not root.is_absolute():
            raise RemoteError(f"The remote {url!r} must be an absolute path, or s3://bucket/path or gs://bucket/path.")
        return DirectoryPlace(url, root)
    if parts.scheme not in (*DRIVERS, "memory"):
        raise RemoteError(f"The remote {url!r} has an unknown scheme. Known are s3://, gs:// and file:// (or an absolute path).")
    if not parts.netloc or parts.query or parts.fragment:
        raise RemoteError(f"The remote {url!r} must be of the form {parts.scheme}://bucket/path.")
    patience = {"connect_timeout": 10, "read_timeout": 60, "retries": {"mode": "standard", "max_attempts": 1}, "max_pool_connections": 64}
    return BucketPlace(url.rstrip("/"), {"config_kwargs": patience} if parts.scheme in ("s3", "s3a") else {})


def _is_left(ending: str, path: Path) -> bool:
    """Whether whoever wrote a temporary file, called NAME.`ending`, has gone."""
    mark, _, rest = ending.partition(".")
    pid = rest.partition(".")[0]
    if machine() and mark == machine_mark() and pid.isdigit():
        return not is_alive(int(pid))
    try:
        return time.time() - path.stat().st_mtime > _LEFT_SECONDS
    except FileNotFoundError:
        return False


def _absent(error: FileNotFoundError) -> None:
    """None for a file that is not there; raises when it is the bucket."""
    if http_of(error)[1] == "NoSuchBucket":
        raise error
