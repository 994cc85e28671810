"""How far a stage is: a bar, log lines at a readable rate, and the live curves of a training."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any
from uuid import UUID

from pesc.build import Job
from pesc.progress_text import fields_text
from pesc.stage import Progress
from pesc.store import Store
from tasks.reporting.artifacts import artifact_key, best_effort, move_progress, rewrite_markdown, write_markdown, write_progress

ARTIFACT_SECONDS = 10.0
"""Seconds between updates of a bar; a stage shorter than this has none."""
LOG_SECONDS = 30.0
"""Seconds between progress lines in the log."""
CURVE_SECONDS = 30.0
"""Seconds between updates of a training's curves."""


class ProgressReport:
    """A builder's progress as the UI shows it.  store: where the workspace of a training is; without it there are no live curves."""

    def __init__(self, job: Job, log: Any, clock: Callable[[], float] = time.monotonic, store: Store | None = None) -> None:
        self._job, self._log, self._clock, self._store = job, log, clock, store if job.key.stage == "train" else None
        self._bar: UUID | None = None
        self._page: UUID | None = None
        self._shown = self._logged = self._drawn = clock()

    def __call__(self, progress: Progress) -> None:
        """Show it, unless something was shown a moment ago."""
        now = self._clock()
        if now - self._logged >= LOG_SECONDS:
            self._logged = now
            self._log.info("%s", progress_line(progress))
        is_last = self._bar is not None and progress.total > 0 and progress.done >= progress.total
        if now - self._shown >= ARTIFACT_SECONDS or is_last:
            self._shown = now
            self._show(progress)
        if self._store and now - self._drawn >= CURVE_SECONDS:
            self._draw(self._store, progress)
            self._drawn = self._clock()  # a long history takes a while to draw

    @best_effort
    def _show(self, progress: Progress) -> None:
        percent = round(min(100.0, 100 * progress.done / progress.total), 1) if progress.total else 0.0
        description = f"{self._job.label}: {progress_line(progress)}"
        if self._bar is None:
            self._bar = write_progress(artifact_key("progress", self._job.address, self._job.recipe), percent, description)
        else:
            move_progress(self._bar, percent, description)

    @best_effort
    def _draw(self, store: Store, progress: Progress) -> None:
        from pesc.evaluate.training_page import live_markdown

        events = store.workspace_path(self._job.key.stage, self._job.fingerprint) / "events.jsonl"
        title = f"Training: {self._job.address} of {self._job.recipe}"
        text = live_markdown(title, events, progress_line(progress))
        if text is None:
            return
        description = f"{title}, under way: {progress.done:g} of {progress.total:g} {progress.unit}"
        if self._page is None:
            self._page = write_markdown(artifact_key("training", self._job.address, self._job.recipe), text, description)
        else:
            rewrite_markdown(self._page, text, description)


def progress_line(progress: Progress) -> str:
    """`40/200 steps  loss 1.93`."""
    parts = [f"{progress.done:g}/{progress.total:g} {progress.unit}", progress.message, fields_text(progress.fields)]
    return "  ".join(filter(None, parts))
