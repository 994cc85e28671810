"""The store itself: look an action up, publish an object, commit a manifest."""

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
from pesc.store.digest import FileEntry, digest_tree, list_files
from pesc.store.manifest import ArtifactRef, Manifest
from pesc.store.workspace import Workspace, locked_workspace


class Store:
    """A store at one directory.  Cheap to make; directories appear when something is written."""

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root).absolute()

    def __repr__(self) -> str:
        return f"Store({str(self.root)!r})"

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
        path = self.action_path(stage, fingerprint) / "manifest.json"
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

    def manifests(self, stage: str | None = None) -> Iterator[Manifest]:
        """Every readable manifest, newest first."""
        pattern = f"actions/{stage or '*'}/*/manifest.json"
        paths = sorted(self.root.glob(pattern), key=lambda p: p.stat().st_mtime_ns, reverse=True)
        for path in paths:
            with contextlib.suppress(ValidationError, FileNotFoundError):
                yield Manifest.model_validate_json(path.read_bytes())

    # -- writing -----------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def workspace(self, stage: str, fingerprint: str, label: str) -> Iterator[Workspace]:
        """Lock the workspace of an action.  Raises StoreBusyError when another process has it."""
        with locked_workspace(self.workspace_path(stage, fingerprint), label) as workspace:
            yield workspace

    def publish(self, tree: Path) -> tuple[str, list[FileEntry]]:
        """Move a finished directory into the store; returns its digest and listing.  `tree` is gone afterwards.

        Files are made read-only and synced first. If an equal object is there already, it stays and `tree` is dropped.
        """
        digest, entries = digest_tree(tree)
        target = self.object_path(digest)
        if not target.is_dir():
            for path in list_files(tree):
                path.chmod(0o444)
                sync_path(path)
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                tree.rename(target)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
            sync_path(target.parent)
        elif digest_tree(target)[0] != digest:  # a damaged object must not be taken for the new one
            self._replace(tree, target)
        else:
            os.utime(target)  # wanted again: `gc` must not take it for an old one before the manifest is there
        shutil.rmtree(tree, ignore_errors=True)
        return digest, entries

    def _replace(self, tree: Path, target: Path) -> None:
        aside = Path(tempfile.mkdtemp(prefix="damaged-", dir=self._ensure("work")))
        target.rename(aside / target.name)
        tree.rename(target)

    def commit(self, manifest: Manifest) -> None:
        """Write the manifest: from here on the action exists.  Replaces an earlier one and drops Prefect's record of it."""
        directory = self.action_path(manifest.key.stage, manifest.fingerprint)
        write_atomic(directory / "manifest.json", manifest.model_dump_json(indent=1).encode())
        (directory / "prefect.json").unlink(missing_ok=True)

    def record_run(self, recipe: str, run: str, actions: dict[str, str]) -> None:
        """Remember which actions a run used (address -> fingerprint)."""
        write_atomic(self.root / "runs" / recipe / f"{run}.json", json.dumps(actions, indent=1).encode())

    def _ensure(self, name: str) -> Path:
        path = self.root / name
        path.mkdir(parents=True, exist_ok=True)
        return path


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
