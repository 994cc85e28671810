"""What the engines share: requests in chunks, a journal of finished ones, progress, and marks on answers that are not what they seem.

Requests are answered in fixed chunks of neighbours in length.  A finished chunk is written to the journal at once, and an interrupted
evaluation that starts again takes it from there: the remaining chunks are the very same, so the results are too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pesc.evaluate.journal import CONTEXTS, Answer, Journal, chunk_by_context

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

_Next: Any = object  # an LM of lm-eval stands behind this class, in a subclass


class NotFiniteError(Exception):
    """The model's logits hold NaN or infinity."""


class ChunkedAnswers(_Next):
    """Stands before a class of lm-eval's models: its requests are answered chunk by chunk, journaled, and reported.

    marks: (task, number of the item) -> (truncated, cut), over all answers of the item; only items with a mark.
    contexts: contexts in a chunk, by the kind of request.
    """

    contexts: Mapping[str, int] = CONTEXTS

    def keep_answers(self, journal: Journal, on_progress: Callable[[int, int, str], None], share: tuple[int, int] = (0, 1)) -> None:
        """To be called once.  share: (r, n) answers the chunks r, r + n, ... alone and gives None for the others (see `pesc.evaluate.rank`)."""
        self.marks: dict[tuple[str, int], tuple[bool, bool]] = {}
        self._journal = journal
        self._report_progress = on_progress
        self._share = share
        self._truncated: set[str] = set()
        self._cut: set[Any] = set()

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """As lm-eval's."""
        answers = self._in_chunks("loglikelihood", requests, super().loglikelihood)
        return [(float(answer[0]), bool(answer[1])) if answer is not None else None for answer in answers]  # type: ignore[misc]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """As lm-eval's."""
        return self._in_chunks("loglikelihood_rolling", requests, super().loglikelihood_rolling)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """As lm-eval's."""
        return self._in_chunks("generate_until", requests, super().generate_until)

    def with_marks(self, kind: str, requests: Sequence[Instance], values: Sequence[Any]) -> list[Answer]:
        """The values of one chunk with what was noted in `_truncated` (prompts) and `_cut` (prompts, or pairs of context and continuation)."""
        generated = kind == "generate_until"
        return [
            Answer(value, generated and request.args[0] in self._truncated, (request.args[0] if generated else request.args) in self._cut)
            for request, value in zip(requests, values, strict=True)
        ]

    def _answer(self, kind: str, requests: list[Instance], answer: Callable[..., Any]) -> list[Answer]:
        """Answers of one chunk by lm-eval's own method.  Raises EvaluationError."""
        raise NotImplementedError

    def _in_chunks(self, kind: str, requests: list[Instance], answer: Callable[..., Any]) -> list[Any]:
        answers: list[Any] = [None] * len(requests)
        done = 0
        self._report_progress(0, len(requests), kind)
        for number, chunk in enumerate(chunk_by_context(requests, self.contexts[kind])):
            key = Journal.key(kind, [requests[index].args for index in chunk])
            found = self._journal.get(key)
            if found is None and number % self._share[1] == self._share[0]:
                found = self._answer(kind, [requests[index] for index in chunk], answer)
                self._journal.put(key, found)
            for index, given in zip(chunk, found or (), strict=found is not None):
                answers[index] = given.value
                self._mark(requests[index], given)
            done += len(chunk)
            self._report_progress(done, len(requests), kind)
        return answers

    def _mark(self, request: Instance, answer: Answer) -> None:
        if answer.truncated or answer.cut:
            key = (str(request.task_name), int(request.doc_id or 0))
            truncated, cut = self.marks.get(key, (False, False))
            self.marks[key] = (truncated or answer.truncated, cut or answer.cut)


def not_finite(request: Instance, dtype: str) -> str:
    """The sentence for a chunk, named by its first request, whose logits are NaN or infinite."""
    where = f"task {request.task_name}, at or after item {request.doc_id}"
    advice = (
        "the weights themselves are damaged or diverged in training"
        if dtype == "float32"
        else "set dtype: float32, or look at the training"
    )
    return f"The model's logits are not finite numbers ({where}, dtype {dtype}), so it has no score; {advice}."
