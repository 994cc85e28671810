"""Actions made without a stage: files in, committed."""

from __future__ import annotations

from collections.abc import Mapping

from pesc.store import Manifest, Store
from pesc.store.layout import records_in
from pesc.store.manifest import Key, Output, OutputFile


def made(
    store: Store, files: Mapping[str, bytes], stage: str = "mix", records: Mapping[str, bytes] | None = None, refreshed: bool = False,
    started_at: str = "2026-01-01T00:00:00+00:00", commit: bool = True, **config,
) -> Manifest:  # fmt: skip
    """An action of this store whose object has these files."""
    key = Key(stage=stage, code_version=1, config=config, inputs={})
    with store.workspace(stage, key.fingerprint, stage) as workspace:
        workspace.clear_output()
        for name, data in files.items():
            (workspace.out / name).parent.mkdir(parents=True, exist_ok=True)
            (workspace.out / name).write_bytes(data)
        digest, entries = store.publish(workspace.out)
        action = store.action_path(stage, key.fingerprint)
        for name, data in (records or {}).items():
            (action / name).parent.mkdir(parents=True, exist_ok=True)
            (action / name).write_bytes(data)
        listing = [OutputFile(**entry.__dict__) for entry in entries]
        manifest = Manifest(
            address=stage, recipe="r", fingerprint=key.fingerprint, key=key, refreshed=refreshed, seconds=1, started_at=started_at,
            output=Output(digest=digest, size_bytes=sum(f.size for f in listing), files=listing),
            records=[OutputFile(**entry.__dict__) for entry in records_in(action)],
        )  # fmt: skip
        if commit:
            store.commit(manifest)
        workspace.discard()
    return manifest
