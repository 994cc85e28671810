"""Check the store (`fsck`) and free space (`gc`).  Both report first; they change something only when asked."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from pesc.errors import StoreBusyError, StoreError
from pesc.store.digest import digest_tree
from pesc.store.layout import MANIFEST_NAME, PREFECT_NAME
from pesc.store.local import LocalStore
from pesc.store.manifest import Manifest
from pesc.store.workspace import is_locked, locked_workspace


@dataclass
class FsckReport:
    """What `fsck` saw.  `problems` are sentences; `leftovers` are workspaces and places of actions that were never finished."""

    num_actions: int = 0
    num_objects: int = 0
    problems: list[str] = field(default_factory=list)
    leftovers: list[Path] = field(default_factory=list)
    repaired: list[str] = field(default_factory=list)

    @property
    def is_clean(self) -> bool:
        """No damaged manifest or object.  What was never committed is not damage: a rerun resumes from it."""
        return not self.problems


def fsck(store: LocalStore, repair: bool = False) -> FsckReport:
    """Recompute the digest of every object, check that every action has its object.

    With `repair`, damaged objects and the actions that need them are moved to `damaged/`, which turns them into misses.
    """
    store.check()
    report = FsckReport()
    broken = _check_objects(store, report, repair)
    for path in sorted(store.root.glob("actions/*/*")):
        if not (path / MANIFEST_NAME).exists():  # stopped before the commit, or Prefect's record of a result that only the remote has
            if [p.name for p in path.iterdir()] != [PREFECT_NAME]:
                report.leftovers.append(path)
            continue
        report.num_actions += 1
        problem = _action_problem(store, path, broken)
        if problem:
            report.problems.append(problem)
            if repair:
                _set_aside(store, path, report)
    for path in sorted(store.root.glob("work/*/*")):
        if path.is_dir() and not is_locked(path):
            report.leftovers.append(path)
    return report


def _check_objects(store: LocalStore, report: FsckReport, repair: bool) -> set[str]:
    broken: set[str] = set()
    for path in sorted(store.root.glob("objects/*")):
        report.num_objects += 1
        if not _is_whole(path):
            broken.add(path.name)
            report.problems.append(f"The object {path} does not have the bytes its name promises.")
            if repair:
                _set_aside(store, path, report)
    return broken


def _is_whole(path: Path) -> bool:
    try:
        return digest_tree(path)[0] == path.name
    except (StoreError, OSError):  # a link or a file that cannot be read
        return False


def _action_problem(store: LocalStore, path: Path, broken: set[str]) -> str | None:
    try:
        manifest = Manifest.model_validate_json((path / "manifest.json").read_bytes())
    except (ValidationError, OSError):
        return f"The manifest of {path} cannot be read."
    if manifest.output.digest in broken or not store.has_object(manifest):
        return f"{manifest.address} ({path}) needs the object {manifest.output.digest[:12]}, which is missing or damaged."
    if manifest.key.fingerprint != path.name or manifest.fingerprint != path.name:
        return f"The manifest of {path} describes another action ({manifest.key.fingerprint[:12]})."
    return None


def _set_aside(store: LocalStore, path: Path, report: FsckReport) -> None:
    target = store.root / "damaged" / f"{time.time_ns()}-{path.name}"
    target.parent.mkdir(parents=True, exist_ok=True)
    path.rename(target)
    report.repaired.append(f"{path} moved to {target}")


_YOUNG_SECONDS = 3600.0
_Manifests = dict[tuple[str, str], Manifest]


@dataclass
class GcReport:
    """What `gc` would remove, or has removed."""

    actions: list[Path] = field(default_factory=list)
    objects: list[Path] = field(default_factory=list)
    workspaces: list[Path] = field(default_factory=list)
    damaged: list[Path] = field(default_factory=list)
    freed_bytes: int = 0
    kept_actions: int = 0

    @property
    def by_kind(self) -> list[tuple[str, Path]]:
        """Each place with what it is."""
        kinds = {"action": self.actions, "object": self.objects, "workspace": self.workspaces, "damaged thing": self.damaged}
        return [(kind, path) for kind, paths in kinds.items() for path in paths]


def gc(store: LocalStore, keep: Iterable[tuple[str, str]], keep_days: float, delete: bool = False) -> GcReport:
    """Find what nothing needs: actions that are not in `keep` (stage, fingerprint) and were neither made nor used for `keep_days`.

    Objects go when no kept action names them; workspaces go when they are idle for as long and nobody holds them. Whatever a
    kept action was made from is kept as well. Removal goes actions first, so that a crash leaves no action without its object.
    An object younger than `keep_days`, or than an hour, stays: its action may be about to be committed. What was made or used while this looked around
    stays too. Of what `fsck` has set aside, what lies there for `keep_days` goes. Files hard-linked from a kept object free no bytes and are not counted.
    Raises StoreError when a manifest cannot be read: nobody knows what it needs.
    """
    now = time.time()
    cutoff = now - keep_days * 86_400
    young = min(cutoff, now - _YOUNG_SECONDS)
    roots = set(keep) | _recent_actions(store, cutoff)
    places = _folders(store, "actions")
    manifests, kept = _kept(store, places, roots)
    report = GcReport(kept_actions=len(kept))
    report.actions = [store.action_path(*key) for key in manifests if key not in kept]
    digests = {manifests[key].output.digest for key in kept}
    report.objects = [p for p in sorted(store.root.glob("objects/*")) if p.name not in digests and p.stat().st_mtime <= young]
    unfinished = [p for p in places if (p.parent.name, p.name) not in manifests]
    idle = [p for p in unfinished if not is_locked(store.workspace_path(p.parent.name, p.name))]
    report.actions += [p for p in idle if _last_change(p) <= cutoff]
    report.workspaces = [p for p in _folders(store, "work") if _last_change(p) <= cutoff and not is_locked(p)]
    report.damaged = [p for p in sorted(store.root.glob("damaged/*")) if _set_aside_at(p) <= cutoff]
    report.freed_bytes = sum(_unshared_bytes(path) for _, path in report.by_kind)
    if delete:
        _spare(store, report, roots | _recent_actions(store, cutoff), young)
        _remove(report)
    return report


def _kept(store: LocalStore, places: list[Path], roots: set[tuple[str, str]]) -> tuple[_Manifests, set[tuple[str, str]]]:
    """Every manifest, and which of them are needed."""
    manifests = {key: m for path in places if (m := store.manifest(*(key := (path.parent.name, path.name))))}
    return manifests, _with_inputs(roots & set(manifests), manifests)


def _spare(store: LocalStore, report: GcReport, roots: set[tuple[str, str]], young: float) -> None:
    """Take out of the report what has come into use while it was made, which takes minutes in a large store."""
    manifests, kept = _kept(store, _folders(store, "actions"), roots)
    digests = {manifests[key].output.digest for key in kept}
    report.actions = [p for p in report.actions if (p.parent.name, p.name) not in kept]
    report.objects = [p for p in report.objects if p.name not in digests and p.stat().st_mtime <= young]


def _remove(report: GcReport) -> None:
    for path in (*report.actions, *report.objects, *report.damaged):
        shutil.rmtree(path)
    for path in report.workspaces:
        with contextlib.suppress(StoreBusyError), locked_workspace(path, path.parent.name) as workspace:
            workspace.discard()


def _set_aside_at(path: Path) -> float:
    """When `fsck` has set it aside: its name begins with that."""
    number = path.name.partition("-")[0]
    return int(number) / 1e9 if number.isdigit() else path.stat().st_mtime


def last_used(store: LocalStore) -> set[tuple[str, str]]:
    """Stage and fingerprint of the actions that the last run of each recipe used."""
    newest = {path.parent: path for path in sorted(store.root.glob("runs/*/*.json"))}
    return {action for path in newest.values() for action in _used_by(path)}


def _used_by(path: Path) -> set[tuple[str, str]]:
    try:
        return {(address.partition("[")[0], fp) for address, fp in json.loads(path.read_bytes()).items()}
    except (ValueError, AttributeError):
        raise StoreError(f"{path}, which says what a run used, cannot be read. Remove it if nothing needs that run.") from None


def _folders(store: LocalStore, kind: str) -> list[Path]:
    return sorted(p for p in store.root.glob(f"{kind}/*/*") if p.is_dir())


def _last_change(path: Path) -> float:
    """When anything in a directory was last written (a checkpoint does not change the directory that holds its directory)."""
    return max(p.lstat().st_mtime for p in (path, *path.rglob("*")))


def _recent_actions(store: LocalStore, cutoff: float) -> set[tuple[str, str]]:
    manifests = store.root.glob(f"actions/*/*/{MANIFEST_NAME}")
    recent = {
        (p.parent.parent.name, p.parent.name) for p in manifests if max(p.stat().st_mtime, p.parent.stat().st_mtime) > cutoff
    }  # the folder's time: when it was last an input
    for path in store.root.glob("runs/*/*.json"):
        if path.stat().st_mtime > cutoff:
            recent |= _used_by(path)
    return recent


def _with_inputs(roots: set[tuple[str, str]], manifests: dict[tuple[str, str], Manifest]) -> set[tuple[str, str]]:
    by_fingerprint = {fp: key for key in manifests for fp in [key[1]]}
    kept, todo = set(roots), list(roots)
    while todo:
        for fingerprint in manifests[todo.pop()].input_fingerprints.values():
            key = by_fingerprint.get(fingerprint)
            if key and key not in kept:
                kept.add(key)
                todo.append(key)
    return kept


def _unshared_bytes(path: Path) -> int:
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file() and p.stat().st_nlink == 1)
