"""Finished answers on disk, and the fixed chunks in which requests are answered.

A chunk's make-up depends on the requests alone: neither on the batch size nor on how many processes share the work.  So what one run
has answered any other run of the same benchmark finds.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

logger = logging.getLogger(__name__)
CONTEXTS = {"loglikelihood": 64, "loglikelihood_rolling": 16, "generate_until": 32}
"""Contexts in a chunk, by the kind of request: what a killed run loses at most."""


@dataclass(frozen=True)
class Answer:
    """One answer.  value: (log-likelihood, greedy), a log-likelihood or a text.

    truncated: the generation ended at its longest length, without a stop string or end-of-text token.
    cut: the prompt was longer than the model's positions, and its beginning was left out.
    """

    value: Any
    truncated: bool = False
    cut: bool = False


class Journal:
    """Answers of finished chunks, one JSON line each, found by the digest of the requests.

    path: the file written to.  others: files of other processes, read only.
    """

    def __init__(self, path: Path, others: Sequence[Path] = ()):
        self._path = path
        self._answers: dict[str, list[Answer]] = {}
        for file in (*others, path):
            self._read(file)
        if self._answers:
            logger.info("resuming: %d chunks were answered before", len(self._answers))

    def _read(self, path: Path) -> None:
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            try:
                entry = json.loads(line)
                self._answers[entry["key"]] = [Answer(*answer) for answer in entry["answers"]]
            except (json.JSONDecodeError, KeyError, TypeError):
                continue  # the line that a killed process was writing

    @staticmethod
    def key(kind: str, arguments: Sequence[Any]) -> str:
        """Digest of the requests of one chunk."""
        return hashlib.sha256(json.dumps([kind, arguments], sort_keys=True, default=str).encode()).hexdigest()

    def get(self, key: str) -> list[Answer] | None:
        """Answers of a chunk, or None."""
        return self._answers.get(key)

    def put(self, key: str, answers: list[Answer]) -> None:
        """Append the answers of a chunk and bring them to the disk.  Raises ValueError for a number that is not finite."""
        line = json.dumps({"key": key, "answers": [[a.value, a.truncated, a.cut] for a in answers]}, allow_nan=False)
        self._answers[key] = answers
        with self._path.open("a", encoding="utf-8") as file:
            file.write("\n" if self._path.stat().st_size and not self._ends_cleanly() else "")
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _ends_cleanly(self) -> bool:
        with self._path.open("rb") as file:
            file.seek(-1, 2)
            return file.read(1) == b"\n"


def chunk_by_context(requests: Sequence[Instance], size: int) -> list[list[int]]:
    """Indices of the requests in chunks of `size` contexts; longest first, one kind of settings a chunk, a context's requests together.

    Together, because one forward pass answers all one-token continuations of a context.
    """

    def order(index: int) -> tuple[str, int, str, int]:
        context, rest = requests[index].args[0], requests[index].args[1:]
        settings = json.dumps(rest[0], sort_keys=True, default=str) if rest and isinstance(rest[0], dict) else ""
        return settings, -len(context), context, index

    chunks: list[list[int]] = []
    contexts: set[str] = set()
    before: str | None = None
    for index in sorted(range(len(requests)), key=order):
        settings, _, context, _ = order(index)
        if settings != before or (context not in contexts and len(contexts) == size):
            chunks.append([])
            contexts, before = set(), settings
        contexts.add(context)
        chunks[-1].append(index)
    return chunks
