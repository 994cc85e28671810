"""A file or a folder at a URL, through fsspec: s3://, gs://, https:// and others.

Credentials come from where the driver looks for them (environment, profile, instance role), never from the recipe.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

from pesc.data.config import SourceConfig
from pesc.data.sources import UrlSource, check_single, wanted_files
from pesc.errors import PescError, SourceError, TransientSourceError
from pesc.stage import StageContext

log = logging.getLogger(__name__)
_BLOCK = 1 << 20


def fetch_url(source: UrlSource, config: SourceConfig, target: Path, ctx: StageContext) -> dict[str, Any]:
    """Fill `target` with the wanted files; returns the digest of what came, and the ETag of a single file.

    Raises SourceError: nothing there, no access, a missing driver, a wrong digest; TransientSourceError when another try may help.
    """
    what = f"Source {config.uri!r}"
    with _url_errors(what):
        files, places = _list(source)
        names = wanted_files(config, sorted(places), what)
        digests = {}
        for done, name in enumerate(names, start=1):
            path = target / name
            path.parent.mkdir(parents=True, exist_ok=True)
            digests[name] = _copy(files, places[name], path, what)
            ctx.progress(done, len(names), "files", name)
    if config.sha256:
        check_single(config, target, names, what)
    if len(names) == 1:
        return {"sha256": digests[names[0]], **_etag(files, places[names[0]])}
    listing = "".join(f"{name}\0{digest}\n" for name, digest in sorted(digests.items()))
    return {"tree_sha256": hashlib.sha256(listing.encode()).hexdigest()}


def _list(source: UrlSource) -> tuple[Any, dict[str, str]]:
    """The file system, and the files below the URL: relative name -> place."""
    from fsspec.core import url_to_fs

    files, root = url_to_fs(source.url)
    parts = urlsplit(source.url)
    if parts.scheme in ("http", "https"):  # a web page is no folder
        name = PurePosixPath(unquote(parts.path)).name
        if not name:
            raise SourceError(f"Source {source.url!r} names no file. Over HTTP, give the URL of one file.")
        return files, {name: root}
    if files.isfile(root):
        return files, {PurePosixPath(root).name: root}
    base = root.rstrip("/") + "/"
    return files, {place.removeprefix(base): place for place in files.find(root)}


def _copy(files: Any, place: str, path: Path, what: str) -> str:
    """Copy one file; returns its SHA-256.  Raises TransientSourceError when fewer bytes come than are listed."""
    digest, size = hashlib.sha256(), 0
    with files.open(place, "rb") as reader, path.open("wb") as sink:
        listed = getattr(reader, "size", None)
        while block := reader.read(_BLOCK):
            digest.update(block)
            size += len(block)
            sink.write(block)
    if listed is not None and listed != size:
        raise TransientSourceError(f"{what}: {path.name} came with {size} bytes of {listed}. Run the stage again.")
    return digest.hexdigest()


def _etag(files: Any, place: str) -> dict[str, str]:
    """The ETag of a file, when its server gives one."""
    with contextlib.suppress(Exception):
        info = files.info(place)
        if tag := info.get("ETag") or info.get("etag"):
            return {"etag": str(tag).strip('"')}
    return {}


@contextlib.contextmanager
def _url_errors(what: str) -> Iterator[None]:
    """Turn what drivers raise into sentences.  Their own texts are left out: they may hold signed URLs."""
    try:
        yield
    except PescError:
        raise
    except ImportError as error:
        raise SourceError(f"{what} needs a driver that is not installed: {error}.") from None
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):  # of this machine's disk
            raise
        log.debug("URL failure", exc_info=error)
        raise _explain(error, what) from None


def _explain(error: Exception, what: str) -> SourceError:
    """The sentence for what a driver raised.  Drivers wrap their causes: any answer of a web server may come as a missing file."""
    chain = [item for item in (error, error.__cause__, error.__context__) if item is not None]
    status = next((item.status for item in chain if isinstance(getattr(item, "status", None), int)), None)  # type: ignore[attr-defined]
    missing = status is None and isinstance(chain[-1], FileNotFoundError)
    if status == 404 or missing:
        return SourceError(f"{what}: there is nothing at this URL. Check it, and that these credentials may see it.")
    if status in (401, 403) or isinstance(error, PermissionError) or "Credential" in type(error).__name__:
        return SourceError(f"{what}: access is refused. Give credentials where the driver of this URL looks for them.")
    if status == 429:
        return TransientSourceError(f"{what}: the server says too many requests (HTTP 429). Wait some minutes and run again.")
    if status is not None and 400 <= status < 500:
        return SourceError(f"{what}: the server refuses the request (HTTP {status}). Check the URL.")
    cause = f"HTTP {status}" if status else type(chain[-1]).__name__
    return TransientSourceError(f"{what} cannot be fetched ({cause}). Check the connection and run again.")
