"""What s3fs, gcsfs and the file system raise about a remote, as sentences.  Their own texts stay out: they may hold signed URLs."""

from __future__ import annotations

import errno
import os
from urllib.parse import urlsplit

from pesc.errors import RemoteError, TransientRemoteError

DRIVERS = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"}
"""Scheme of a URL -> package."""


def _chain(error: BaseException) -> list[BaseException]:
    found: list[BaseException] = []
    item: BaseException | None = error
    while item is not None and item not in found:
        found.append(item)
        item = item.__cause__ or item.__context__
    return found


def http_of(error: BaseException) -> tuple[int | None, str]:
    """HTTP status and error code of what a driver raised, where it knows them."""
    for item in _chain(error):
        response = getattr(item, "response", None)
        if isinstance(response, dict):
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            return status, str(response.get("Error", {}).get("Code", ""))
        for name in ("status", "code"):
            if isinstance(status := getattr(item, name, None), int):
                return status, ""
    return None, ""


def explain(error: Exception, url: str, tries: int) -> RemoteError:
    """What a driver raised, as a sentence."""
    status, code = http_of(error)
    kinds = {type(item).__name__ for item in _chain(error)}
    number = error.errno if isinstance(error, OSError) else None
    if isinstance(error, ImportError):
        driver = DRIVERS.get(urlsplit(url).scheme, "")
        extra = "s3" if driver == "s3fs" else "gcs"
        return RemoteError(f"The remote {url} needs the package {driver}, which is not installed: pip install 'pesc[{extra}]'.")
    if code == "NoSuchBucket" or isinstance(error, FileNotFoundError):
        return RemoteError(
            f"The remote {url} is not there: no such bucket, or these credentials may not see it. Make it, or correct PESC_REMOTE."
        )
    refused = {
        "NoCredentialsError",
        "PartialCredentialsError",
        "CredentialRetrievalError",
        "DefaultCredentialsError",
        "TokenRetrievalError",
    }
    if isinstance(error, PermissionError) or status in (401, 403) or kinds & refused:
        return RemoteError(
            f"The remote {url} refuses access{f' ({code})' if code else ''}. Reading needs the right to list, get and see objects, pushing the "
            "right to put and delete them; give credentials where the driver of this URL looks for them."
        )
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        return RemoteError(f"The remote {url} cannot be written: {os.strerror(number)}.")
    refuses = status is not None and 400 <= status < 500 and status not in (408, 409, 425, 429) and code != "RequestTimeout"
    if refuses or isinstance(error, ValueError) or "ParamValidationError" in kinds:
        return RemoteError(
            f"The remote {url} refuses the request ({code or (f'HTTP {status}' if status else type(error).__name__)}). Check the URL."
        )
    cause = code or (f"HTTP {status}" if status else type(_chain(error)[-1]).__name__)
    times = f" in {tries} tries" if tries > 1 else ""
    return TransientRemoteError(
        f"The remote {url} did not answer{times} ({cause}). Check the connection and run again: what has been moved is kept. "
        "Without PESC_REMOTE, pesc works with the store of this machine alone."
    )
