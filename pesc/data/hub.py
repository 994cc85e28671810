"""Files of the hub at one commit: resumed after a cut connection, and checked against the digests that the hub lists.

The hub's own client starts a file anew in each process; models are large and lines are cut, so files are fetched here one request a
file with what is there already, and are what the hub says they are before they count as fetched.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from pesc.data.config import SourceConfig
from pesc.data.sources import HubSource, check_single, wanted_files
from pesc.errors import SourceError, TransientSourceError
from pesc.stage import StageContext

log = logging.getLogger(__name__)
_CONNECTIONS = 4
_REPORT_SECONDS = 0.5
_RESUMES = "files and parts of files that have arrived are kept, so running again resumes"


def fetch_hub(source: HubSource, config: SourceConfig, target: Path, ctx: StageContext) -> dict[str, Any]:
    """Fill `target` with the wanted files; returns the commit and what else provenance should know.

    A moving revision is resolved to its commit first.  What has arrived stays in `ctx.work` until all is there.  Raises SourceError,
    TransientSourceError when another try may help.
    """
    from huggingface_hub import HfApi

    what = f"Source {config.uri!r}"
    with _hub_errors(source, what):
        info = HfApi().repo_info(source.repo, repo_type=source.kind, revision=source.revision, files_metadata=True)
    commit = info.sha
    if not commit:
        raise SourceError(f"{what}: the hub does not say which commit {source.revision!r} is. Pin a commit.")
    listed = {item.rfilename: item for item in getattr(info, "siblings", None) or [] if item.rfilename != ".gitattributes"}
    names = wanted_files(config, sorted(listed), what)
    staging = ctx.work / f"snapshot-{commit}"
    for old in ctx.work.glob("snapshot-*"):  # the branch has moved since a run that was cut off
        if old != staging:
            shutil.rmtree(old)
    _Snapshot(source, commit, what, staging, ctx).fetch([listed[name] for name in names])
    facts = {"sha256": check_single(config, staging, names, what)} if config.sha256 else {}
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.move(staging / name, target / name)
    shutil.rmtree(staging)
    renamed = {"requested_repository": source.requested_repo} if source.requested_repo else {}
    return {"repository": source.repo, **renamed, "revision": commit, "requested_revision": source.revision, **facts}


class _StoppedError(Exception):
    """Another file has failed, or the user has pressed Ctrl-C."""


class _Snapshot:
    """Files of one commit on their way into `staging`."""

    def __init__(self, source: HubSource, commit: str, what: str, staging: Path, ctx: StageContext) -> None:
        self.source, self.commit, self.what, self.staging, self.ctx = source, commit, what, staging, ctx
        self.done = self.total = 0
        self.lock = threading.Lock()
        self.stopped = threading.Event()

    def fetch(self, files: list[Any]) -> None:
        """Fetch files (as the hub lists them) side by side.  A failure, or Ctrl-C, ends all of them; their parts are kept."""
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars("huggingface_hub.http_get")
        self.total = sum(file.size or 0 for file in files)
        with ThreadPoolExecutor(_CONNECTIONS) as pool:
            waiting: set[Future[None]] = {pool.submit(self.fetch_file, file) for file in files}
            try:
                while waiting:
                    self.ctx.progress(self.done, self.total, "bytes", f"{self.source.repo}@{self.commit[:12]}")
                    finished, waiting = wait(waiting, timeout=_REPORT_SECONDS, return_when=FIRST_COMPLETED)
                    for future in finished:
                        future.result()
            except BaseException:
                self.stopped.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        self.ctx.progress(self.total, self.total, "bytes", self.source.repo)

    def count(self, size: int) -> None:
        """Note that so many bytes more are there; raises _StoppedError when they are no longer wanted."""
        if self.stopped.is_set():
            raise _StoppedError
        with self.lock:
            self.done += size

    def fetch_file(self, file: Any) -> None:
        """One file: what is there already, the rest by a range request, then its digest."""
        path = self.staging / file.rfilename
        if path.exists():  # checked by the run that put it there
            self.count(file.size or 0)
            return
        part = self.staging / ".parts" / hashlib.sha256(file.rfilename.encode()).hexdigest()
        part.parent.mkdir(parents=True, exist_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        with _hub_errors(self.source, self.what):
            self._download(file, part)
        self._check(file, part)
        part.replace(path)

    def _download(self, file: Any, part: Path) -> None:
        from huggingface_hub import constants, hf_hub_download, hf_hub_url
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import build_hf_headers

        place: dict[str, Any] = {"repo_type": self.source.kind, "revision": self.commit}
        if (file.size or 0) > constants.MAX_HTTP_DOWNLOAD_SIZE:  # plain HTTP does not serve these
            shutil.move(hf_hub_download(self.source.repo, file.rfilename, local_dir=part.parent / "large", **place), part)
            return
        held = part.stat().st_size if part.exists() else 0
        if file.size is not None and held > file.size:
            part.unlink()
            held = 0
        self.count(held)
        url = hf_hub_url(self.source.repo, file.rfilename, **place)
        headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
        with _Part(part, self.count) as sink:
            http_get(url, sink, resume_size=held, headers=headers, expected_size=file.size)

    def _check(self, file: Any, part: Path) -> None:
        """Raises SourceError, and forgets the bytes, when they are not those of the commit."""
        kind, expected, actual = _digests(file, part)
        if expected is None:
            log.warning("%s: the hub lists no digest of %s, which is taken as it came", self.what, file.rfilename)
        elif actual != expected:
            part.unlink()
            raise SourceError(
                f"{self.what}: {file.rfilename} has the {kind} {actual}, but the hub lists {expected} for commit {self.commit[:12]}. "
                "What arrived was deleted. Run again; if it comes again, do not use this source or the proxy in between."
            )


class _Part(io.BufferedWriter):
    """A file that grows at its end and says by how much."""

    def __init__(self, path: Path, on_bytes: Callable[[int], None]) -> None:
        super().__init__(io.FileIO(path, "ab"))
        self._on_bytes = on_bytes

    def write(self, data: Any) -> int:
        self._on_bytes(len(data))
        return super().write(data)


def _digests(file: Any, path: Path) -> tuple[str, str | None, str]:
    """(kind, as listed, of the file): SHA-256 of what lies in large-file storage, else the id of a git blob."""
    listed = getattr(file.lfs, "sha256", None) if file.lfs else None
    digest = hashlib.sha256() if listed or not file.blob_id else hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return ("SHA-256" if digest.name == "sha256" else "git id"), listed or file.blob_id, digest.hexdigest()


@contextlib.contextmanager
def _hub_errors(source: HubSource, what: str) -> Iterator[None]:
    """Turn the hub client's failures into sentences."""
    from huggingface_hub import errors

    http_error: type[Exception] = errors.HfHubHTTPError.__mro__[1]  # of the HTTP library that this client uses
    kind = "data set" if source.kind == "dataset" else "model"
    access = "Ask for access on its page and log in with `hf auth login` (or set HF_TOKEN)."
    try:
        yield
    except errors.GatedRepoError:
        raise SourceError(f"{what}: the {kind} {source.repo} is gated. {access}") from None
    except errors.RevisionNotFoundError:
        raise SourceError(
            f"{what}: the {kind} {source.repo} has no revision {source.revision!r}. Check the branch, tag or commit."
        ) from None
    except errors.RepositoryNotFoundError:
        raise SourceError(f"{what}: the hub has no {kind} {source.repo}, or it is private. Check the name. {access}") from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        kind_of_error = TransientSourceError if status is None or status == 429 or status >= 500 else SourceError
        raise kind_of_error(f"{what}: {_explain_status(status)}") from None
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError, ConnectionError, http_error) as error:
        if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
            raise SourceError(f"{what} cannot be fetched: HF_HUB_OFFLINE is set. Unset it, or point the source at a local copy.") from None
        log.debug("hub failure", exc_info=error)
        raise TransientSourceError(
            f"{what} cannot be fetched: there is no network to the hub. Check the connection, or point the source at a local copy; {_RESUMES}."
        ) from None
    except OSError as error:
        if error.errno:  # a full disk is explained elsewhere
            raise
        raise TransientSourceError(f"{what}: the hub sent a file of another size than it lists. Run again: {_RESUMES}.") from None


def _explain_status(status: int | None) -> str:
    if status in (401, 403):
        return f"the hub refuses access (HTTP {status}). Log in with `hf auth login` (or set HF_TOKEN) with a token that may read it."
    if status == 404:
        return "the hub lists a file that it does not have (HTTP 404). Run again; if it stays so, pin another commit."
    if status == 429:
        return f"the hub says too many requests (HTTP 429). Wait some minutes and run again; {_RESUMES}."
    return f"the hub answered with HTTP {status}. Run again later; {_RESUMES}."
