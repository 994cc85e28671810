"""The store of this machine: look an action up, publish an object, commit a manifest."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pydantic import ValidationError

from pesc.errors import StoreError
from pesc.store import layout
from pesc.store.digest import FileEntry, digest_tree, list_files
from pesc.store.disk import sync_path, write_atomic
from pesc.store.layout import MANIFEST_NAME, PREFECT_NAME, REMOTES_NAME
from pesc.store.manifest import ArtifactRef, Manifest
from pesc.store.workspace import Patience, Workspace, locked_workspace


class LocalStore:
    """A store at one directory.  Cheap to make; directories appear when something is written."""

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root).absolute()
        self._is_checked = self._is_prepared = False

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.root)!r})"

    # -- places ------------------------------------------------------------------------------------------------------------

    def object_path(self, digest: str) -> Path:
        """Directory of an object, whether or not it exists."""
        return self.root / "objects" / digest

    def action_path(self, stage: str, fingerprint: str) -> Path:
        """Directory of an action, whether or not it exists."""
        return self.root / "actions" / stage / fingerprint

    def workspace_path(self, stage: str, fingerprint: str) -> Path:
        """Directory of an action's workspace, whether or not it exists."""
        return self.root / "work" / stage / fingerprint

    # -- reading -----------------------------------------------------------------------------------------------------------

    def manifest(self, stage: str, fingerprint: str) -> Manifest | None:
        """The manifest of an action, or None.  Raises StoreError when it is there but cannot be read."""
        self.check()
        path = self.action_path(stage, fingerprint) / MANIFEST_NAME
        try:
            return Manifest.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except ValidationError as error:
            raise StoreError(
                f"The manifest {path} is damaged ({error.error_count()} fields). `pesc fsck --repair` sets it aside."
            ) from None

    def find(self, stage: str, fingerprint: str) -> Manifest | None:
        """The manifest of an action whose object is there with every file in its recorded size, else None."""
        manifest = self.manifest(stage, fingerprint)
        return manifest if manifest and self.has_object(manifest) else None

    def has_object(self, manifest: Manifest) -> bool:
        """Whether all files of the action's object are there with the recorded sizes (digests are checked by fsck)."""
        root = self.object_path(manifest.output.digest)
        try:
            return root.is_dir() and all((root / f.path).stat().st_size == f.size for f in manifest.output.files)
        except OSError:
            return False

    def open(self, ref: ArtifactRef) -> Path:
        """Directory of a reference's object.  Raises StoreError when it is not whole."""
        if self.find(ref.stage, ref.fingerprint) is None:
            raise StoreError(
                f"The object {ref.digest[:12]} of {ref.stage} {ref.fingerprint[:12]} is not whole in {self.root}. `pesc fsck` says what is missing."
            )
        return self.object_path(ref.digest)

    def note_use(self, ref: ArtifactRef) -> None:
        """Remember that an action is read now, for `gc`: by the time of its folder, for its manifest's says when it was made."""
        with contextlib.suppress(OSError):  # a store that may only be read
            os.utime(self.action_path(ref.stage, ref.fingerprint))

    def manifests(self, stage: str | None = None) -> Iterator[Manifest]:
        """Every readable manifest, newest first."""
        self.check()
        pattern = f"actions/{stage or '*'}/*/{MANIFEST_NAME}"
        paths = sorted(self.root.glob(pattern), key=lambda p: p.stat().st_mtime_ns, reverse=True)
        for path in paths:
            with contextlib.suppress(ValidationError, FileNotFoundError):
                yield Manifest.model_validate_json(path.read_bytes())

    def check(self) -> None:
        """Asked before the first read.  Raises StoreError for a store of a newer format."""
        if not self._is_checked:
            layout.read_format(self.root)
            self._is_checked = True

    # -- writing -----------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def workspace(self, stage: str, fingerprint: str, label: str, patience: Patience | None = None) -> Iterator[Workspace]:
        """Lock the workspace of an action; wait with `patience` when another process has it.  Raises StoreBusyError without, or after it."""
        self.prepare()
        with locked_workspace(self.workspace_path(stage, fingerprint), label, patience) as workspace:
            yield workspace

    def publish(self, tree: Path) -> tuple[str, list[FileEntry]]:
        """Move a finished directory into the store; returns its digest and listing.  `tree` is gone afterwards.

        Files are made read-only and synced first. If an equal object is there already, it stays and `tree` is dropped.
        """
        self.prepare()
        digest, entries = digest_tree(tree)
        self.install(tree, digest)
        return digest, entries

    def install(self, tree: Path, digest: str) -> None:
        """Move a directory whose digest is known into the store."""
        target = self.object_path(digest)
        if target.is_dir() and digest_tree(target)[0] == digest:
            os.utime(target)  # wanted again: `gc` must not take it for an old one before the manifest is there
            shutil.rmtree(tree, ignore_errors=True)
            return
        for path in list_files(tree):
            path.chmod(0o444)
            sync_path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_dir():  # a damaged object must not be taken for the new one
            self._set_aside(target)
        try:
            tree.rename(target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        sync_path(target.parent)
        shutil.rmtree(tree, ignore_errors=True)

    def _set_aside(self, target: Path) -> None:
        aside = Path(tempfile.mkdtemp(prefix="damaged-", dir=self._ensure("work")))
        target.rename(aside / target.name)

    def commit(self, manifest: Manifest) -> None:
        """Write the manifest: from here on the action exists.  Replaces an earlier one and drops what Prefect and remotes had of it."""
        self.prepare()
        directory = self.action_path(manifest.key.stage, manifest.fingerprint)
        write_atomic(directory / MANIFEST_NAME, manifest.model_dump_json(indent=1).encode())
        for name in (PREFECT_NAME, REMOTES_NAME):
            (directory / name).unlink(missing_ok=True)

    def record_run(self, recipe: str, run: str, actions: dict[str, str]) -> None:
        """Remember which actions a run used (address -> fingerprint)."""
        self.prepare()
        write_atomic(self.root / "runs" / recipe / f"{run}.json", json.dumps(actions, indent=1).encode())

    def prepare(self) -> None:
        """Asked before the first write: brings the layout up to date.  Raises StoreError when that wants `pesc migrate`."""
        if not self._is_prepared:
            layout.prepare(self.root)
            self._is_prepared = True

    def _ensure(self, name: str) -> Path:
        path = self.root / name
        path.mkdir(parents=True, exist_ok=True)
        return path
