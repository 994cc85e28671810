"""One action between this machine's store and a remote: pulled when something reads it, shared when it has been made.

Key contracts
- Pulling fills `work/pull/<digest>` and renames: half an object is never seen. What is whole in another object of this disk is linked.
- Sharing sends files first and the manifest last. The file `remotes.json` beside a manifest says which remotes have it, so that a run
  asks about each action once.
- The remote's result stands: whoever comes second with other bytes takes the first one's. Only a refresh that is newer replaces it.
- Among processes of one disk, one pulls or sends an object and the others wait for it.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pesc.store.digest import digest_file
from pesc.store.disk import write_atomic
from pesc.store.layout import REMOTES_NAME
from pesc.store.local import LocalStore
from pesc.store.manifest import Manifest, OutputFile
from pesc.store.patience import Patience
from pesc.store.remote import Remote
from pesc.store.transfer import OnProgress, download_files, missing_files, silent, upload_files
from pesc.store.workspace import locked_workspace

logger = logging.getLogger(__name__)


# -- what is known here of remotes -----------------------------------------------------------------------------------------------


def is_marked(store: LocalStore, manifest: Manifest, remote: Remote) -> bool:
    """Whether this store knows that the remote has the action."""
    return remote.url in _remotes_of(store, manifest)


def mark(store: LocalStore, manifest: Manifest, remote: Remote) -> None:
    """Remember that the remote has it."""
    known = _remotes_of(store, manifest)
    if remote.url not in known:
        path = store.action_path(manifest.key.stage, manifest.fingerprint) / REMOTES_NAME
        write_atomic(path, json.dumps(sorted({*known, remote.url})).encode())


def _remotes_of(store: LocalStore, manifest: Manifest) -> list[str]:
    try:
        found = json.loads((store.action_path(manifest.key.stage, manifest.fingerprint) / REMOTES_NAME).read_bytes())
    except (OSError, ValueError):
        return []
    return [url for url in found if isinstance(url, str)] if isinstance(found, list) else []


# -- from the remote -------------------------------------------------------------------------------------------------------------


def pull(store: LocalStore, remote: Remote, manifest: Manifest, on_progress: OnProgress = silent) -> list[OutputFile]:
    """Make a remote's action one of this store; returns the files that were moved.  `manifest` is as `Remote.manifest` gave it: checked.

    Raises RemoteError naming the file that is missing or damaged there.
    """
    digest = manifest.output.digest
    moved: list[OutputFile] = []
    store.prepare()
    with locked_workspace(store.root / "work" / "pull" / digest, f"The pull of {manifest.address} {digest[:8]}", Patience()) as workspace:
        label = f"pulling {manifest.address}"
        if not store.has_object(manifest):
            known = equal_files(store, manifest.output.files)
            _drop_others(workspace.out, manifest.output.files)
            moved += download_files(remote, manifest.output.files, workspace.out, workspace.root / "parts", known, on_progress, label)
            store.install(workspace.out, digest)
            logger.info("%s pulled from %s, object %s", manifest.address, remote.url, digest[:8])
        moved += _pull_records(store, remote, manifest, workspace.root, on_progress)
        store.commit(manifest)
        mark(store, manifest, remote)
        workspace.discard()
    return moved


def _pull_records(store: LocalStore, remote: Remote, manifest: Manifest, work: Path, on_progress: OnProgress) -> list[OutputFile]:
    target, coming = store.action_path(manifest.key.stage, manifest.fingerprint), work / "records"
    label = f"pulling records of {manifest.address}"
    moved = download_files(remote, manifest.records, coming, work / "parts", {}, on_progress, label) if manifest.records else []
    for file in manifest.records:
        (target / file.path).parent.mkdir(parents=True, exist_ok=True)
        os.replace(coming / file.path, target / file.path)
    return moved


def equal_files(store: LocalStore, files: Sequence[OutputFile]) -> dict[str, Path]:
    """Files of this store's objects that have a wanted file's SHA-256, by their manifests."""
    wanted = {file.sha256 for file in files}
    return {
        file.sha256: store.object_path(manifest.output.digest) / file.path
        for manifest in store.manifests()
        for file in manifest.output.files
        if file.sha256 in wanted
    }


def _drop_others(out: Path, files: Sequence[OutputFile]) -> None:
    """Remove what an earlier attempt cannot have left: links, and files that the object does not have."""
    names = {file.path for file in files}
    for path in sorted(out.rglob("*"), reverse=True):
        if path.is_symlink() or (not path.is_dir() and path.relative_to(out).as_posix() not in names):
            path.unlink()
    if out.is_symlink():
        out.unlink()


# -- to the remote ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shared:
    """What became of an action that was to be shared.  standing: the manifest that the remote has now; sent: files that it lacked."""

    standing: Manifest
    sent: tuple[OutputFile, ...] = ()


def share(
    store: LocalStore, remote: Remote, manifest: Manifest, is_trusted: bool = False, on_progress: OnProgress = silent, again: bool = False
) -> Shared:
    """See to it that the remote has an action of this store.

    `is_trusted`: the object has just been made, its files need no check. Where the remote has another result, that one is taken in place
    of this one. `again`: look at every file, also of an action that is there, and leave this store as it is. Raises StoreError for
    an object that is damaged here, RemoteError.
    """
    if not again and is_marked(store, manifest, remote):
        return Shared(manifest)
    stage, fingerprint = manifest.key.stage, manifest.fingerprint
    place = store.root / "work" / "push" / fingerprint
    sent: list[OutputFile] = []
    with locked_workspace(place, f"The push of {manifest.address} {manifest.output.digest[:8]}", Patience()) as workspace:
        manifest = standing = store.manifest(stage, fingerprint) or manifest  # somebody may have done it meanwhile
        if again or not is_marked(store, manifest, remote):
            there = remote.manifest(stage, fingerprint, fresh=True)
            is_same = there is not None and there.output.digest == manifest.output.digest
            standing = there or manifest
            if there is None or wins(manifest, there) or (again and is_same):
                going = with_whole_records(store, manifest)
                sent = send_files(store, remote, going, is_trusted, on_progress)
                standing = standing if is_same else remote.commit(going, replace=there is not None)
            if standing.output.digest == manifest.output.digest:
                mark(store, manifest, remote)
            elif not again:
                _take(store, remote, manifest, standing, on_progress)
        workspace.discard()
    return Shared(standing, tuple(sent))


def with_whole_records(store: LocalStore, manifest: Manifest) -> Manifest:
    """The manifest without records that somebody has removed or changed: a lost log must not keep a result at home."""
    action = store.action_path(manifest.key.stage, manifest.fingerprint)
    whole = [file for file in manifest.records if _is_whole(action / file.path, file)]
    return manifest if len(whole) == len(manifest.records) else manifest.model_copy(update={"records": whole})


def _is_whole(path: Path, file: OutputFile) -> bool:
    try:
        return path.stat().st_size == file.size and digest_file(path) == file.sha256
    except OSError:
        return False


def wins(manifest: Manifest, standing: Manifest) -> bool:
    """Whether a result of this machine replaces the remote's: it was made by a refresh, no earlier, and has other bytes."""
    return manifest.output.digest != standing.output.digest and manifest.refreshed and manifest.started_at >= standing.started_at


def send_files(
    store: LocalStore, remote: Remote, manifest: Manifest, is_trusted: bool, on_progress: OnProgress = silent
) -> list[OutputFile]:
    """Send what the remote lacks of an action's files; returns it."""
    paths = local_files(store, manifest)
    missing = missing_files(remote, [file for file, _ in paths])
    by_digest = {file.sha256: path for file, path in paths}
    upload_files(remote, [(file, by_digest[file.sha256]) for file in missing], is_trusted, on_progress, f"pushing {manifest.address}")
    return missing


def local_files(store: LocalStore, manifest: Manifest) -> list[tuple[OutputFile, Path]]:
    """Every file of an action, with where it lies: the object's, then its records."""
    root, action = store.object_path(manifest.output.digest), store.action_path(manifest.key.stage, manifest.fingerprint)
    return [(f, root / f.path) for f in manifest.output.files] + [(f, action / f.path) for f in manifest.records]


def _take(store: LocalStore, remote: Remote, mine: Manifest, standing: Manifest, on_progress: OnProgress) -> None:
    logger.warning(
        "%s has another result in %s (object %s) than in %s (%s): that one stands, and is used here too.",
        mine.address, remote.url, standing.output.digest[:8], store.root, mine.output.digest[:8],
    )  # fmt: skip
    pull(store, remote, standing, on_progress)
