"""The remote: where the stores of several machines meet.

    format                            version of this layout
    files/<ab>/<sha256>               bytes, named by themselves: what objects have in common is there once
    actions/<stage>/<fp>.json         a manifest: the commit point, written after all of its files
    replaced/<stage>/<fp>             digest of the result that a refresh has put in the place of an earlier one
    damaged/<sha256>                  somebody has read other bytes than this under files/: the next push sends them again
    leases/<stage>/<fp>/<n>           who is building an action (`pesc.store.lease`)

Key contracts
- An action is there exactly when its manifest is, and then its files are. First writer wins; only a refresh replaces a result.
- Nothing that comes from a remote is believed: a manifest must be that of the action asked for, its paths must stay in their folder,
  its listing must give its digest, and every file its SHA-256.
- A manifest that was found is remembered for as long as the process lives; one that was not is asked for again.

Never: holds a secret. Credentials are the driver's business.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import PurePosixPath

from pydantic import ValidationError

from pesc.errors import RemoteError, StoreError
from pesc.store.digest import digest_json
from pesc.store.layout import OWN_NAMES
from pesc.store.manifest import Manifest, OutputFile
from pesc.store.places import Place, open_place

REMOTE_FORMAT = 1
_HEX = re.compile(r"[0-9a-f]{64}")
_STAGE = re.compile(r"[a-z][a-z0-9_]*")
_OPEN: dict[str, tuple[int, Remote]] = {}


def open_remote(url: str) -> Remote:
    """The remote at a URL; one for the whole process.  Nothing is asked of it yet.  Raises RemoteError for a URL that cannot be one."""
    known = _OPEN.get(url)
    if known is None or known[0] != os.getpid():
        _OPEN[url] = known = os.getpid(), Remote(open_place(url))
    return known[1]


def close_remotes() -> None:
    """Let the next `open_remote` make its driver anew: drivers read credentials once, and those of this process have changed."""
    _OPEN.clear()


class Remote:
    """A remote.  Methods raise RemoteError, or TransientRemoteError when another try may help."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self._known: dict[tuple[str, str], Manifest] = {}
        self._replaced: dict[tuple[str, str], str] | None = None
        self._is_checked = False

    @property
    def url(self) -> str:
        """Its URL, which holds no secret."""
        return self.place.url

    def check(self, tries: int | None = None) -> None:
        """Whether it answers and has a layout that is known here.  Asked once a process."""
        if self._is_checked:
            return
        found = self.place.read("format", tries)
        if found is not None and not (found.strip().isdigit() and int(found) <= REMOTE_FORMAT):
            raise RemoteError(
                f"The remote {self.url} has the format {found[:20].decode(errors='replace').strip()!r}, and this pesc knows {REMOTE_FORMAT}. "
                "Use a newer pesc, or another remote."
            )
        self._is_checked = True

    def manifest(self, stage: str, fingerprint: str, fresh: bool = False) -> Manifest | None:
        """The manifest of an action, or None.  `fresh`: ask again, even when it was found before."""
        if not fresh and (known := self._known.get((stage, fingerprint))):
            return known
        self.check()
        data = self.place.read(_action_name(stage, fingerprint))
        if data is None:
            self._known.pop((stage, fingerprint), None)
            return None
        manifest = _read_manifest(data, stage, fingerprint, f"{self.url}/{_action_name(stage, fingerprint)}")
        self._known[stage, fingerprint] = manifest
        return manifest

    def knows(self, stage: str, fingerprint: str) -> bool:
        """Whether this process has seen the action there.  Asks nothing."""
        return (stage, fingerprint) in self._known

    def forget(self, stage: str, fingerprint: str) -> None:
        """Ask again the next time: somebody may have put another result in its place."""
        self._known.pop((stage, fingerprint), None)
        self._replaced = None

    def replacement(self, stage: str, fingerprint: str) -> str | None:
        """Digest of the result that stands in the place of an earlier one; None for an action that was never replaced."""
        if self._replaced is None:
            self.check()
            names = [name.split("/") for name in self.place.names("replaced")]
            self._replaced = {
                (parts[1], parts[2]): (self.place.read("/".join(parts)) or b"").decode(errors="replace")
                for parts in names
                if len(parts) == 3
            }
        return self._replaced.get((stage, fingerprint))

    def commit(self, manifest: Manifest, replace: bool = False) -> Manifest:
        """Write a manifest whose files are there; returns the one that stands, which is another's when another was first."""
        stage, fingerprint = manifest.key.stage, manifest.fingerprint
        name, data = _action_name(stage, fingerprint), manifest.model_dump_json(indent=1).encode()
        self.check()
        if self.place.read("format") is None:
            self.place.create("format", f"{REMOTE_FORMAT}\n".encode())
        if replace:
            self.place.write(f"replaced/{stage}/{fingerprint}", manifest.output.digest.encode())
            self.place.write(name, data)
        elif not self.place.create(name, data):
            standing = self.manifest(stage, fingerprint, fresh=True)
            if standing is None:
                raise RemoteError(
                    f"The remote {self.url} neither takes nor gives {name}. Look at its rights and rules for deleting, then run again."
                )
            return standing
        self._known[stage, fingerprint] = manifest
        self._replaced = None if replace else self._replaced
        return manifest

    def actions(self) -> Iterator[tuple[str, str]]:
        """Stage and fingerprint of every action."""
        self.check()
        for name in self.place.names("actions"):
            parts = name.removesuffix(".json").split("/")
            if len(parts) == 3 and _STAGE.fullmatch(parts[1]) and _HEX.fullmatch(parts[2]):
                yield parts[1], parts[2]

    def damaged(self) -> set[str]:
        """Digests of the files that somebody has found damaged."""
        self.check()
        return {name.rpartition("/")[2] for name in self.place.names("damaged")}


def file_name(sha256: str) -> str:
    """Where a file's bytes lie."""
    return f"files/{sha256[:2]}/{sha256}"


def _action_name(stage: str, fingerprint: str) -> str:
    return f"actions/{stage}/{fingerprint}.json"


def _read_manifest(data: bytes, stage: str, fingerprint: str, where: str) -> Manifest:
    advice = "Remove it there; the next run, or `pesc push` from a machine that has the result, writes it again."
    try:
        manifest = Manifest.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        what = f"{'.'.join(map(str, first['loc']))}: {first['msg'].removeprefix('Value error, ')}"
        raise RemoteError(f"The manifest {where} is damaged, or of a newer pesc ({what}). {advice}") from None
    try:
        check_manifest(manifest, stage, fingerprint)
    except StoreError as error:
        raise RemoteError(f"The manifest {where} is not believed: {error} {advice}") from None
    return manifest


def check_manifest(manifest: Manifest, stage: str, fingerprint: str) -> None:
    """Raises StoreError unless it is the action's and its listing gives its digest.  That no path leaves its folder the model has checked."""
    key, output = manifest.key, manifest.output
    if (key.stage, key.fingerprint, manifest.fingerprint) != (stage, fingerprint, fingerprint):
        raise StoreError(f"it describes another action ({key.stage} {key.fingerprint[:12]}).")
    if not _HEX.fullmatch(output.digest) or not _STAGE.fullmatch(stage):
        raise StoreError("its digest or its stage is no name.")
    check_files(output.files)
    check_files(manifest.records)
    if taken := [file.path for file in manifest.records if file.path.split("/")[0] in OWN_NAMES]:
        raise StoreError(f"a record is called {taken[0]!r}, which is the store's own.")
    listing = sorted([file.path, file.size, file.sha256] for file in output.files)
    if digest_json(listing) != output.digest or output.size_bytes != sum(file.size for file in output.files):
        raise StoreError("its listing does not give its digest and size.")


def check_files(files: list[OutputFile]) -> None:
    """Raises StoreError for a listing whose paths collide, or that names no bytes."""
    seen: set[str] = set()
    for file in files:
        if not _HEX.fullmatch(file.sha256) or file.size < 0:
            raise StoreError(f"{file.path!r} has no SHA-256 or size.")
        if file.path in seen:
            raise StoreError(f"the path {file.path!r} comes twice.")
        seen.add(file.path)
    for path in seen:
        if clash := next((str(parent) for parent in PurePosixPath(path).parents if str(parent) in seen), None):
            raise StoreError(f"{clash!r} is a file and a folder.")
