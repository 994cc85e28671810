"""Check the store (`fsck`) and free space (`gc`).  Both report first; they change something only when asked."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from pesc.store.digest import digest_tree
from pesc.store.manifest import Manifest
from pesc.store.store import Store
from pesc.store.workspace import is_locked


@dataclass
class FsckReport:
    """What `fsck` saw.  `problems` are sentences; `leftovers` are workspaces of actions that were never finished."""

    num_actions: int = 0
    num_objects: int = 0
    problems: list[str] = field(default_factory=list)
    leftovers: list[Path] = field(default_factory=list)
    repaired: list[str] = field(default_factory=list)

    @property
    def is_clean(self) -> bool:
        """No damaged manifest or object.  An unfinished workspace is not damage: it is where a rerun resumes."""
        return not self.problems


def fsck(store: Store, repair: bool = False) -> FsckReport:
    """Recompute the digest of every object, check that every action has its object.

    With `repair`, damaged objects and the actions that need them are moved to `damaged/`, which turns them into misses.
    """
    report = FsckReport()
    broken = _check_objects(store, report, repair)
    for path in sorted(store.root.glob("actions/*/*")):
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


def _check_objects(store: Store, report: FsckReport, repair: bool) -> set[str]:
    broken: set[str] = set()
    for path in sorted(store.root.glob("objects/*")):
        report.num_objects += 1
        if digest_tree(path)[0] != path.name:
            broken.add(path.name)
            report.problems.append(f"The object {path} does not have the bytes its name promises.")
            if repair:
                _set_aside(store, path, report)
    return broken


def _action_problem(store: Store, path: Path, broken: set[str]) -> str | None:
    try:
        manifest = Manifest.model_validate_json((path / "manifest.json").read_bytes())
    except FileNotFoundError:
        return f"The action {path} has no manifest."
    except ValidationError:
        return f"The manifest of {path} cannot be read."
    if manifest.output.digest in broken or not store.has_object(manifest):
        return f"{manifest.address} ({path}) needs the object {manifest.output.digest[:12]}, which is missing or damaged."
    if manifest.key.fingerprint != path.name or manifest.fingerprint != path.name:
        return f"The manifest of {path} describes another action ({manifest.key.fingerprint[:12]})."
    return None


def _set_aside(store: Store, path: Path, report: FsckReport) -> None:
    target = store.root / "damaged" / f"{time.time_ns()}-{path.name}"
    target.parent.mkdir(parents=True, exist_ok=True)
    path.rename(target)
    report.repaired.append(f"{path} moved to {target}")


@dataclass
class GcReport:
    """What `gc` would remove, or has removed."""

    actions: list[Path] = field(default_factory=list)
    objects: list[Path] = field(default_factory=list)
    workspaces: list[Path] = field(default_factory=list)
    freed_bytes: int = 0
    kept_actions: int = 0


def gc(store: Store, keep: Iterable[tuple[str, str]], keep_days: float, delete: bool = False) -> GcReport:
    """Find what nothing needs: actions that are not in `keep` (stage, fingerprint) and were neither made nor used for `keep_days`.

    Objects go when no kept action names them; workspaces go when they are idle for as long and nobody holds them. Whatever a
    kept action was made from is kept as well. Removal goes actions first, so that a crash leaves no action without its object.
    An object younger than `keep_days` stays: its action may be about to be committed. Files hard-linked from a kept object free no bytes and are not counted.
    """
    cutoff = time.time() - keep_days * 86_400
    roots = set(keep) | _recent_actions(store, cutoff)
    manifests = {(m.key.stage, m.fingerprint): m for m in store.manifests()}
    kept = _with_inputs(roots & set(manifests), manifests)
    report = GcReport(kept_actions=len(kept))
    report.actions = [store.action_path(*key) for key in manifests if key not in kept]
    digests = {manifests[key].output.digest for key in kept}
    report.objects = [p for p in sorted(store.root.glob("objects/*")) if p.name not in digests and p.stat().st_mtime <= cutoff]
    report.workspaces = [p for p in sorted(store.root.glob("work/*/*")) if p.stat().st_mtime < cutoff and not is_locked(p)]
    doomed = [*report.actions, *report.objects, *report.workspaces]
    report.freed_bytes = sum(_unshared_bytes(p) for p in doomed)
    if delete:
        for path in doomed:
            shutil.rmtree(path)
    return report


def _recent_actions(store: Store, cutoff: float) -> set[tuple[str, str]]:
    recent = {(p.parent.parent.name, p.parent.name) for p in store.root.glob("actions/*/*/manifest.json") if p.stat().st_mtime > cutoff}
    for path in store.root.glob("runs/*/*.json"):
        if path.stat().st_mtime > cutoff:
            recent |= {(address.partition("[")[0], fp) for address, fp in json.loads(path.read_bytes()).items()}
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
