"""The store as everybody uses it: this machine's, and the remote behind it when there is one.

store = Store(store_root())                      # with the remote of PESC_REMOTE
store = Store(path, remote="s3://bucket/pesc")   # with this one; remote=None: alone

Without a remote it is the local store and asks no network for anything. With one, `find` sees what other machines have made, `open` pulls
what is read, and `share` gives what was made here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pesc.errors import StoreError
from pesc.settings import remote_url
from pesc.store.local import LocalStore
from pesc.store.manifest import ArtifactRef, Manifest
from pesc.store.patience import Patience

if TYPE_CHECKING:
    from pesc.store.remote import Remote
    from pesc.store.transfer import OnProgress

_OF_THE_ENVIRONMENT = "environment"


class Store(LocalStore):
    """A store at one directory, with the remote at a URL.  Cheap to make; nothing is written or asked before it is needed."""

    def __init__(self, root: Path | str, remote: str | None = _OF_THE_ENVIRONMENT) -> None:
        super().__init__(root)
        self._url = remote_url() if remote == _OF_THE_ENVIRONMENT else remote

    @property
    def remote(self) -> Remote | None:
        """The remote, or None.  Raises RemoteError for a URL that cannot be one."""
        if self._url is None:
            return None
        from pesc.store.remote import open_remote

        return open_remote(self._url)

    def alone(self) -> Store:
        """This store without its remote."""
        return Store(self.root, remote=None)

    def find(self, stage: str, fingerprint: str) -> Manifest | None:
        """The manifest of an action whose object is whole here, or that the remote has; else None.  Pulls nothing."""
        here, remote = super().find(stage, fingerprint), self.remote
        if remote is None:
            return here
        if here and not self._is_replaced(here, remote):
            return here
        return remote.manifest(stage, fingerprint) or here

    def _is_replaced(self, manifest: Manifest, remote: Remote) -> bool:
        """Whether another machine has put a refreshed result in the place of this one, which came from the remote or went there."""
        from pesc.store.sharing import is_marked

        replacement = remote.replacement(manifest.key.stage, manifest.fingerprint) if is_marked(self, manifest, remote) else None
        return replacement is not None and replacement != manifest.output.digest

    def forget(self, stage: str, fingerprint: str) -> None:
        """Ask the remote again about an action that is about to be refreshed, perhaps by another machine."""
        if self.remote:
            self.remote.forget(stage, fingerprint)

    def open(self, ref: ArtifactRef, on_progress: OnProgress | None = None) -> Path:
        """Directory of a reference's object, pulled when it is not here.  Raises StoreError when it is not whole anywhere, RemoteError."""
        here = LocalStore.find(self, ref.stage, ref.fingerprint)
        remote = self.remote
        if remote and (here is None or here.output.digest != ref.digest):
            from pesc.store.sharing import pull
            from pesc.store.transfer import silent

            there = remote.manifest(ref.stage, ref.fingerprint)
            if there and there.output.digest == ref.digest:
                pull(self, remote, there, on_progress or silent)
                return self.object_path(ref.digest)
            if here is None:
                raise StoreError(
                    f"The object {ref.digest[:12]} of {ref.stage} {ref.fingerprint[:12]} is neither whole in {self.root} nor in {remote.url}. "
                    "Run the recipe again: it builds what is missing."
                )
        return super().open(ref)

    def has(self, manifest: Manifest) -> bool:
        """Whether this very result is whole in the store of this machine."""
        here = LocalStore.find(self, manifest.key.stage, manifest.fingerprint)
        return here is not None and here.output.digest == manifest.output.digest

    def owes(self, manifest: Manifest) -> bool:
        """Whether an action of this store has yet to be shared, as far as is known here."""
        remote = self.remote
        if remote is None or LocalStore.find(self, manifest.key.stage, manifest.fingerprint) is None:
            return False
        from pesc.store.sharing import is_marked

        return not is_marked(self, manifest, remote)

    def share(self, manifest: Manifest, is_trusted: bool = False, on_progress: OnProgress | None = None) -> Manifest:
        """See to it that the remote, if there is one, has an action of this store; the manifest that stands.

        `is_trusted`: it has just been made here. Raises RemoteError; the result is kept here then, and the next run shares it.
        """
        remote = self.remote
        if remote is None or not self.owes(manifest):
            return manifest
        from pesc.store.sharing import share
        from pesc.store.transfer import silent

        return share(self, remote, manifest, is_trusted, on_progress or silent).standing

    @contextlib.contextmanager
    def lease(self, stage: str, fingerprint: str, label: str, patience: Patience, until_found: bool) -> Iterator[None]:
        """Hold an action against other machines; without a remote there are none.  See `pesc.store.lease`."""
        remote = self.remote
        if remote is None:
            yield
            return
        from pesc.store.lease import Claim, hold_lease

        with hold_lease(remote, Claim(stage, fingerprint, label), patience, until_found):
            yield
