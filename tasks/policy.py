"""Prefect's cache key is the action's place in the store; its record says what the store says."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect.cache_policies import CachePolicy
from prefect.context import TaskRunContext
from prefect.results import get_result_store

from pesc.build import Job
from pesc.errors import PescError
from pesc.store import ArtifactRef, Store

logger = logging.getLogger(__name__)
RECORD_NAME = "prefect.json"


def record_key(job: Job) -> str:
    """Prefect's cache key of a job: the path of its record, relative to the store."""
    return f"actions/{job.key.stage}/{job.fingerprint}/{RECORD_NAME}"


@dataclass
class StagePolicy(CachePolicy):
    """Keys a task run by its job's fingerprint, after bringing Prefect's record in line with the store.

    Prefect asks for the key immediately before it looks for the record. A record without a whole result behind it (somebody deleted
    the object, or set the action aside) is removed then; a result without a record (`pesc run` made it) gets one. So Prefect finds
    a result exactly when the store has it. Never raises: Prefect would take that for "uncached" and go on.
    """

    def compute_key(self, task_ctx: TaskRunContext, inputs: dict[str, Any], flow_parameters: dict[str, Any], **_: Any) -> str | None:
        """The key; None (Prefect caches nothing) for a task called without `result_storage` at its store."""
        job, store = inputs["job"], Store(inputs["store"])
        if task_ctx.task.result_storage != store.root:
            return None
        path = store.root / record_key(job)
        ref = _stored(job, store)
        if ref is None:
            path.unlink(missing_ok=True)
        elif not _names(path, ref):
            _write_record(task_ctx, job, ref)
        return record_key(job)


def _stored(job: Job, store: Store) -> ArtifactRef | None:
    """What the store and its remote have.

    Nothing, so that the task runs: a manifest that cannot be read or a remote that does not answer (the task says so), and a result that
    has yet to be shared (the task does it).
    """
    try:
        manifest = store.find(job.key.stage, job.fingerprint)
        return manifest.ref if manifest and not store.owes(manifest) else None
    except PescError:
        return None


def _names(path: Path, ref: ArtifactRef) -> bool:
    """Whether the record is there and speaks of this very object."""
    try:
        return ref.digest in path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return False


def _write_record(task_ctx: TaskRunContext, job: Job, ref: ArtifactRef) -> None:
    """Write Prefect's record with Prefect's own writer; a store that cannot be written only costs the word `Cached`."""
    try:
        records: Any = get_result_store().update_for_task(task_ctx.task)  # synchronous here; Prefect types it for both
        records.write(ref, key=record_key(job))
    except Exception as error:
        logger.debug("No record for %s: %s", job.label, error)
