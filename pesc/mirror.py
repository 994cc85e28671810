"""Many actions between the store and its remote: `pesc push` and `pesc pull`.

    report = push(store, chosen(store, ["demo", "camelidae-8x7b:train[pesc]"]), dry_run=True)

Words choose: a recipe (what its plan finds), RECIPE:ADDRESS, or the start of a fingerprint or an object's digest; none: everything.

Key contracts
- A push looks at every file in the remote, also of actions that are there: it mends what is missing or was found damaged.
- A result that the remote has with other bytes stays, and is named; only a refresh that is newer replaces it.
- Both may be killed at any point and run again: what is complete is not moved twice.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pesc.errors import RecipeError, StoreError
from pesc.plan import make_plan
from pesc.recipe import load_recipe
from pesc.store import Manifest, Store
from pesc.store.manifest import OutputFile
from pesc.store.remote import Remote
from pesc.store.sharing import Shared, equal_files, share, wins
from pesc.store.sharing import pull as pull_action
from pesc.store.transfer import OnProgress, missing_files, silent

FEWEST_DIGITS = 6


@dataclass
class MirrorReport:
    """What moved, or would.  differing: actions of which the remote has another result, as sentences."""

    num_actions: int = 0
    actions: list[str] = field(default_factory=list)
    """Addresses of those that were not complete at the target."""
    num_files: int = 0
    moved_bytes: int = 0
    present_bytes: int = 0
    differing: list[str] = field(default_factory=list)

    def add(self, manifest: Manifest, moved: Sequence[OutputFile], is_new: bool) -> None:
        """Count one action."""
        size = sum(file.size for file in moved)
        self.num_actions += 1
        self.num_files += len(moved)
        self.moved_bytes += size
        self.present_bytes += max(0, manifest.output.size_bytes - size)
        if is_new or moved:
            self.actions.append(manifest.address)

    def summary(self, verb: str) -> str:
        """One line: `Sent 3 of 12 actions: 5 files, 1.2 GB. 4.0 GB there already.`."""
        return (
            f"{verb} {len(self.actions)} of {self.num_actions} actions: {self.num_files} files, {size_text(self.moved_bytes)}. "
            f"{size_text(self.present_bytes)} there already."
        )


def size_text(size: int) -> str:
    """`1.2 GB`."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size} bytes"


def require_remote(store: Store) -> Remote:
    """The store's remote.  Raises StoreError when it has none, RemoteError when it does not answer or is of a newer format."""
    if store.remote is None:
        raise StoreError("There is no remote: give --remote URL, or set PESC_REMOTE to s3://bucket/path, gs://bucket/path or a directory.")
    store.remote.check()
    return store.remote


# -- what is meant ---------------------------------------------------------------------------------------------------------------


def chosen(store: Store, words: Sequence[str], overrides: Sequence[str] = (), from_remote: bool = False) -> list[Manifest]:
    """Actions that the words mean: of this store, or (`from_remote`) of its remote; each once.

    Raises RecipeError or StoreError for a word that means nothing.
    """
    found = [m for word in words for m in _meant(store, word, overrides, from_remote)] if words else _everything(store, from_remote)
    return list({(m.key.stage, m.fingerprint): m for m in found}.values())


def _everything(store: Store, from_remote: bool) -> list[Manifest]:
    if not from_remote:
        return [manifest for manifest in store.manifests() if store.has(manifest)]
    remote = require_remote(store)
    return [manifest for key in remote.actions() if (manifest := remote.manifest(*key))]


def _meant(store: Store, word: str, overrides: Sequence[str], from_remote: bool) -> list[Manifest]:
    if re.fullmatch(rf"[0-9a-f]{{{FEWEST_DIGITS},64}}", word):
        found = [m for m in _everything(store, from_remote) if m.fingerprint.startswith(word) or m.output.digest.startswith(word)]
        name = word
    else:
        name, _, address = word.rpartition(":") if ":" in word and not Path(word).exists() else (word, "", "")
        plan = make_plan(load_recipe(name, overrides), store)
        addresses = [action.address for action in plan]
        if address and address not in addresses:
            raise RecipeError(f"Recipe {plan.recipe.name!r} has no action {address!r}. It has: {', '.join(addresses)}.")
        hits = [action.manifest for action in plan if action.manifest and address in ("", action.address)]
        remote = require_remote(store)
        found = [m for m in hits if (remote.manifest(m.key.stage, m.fingerprint) if from_remote else store.has(m))]
    if not found:
        where = require_remote(store).url if from_remote else store.root
        raise StoreError(
            f"Nothing of {word} is in {where}. `pesc plan {name if name != word else 'RECIPE'}` says what there is, and where."
        )
    return found


# -- both ways -------------------------------------------------------------------------------------------------------------------


def push(store: Store, manifests: Iterable[Manifest], dry_run: bool = False, on_progress: OnProgress = silent) -> MirrorReport:
    """Give the remote what it lacks of these actions of the store.  Raises StoreError for damage here, RemoteError."""
    remote, report, counted = require_remote(store), MirrorReport(), set[str]()
    for manifest in manifests:
        there = remote.manifest(manifest.key.stage, manifest.fingerprint, fresh=True)
        shared = (
            _would_share(remote, manifest, there, counted) if dry_run else share(store, remote, manifest, False, on_progress, again=True)
        )
        report.add(manifest, shared.sent, there is None)
        if (digest := shared.standing.output.digest) != manifest.output.digest:
            report.differing.append(
                f"{manifest.address} {manifest.fingerprint[:12]}: {remote.url} has the object {digest[:12]}, "
                f"{store.root} has {manifest.output.digest[:12]}; the first one stands."
            )
    return report


def _would_share(remote: Remote, manifest: Manifest, there: Manifest | None, counted: set[str]) -> Shared:
    """What `share` would do; `counted`: files of the actions before."""
    if there and there.output.digest != manifest.output.digest and not wins(manifest, there):
        return Shared(there)
    missing = missing_files(remote, [f for f in (*manifest.output.files, *manifest.records) if f.sha256 not in counted])
    counted |= {file.sha256 for file in missing}
    return Shared(manifest, tuple(missing))


def pull(store: Store, manifests: Iterable[Manifest], dry_run: bool = False, on_progress: OnProgress = silent) -> MirrorReport:
    """Bring these actions of the remote into the store.  Raises RemoteError for what is missing or damaged there."""
    remote, report, counted = require_remote(store), MirrorReport(), set[str]()
    for manifest in manifests:
        if store.has(manifest):
            report.add(manifest, [], False)
        else:
            moved = _would_pull(store, manifest, counted) if dry_run else pull_action(store, remote, manifest, on_progress)
            report.add(manifest, moved, True)
    return report


def _would_pull(store: Store, manifest: Manifest, counted: set[str]) -> list[OutputFile]:
    files = manifest.output.files if not store.has_object(manifest) else []
    here = equal_files(store, files)
    coming = {f.sha256: f for f in (*files, *manifest.records) if f.sha256 not in here and f.sha256 not in counted}
    counted |= coming.keys()
    return list(coming.values())
