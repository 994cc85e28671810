"""Every failure a user can meet, as a sentence.

A `PescError` carries one message that says what was wrong, where (file, row, field), and what to do about it.
Front ends print the message alone; a traceback is shown only for a defect of this package.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pesc.redaction import redact


class PescError(Exception):
    """A failure with a cause the user can act on.  `str(error)` is the whole message, without secrets."""

    def __init__(self, *args: object) -> None:
        super().__init__(*(redact(item) if isinstance(item, str) else item for item in args))

    exit_code = 1
    """What the `pesc` command ends with."""


class CancelledError(PescError):
    """The user pressed Ctrl-C, and what was half done is gone."""

    exit_code = 130


class RecipeError(PescError):
    """A recipe, an override or an address that cannot be used."""


class SourceError(PescError):
    """A source that cannot be fetched, or whose bytes are not the expected ones."""


class TransientError(PescError):
    """Trouble of a network or of somebody else's server, which may be gone in a minute: the same step is worth another try."""


class TransientSourceError(SourceError, TransientError):
    """A source that may answer in a minute: no connection, too many requests, an error of the server."""


class DataError(PescError):
    """Rows that cannot be used: wrong shape, wrong type, too many of them broken."""


class ModelError(PescError):
    """A model directory or checkpoint that cannot be read, converted or merged."""


class PublishError(PescError):
    """A model that cannot be published as it is, or a hub that does not take it."""


class StoreError(PescError):
    """The store is damaged, full, or in use by another process."""


class StoreBusyError(StoreError):
    """Another process holds the workspace of the same action."""


class RemoteError(StoreError):
    """The remote cannot be used as it is: no bucket, no permission, a damaged file, a URL that is none."""


class TransientRemoteError(RemoteError, TransientError):
    """The remote did not answer, in several tries; it may in a minute."""


class StageFailedError(PescError):
    """A stage's program ended without a result.  The message ends with the tail of its log."""


class TrainingFailedError(StageFailedError):
    """Training ended with an error of its own (a bad loss, a frozen expert, out of memory)."""


class TrainingOutOfMemoryError(TrainingFailedError):
    """A rank could not get the memory it asked for, or the kernel killed it for want of memory.  The message says what to change."""


class TrainingHungError(TrainingFailedError):
    """A rank gave no sign of life for too long.  A retry resumes from the last checkpoint."""


class CheckpointSpaceError(TrainingFailedError):
    """A checkpoint does not fit on the disk; earlier ones are kept."""


class InterruptedStageError(StageFailedError):
    """The stage was asked to stop and its checkpoints are kept: run it again to resume."""


class PreemptedError(StageFailedError):
    """The machine took the processes away; a retry resumes from the last checkpoint."""


class WorkerLostError(PreemptedError):
    """The worker that a stage was dispatched to has gone with it; a retry, on another worker, resumes from what it has left in the store."""


class PeerLostError(PreemptedError):
    """Another machine of the run has gone, or never came; its checkpoint is kept and a retry, on all machines, resumes from it."""


class RankKilledError(TrainingFailedError):
    """The system killed a training process; a retry resumes from the last checkpoint."""


class ServeError(PescError):
    """The server of a model cannot start, or ended by itself."""


class EvaluationError(PescError):
    """A benchmark that cannot be run as configured."""


class TransientEvaluationError(EvaluationError, TransientError):
    """A benchmark whose items the hub did not give; it may in a minute."""


class HolesError(PescError):
    """Benchmarks that ended without a result, in a run whose other actions are finished.  `finished`: their outcomes by address."""

    def __init__(self, message: str, finished: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.finished = dict(finished or {})


def disk_sentence(error: OSError, root: Path) -> str | None:
    """A full, read-only or forbidden disk as a sentence; None for anything else."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"The disk of {root} is full. Free space (`pesc gc` shows what nothing needs), then run again: finished stages and checkpoints are kept."
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
        return f"{error.filename or root} cannot be used ({error.strerror}). Give another store with --store or PESC_STORE, or mend its permissions."
    return None
