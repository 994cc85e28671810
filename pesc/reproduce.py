"""Build a stored result again from its manifest alone, and compare every byte.

    pesc reproduce 3f2a91bc77aa          by the start of an object's digest, as the report names it, or of a fingerprint

No recipe is needed: the manifest has the complete settings and the digests of the inputs. The store is left as it is; the workspace
is a temporary one, so nothing of an earlier attempt is reused.

Pitfall: bytes can be expected to be the same where the manifest's code version, packages and kind of hardware are; what differs in
them is part of the answer.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pesc.errors import StoreError
from pesc.launch.pool import worker_pool
from pesc.pipeline import STAGE_NAMES, stage_named
from pesc.stage import Execution, Progress, StageContext
from pesc.store import Manifest, Store
from pesc.store.digest import digest_tree


@dataclass(frozen=True)
class Reproduction:
    """What building a result again gave.  differing: files of either whose bytes are not the same; changed: `torch 2.13.0 → 2.11.0`."""

    manifest: Manifest
    digest: str
    differing: tuple[str, ...]
    changed: tuple[str, ...]

    @property
    def is_same(self) -> bool:
        """Whether every byte is the same."""
        return self.digest == self.manifest.output.digest


def find_manifest(store: Store, name: str) -> Manifest:
    """The newest manifest of an object digest or a fingerprint that starts with `name` (at least 6 digits).  Raises StoreError."""
    if len(name) < 6:
        raise StoreError(f"{name!r} is too short for the start of a digest or a fingerprint: give at least 6 digits.")
    found = [m for m in store.manifests() if m.output.digest.startswith(name) or m.fingerprint.startswith(name)]
    if not found:
        raise StoreError(f"No result in {store.root} has a digest or a fingerprint that starts with {name!r}.")
    if len({m.output.digest for m in found}) > 1:
        raise StoreError(
            f"Several results in {store.root} start with {name!r}: {', '.join(sorted({m.address for m in found}))}. Give more of it."
        )
    return found[0]


def reproduce(store: Store, manifest: Manifest, on_progress: Callable[[Progress], None] = lambda _p: None) -> Reproduction:
    """Build a result again in a temporary workspace of the store.  Raises StoreError when an input is gone, and what the stage raises."""
    from pesc.build import call_builder

    stage = stage_named(manifest.key.stage)
    digests = {name: digest for name, digest in manifest.key.inputs.items() if name != "local"}
    found = {name: _input_folder(store, manifest, name, digest) for name, digest in digests.items()}
    if gone := [name for name, folder in found.items() if folder is None]:
        raise StoreError(
            f"{manifest.address} was made from {', '.join(gone)}, whose object is no longer in {store.root}; "
            f"`pesc run {manifest.recipe} --until '{gone[0]}'` builds it again."
        )
    inputs = {name: folder for name, folder in found.items() if folder is not None}
    (store.root / "work").mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="reproduce-", dir=store.root / "work") as folder:
        work = Path(folder)
        (work / "out").mkdir()
        execution = Execution.model_validate({k: v for k, v in manifest.execution.items() if k in Execution.model_fields})
        with worker_pool(execution, manifest.address) as map_shards:
            ctx = StageContext(
                address=manifest.address, config=stage.config_type.model_validate(manifest.key.config),
                inputs=inputs, out=work / "out", work=work,
                execution=execution, on_progress=on_progress, map_shards=map_shards, digests=digests,
            )  # fmt: skip
            call_builder(stage, ctx)
        digest, entries = digest_tree(work / "out")
    before, after = ({f.path: f.sha256 for f in manifest.output.files}, {e.path: e.sha256 for e in entries})
    differing = tuple(sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path)))
    return Reproduction(manifest, digest, differing, tuple(_changes(manifest, stage.code_version)))


def _input_folder(store: Store, manifest: Manifest, name: str, digest: str) -> Path | None:
    """The object of an input: here, or pulled from the remote by the action that made it; None when it is gone."""
    folder = store.object_path(digest)
    if not folder.is_dir() and store.remote and (fingerprint := manifest.input_fingerprints.get(name)):
        made = next((m for stage in STAGE_NAMES if (m := store.find(stage, fingerprint))), None)
        if made and made.output.digest == digest:
            return store.open(made.ref)
    return folder if folder.is_dir() else None


def _changes(manifest: Manifest, code_version: int) -> Iterator[str]:
    """What is another here than where the result was made: code version, commit, packages, kind of hardware."""
    from pesc.provenance import environment

    now, then = environment(), manifest.environment
    if manifest.key.code_version != code_version:
        yield f"code_version {manifest.key.code_version} → {code_version}"
    commits = [str((facts.get("git") or {}).get("commit", "unknown"))[:12] for facts in (then, now)]
    if commits[0] != commits[1]:
        yield f"commit {commits[0]} → {commits[1]}"
    old, new = then.get("packages") or {}, now["packages"]
    yield from (
        f"{name} {old.get(name, 'absent')} → {new.get(name, 'absent')}" for name in sorted({*old, *new}) if old.get(name) != new.get(name)
    )
    for name in ("cpu", "gpus"):
        before, after = (then.get("hardware") or {}).get(name), now["hardware"].get(name)
        if before != after:
            yield f"{name} {before} → {after}"


def verdict(found: Reproduction) -> str:
    """The answer as a sentence."""
    made = f"{found.manifest.address} of {found.manifest.recipe}"
    if found.is_same:
        return f"{made}: built again, the same {len(found.manifest.output.files)} files byte for byte, object {found.digest[:12]}."
    changed = (
        f" Other than when it was made: {', '.join(found.changed)}." if found.changed else " Nothing known is other than when it was made."
    )
    return (
        f"{made}: built again, but {len(found.differing)} of its files differ ({', '.join(found.differing[:5])}): object {found.digest[:12]} "
        f"in place of {found.manifest.output.digest[:12]}.{changed}"
    )
