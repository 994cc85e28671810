"""lm-eval's Hugging Face model, with progress and a journal of finished answers.

Requests are answered in fixed chunks of neighbours in length. A finished chunk is written to the journal at once, and an
interrupted evaluation that starts again takes it from there: the remaining chunks are the very same batches, so the results are too.
Imported only inside a stage's process (torch, transformers, lm_eval).
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.models.huggingface import HFLM

from pesc.errors import EvaluationError

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

logger = logging.getLogger(__name__)


class Journal:
    """Answers of finished chunks, one JSON line each, found by the digest of the requests."""

    def __init__(self, path: Path):
        self._path = path
        self._answers: dict[str, list[Any]] = {}
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue  # the line that a killed process was writing
            self._answers[entry["key"]] = entry["answers"]
        if self._answers:
            logger.info("resuming: %d chunks were answered before", len(self._answers))

    @staticmethod
    def key(kind: str, arguments: Sequence[Any]) -> str:
        """Digest of the requests of one chunk."""
        return hashlib.sha256(json.dumps([kind, arguments], sort_keys=True, default=str).encode()).hexdigest()

    def get(self, key: str) -> list[Any] | None:
        """Answers of a chunk, or None."""
        return self._answers.get(key)

    def put(self, key: str, answers: list[Any]) -> None:
        """Append the answers of a chunk."""
        self._answers[key] = answers
        with self._path.open("a", encoding="utf-8") as file:
            file.write("\n" if self._path.stat().st_size and not self._ends_cleanly() else "")
            file.write(json.dumps({"key": key, "answers": answers}) + "\n")

    def _ends_cleanly(self) -> bool:
        with self._path.open("rb") as file:
            file.seek(-1, 2)
            return file.read(1) == b"\n"


def chunk_by_context(requests: Sequence[Instance], size: int) -> list[list[int]]:
    """Indices of the requests in chunks of `size` contexts; longest first, and the requests of one context stay together.

    Together, because one forward pass answers all one-token continuations of a context.
    """

    def order(index: int) -> tuple[str, int, str, int]:
        context, rest = requests[index].args[0], requests[index].args[1:]
        settings = json.dumps(rest[0], sort_keys=True, default=str) if rest and isinstance(rest[0], dict) else ""
        return settings, -len(context), context, index

    chunks: list[list[int]] = []
    contexts: set[tuple[str, str]] = set()
    for index in sorted(range(len(requests)), key=order):
        key = order(index)
        context = (key[0], key[2])
        if not chunks or (context not in contexts and len(contexts) == size):
            chunks.append([])
            contexts = set()
        contexts.add(context)
        chunks[-1].append(index)
    return chunks


_Base: Any = HFLM  # its registration hides its attributes from type checkers


class JournaledLM(_Base):
    """HFLM whose requests are answered chunk by chunk, journaled, and reported."""

    def __init__(self, *args: Any, journal: Path, on_progress: Callable[[int, int, str], None], **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._journal = Journal(journal)
        self._report_progress = on_progress

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """As HFLM's."""
        answers = self._in_chunks("loglikelihood", requests, super().loglikelihood)
        return [(float(value), bool(greedy)) for value, greedy in answers]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """As HFLM's."""
        return self._in_chunks("generate_until", requests, super().generate_until)

    def _in_chunks(self, kind: str, requests: list[Instance], answer: Callable[..., Iterable[Any]]) -> list[Any]:
        answers: list[Any] = [None] * len(requests)
        done = 0
        self._report_progress(0, len(requests), kind)
        for chunk in chunk_by_context(requests, int(self.batch_size)):
            key = Journal.key(kind, [requests[index].args for index in chunk])
            found = self._journal.get(key)
            if found is None:
                found = list(answer([requests[index] for index in chunk], disable_tqdm=True))
                self._journal.put(key, found)
            for index, value in zip(chunk, found, strict=True):
                answers[index] = value
            done += len(chunk)
            self._report_progress(done, len(requests), kind)
        return answers


def _weight_bytes(model: Path) -> int:
    return sum(file.stat().st_size for file in model.glob("*.safetensors"))


def choose_device(wanted: str) -> str:
    """`cuda` or `cpu`.  Raises EvaluationError when a GPU is asked for and there is none."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise EvaluationError("execution.device is cuda, but torch sees no GPU on this machine; use execution.device=cpu or a GPU worker.")
    return "cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu"


def load_language_model(
    model: Path, *, device: str, dtype: str, batch_size: int, journal: Path, on_progress: Callable[[int, int, str], None]
) -> JournaledLM:
    """The model directory behind lm-eval's interface.  Raises EvaluationError when it cannot be loaded.

    A model whose weights fill more than 80 % of one GPU is spread over all visible ones.
    """
    spread = False
    if device == "cuda" and torch.cuda.device_count() > 1:
        spread = _weight_bytes(model) > 0.8 * torch.cuda.get_device_properties(0).total_memory
    try:
        return JournaledLM(
            backend="causal",
            pretrained=str(model), tokenizer=str(model), device=device, dtype=dtype, softmax_dtype="float32", batch_size=batch_size,
            parallelize=spread,
            journal=journal, on_progress=on_progress,
        )  # fmt: skip
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise EvaluationError(f"The model to evaluate cannot be loaded ({reason}); run its merge (or download) stage again.") from error
