"""lm-eval's Hugging Face model, with progress, a journal of finished answers, and eyes open for what spoils a score.

Requests are answered in fixed chunks of neighbours in length.  A finished chunk is written to the journal at once, and an interrupted
evaluation that starts again takes it from there: the remaining chunks are the very same, so the results are too.  How many requests go
through the model at once is another matter: a batch that does not fit the GPU is halved and tried again.
Imported only inside a stage's process (torch, transformers, lm_eval).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from lm_eval.models.huggingface import HFLM
from transformers import LogitsProcessor, LogitsProcessorList

from pesc.errors import EvaluationError
from pesc.evaluate.journal import CONTEXTS, Answer, Journal, chunk_by_context
from pesc.models.placement import exceeds_one_gpu

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

logger = logging.getLogger(__name__)
_Base: Any = HFLM  # its registration hides its attributes from type checkers
AUTOMATIC = {"cuda": 64, "cpu": 8}
"""Requests of the first batch with `evaluate_batch_size: auto`."""


class NotFiniteError(Exception):
    """The model's logits hold NaN or infinity."""


class FiniteLogits(LogitsProcessor):
    """Stops a generation whose logits give no next token: one of them is NaN or infinite."""

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """scores: [batch, vocabulary].  The largest is not finite when any is NaN or +inf, or all are -inf."""
        if not bool(torch.isfinite(scores.amax(-1)).all()):
            raise NotFiniteError
        return scores


class JournaledLM(_Base):
    """HFLM whose requests are answered chunk by chunk, journaled, and reported.

    marks: (task, number of the item) -> (truncated, cut), over all answers of the item; only items with a mark.
    share: (r, n) answers the chunks r, r + n, r + 2n, ... alone and gives None for the others (see `pesc.evaluate.rank`).
    """

    def __init__(
        self, *args: Any, journal: Journal, on_progress: Callable[[int, int, str], None], share: tuple[int, int] = (0, 1), **kwargs: Any
    ):
        super().__init__(*args, **kwargs)
        self.marks: dict[tuple[str, int], tuple[bool, bool]] = {}
        self._journal = journal
        self._report_progress = on_progress
        self._share = share
        self._truncated: set[str] = set()
        self._cut: set[Any] = set()
        self._batch: Sequence[str] = ()

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """As HFLM's."""
        answers = self._in_chunks("loglikelihood", requests, super().loglikelihood)
        return [(float(answer[0]), bool(answer[1])) if answer is not None else None for answer in answers]  # type: ignore[misc]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """As HFLM's."""
        return self._in_chunks("loglikelihood_rolling", requests, super().loglikelihood_rolling)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """As HFLM's."""
        return self._in_chunks("generate_until", requests, super().generate_until)

    def _in_chunks(self, kind: str, requests: list[Instance], answer: Callable[..., Any]) -> list[Any]:
        answers: list[Any] = [None] * len(requests)
        done = 0
        self._report_progress(0, len(requests), kind)
        for number, chunk in enumerate(chunk_by_context(requests, CONTEXTS[kind])):
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

    def _answer(self, kind: str, requests: list[Instance], answer: Callable[..., Any]) -> list[Answer]:
        """Answers of one chunk.  Raises EvaluationError for logits that are not finite, or a single request that does not fit."""
        self._truncated, self._cut = set(), set()
        while True:
            try:
                values = list(answer(requests, disable_tqdm=True))
                break
            except NotFiniteError:
                raise EvaluationError(_not_finite(requests[0], str(self.model.dtype).removeprefix("torch."))) from None
            except torch.OutOfMemoryError as error:
                if self.batch_size_per_gpu <= 1:
                    raise EvaluationError(
                        f"One request of task {requests[0].task_name} does not fit the GPU's memory beside the model; use a larger GPU, or several."
                    ) from error
                self.batch_size_per_gpu //= 2
                logger.warning("a batch did not fit the GPU's memory: going on with %d requests a batch", self.batch_size_per_gpu)
            torch.cuda.empty_cache()  # outside the handler, whose traceback holds the batch
        generated = kind == "generate_until"
        return [
            Answer(value, generated and request.args[0] in self._truncated, (request.args[0] if generated else request.args) in self._cut)
            for request, value in zip(requests, values, strict=True)
        ]

    def _mark(self, request: Instance, answer: Answer) -> None:
        if answer.truncated or answer.cut:
            key = (str(request.task_name), int(request.doc_id or 0))
            truncated, cut = self.marks.get(key, (False, False))
            self.marks[key] = (truncated or answer.truncated, cut or answer.cut)

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None) -> list[tuple[float, bool]]:
        self._cut.update(text for text, context, end in requests if text is not None and len(context) + len(end) > self.max_length + 1)
        answers = super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)
        if not all(math.isfinite(value) for value, _ in answers):
            raise NotFiniteError
        return answers

    def tok_batch_encode(
        self, strings: Sequence[str], padding_side: str = "left", left_truncate_len: int | None = None, truncation: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As HFLM's, and remembers which prompts lose their beginning."""
        tokens, mask = super().tok_batch_encode(strings, padding_side=padding_side, truncation=truncation)
        self._batch = strings
        if left_truncate_len is not None and tokens.size(1) > left_truncate_len:
            self._cut.update(text for text, length in zip(strings, mask.sum(1).tolist(), strict=True) if length > left_truncate_len)
            tokens, mask = tokens[:, -left_truncate_len:], mask[:, -left_truncate_len:]
        return tokens, mask

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **settings: Any) -> torch.Tensor:
        settings["logits_processor"] = LogitsProcessorList([FiniteLogits()])
        tokens = super()._model_generate(context=context, max_length=max_length, stop=stop, **settings)
        if tokens.size(1) >= max_length:
            ends = self._end_tokens()
            for text, row in zip(self._batch, tokens[:, context.size(1) :].tolist(), strict=True):
                written = self.tok_decode(row, skip_special_tokens=False)
                if ends.isdisjoint(row) and not any(end and end in written for end in stop):
                    self._truncated.add(text)
        return tokens

    def _end_tokens(self) -> set[int]:
        """Every token that ends a generation: a chat model has one for the turn and one for the text."""
        named = self.model.generation_config.eos_token_id
        return {self.eot_token_id, *(named if isinstance(named, list) else [] if named is None else [named])}


def _not_finite(request: Instance, dtype: str) -> str:
    where = f"task {request.task_name}, at or after item {request.doc_id}"
    advice = (
        "the weights themselves are damaged or diverged in training"
        if dtype == "float32"
        else "set dtype: float32, or look at the training"
    )
    return f"The model's logits are not finite numbers ({where}, dtype {dtype}), so it has no score; {advice}."


def load_language_model(
    model: Path, *, device: str, dtype: str, batch_size: int | Literal["auto"], journal: Journal, on_progress: Callable[[int, int, str], None],
    share: tuple[int, int] = (0, 1),
) -> JournaledLM:  # fmt: skip
    """The model directory behind lm-eval's interface.  Raises EvaluationError when it cannot be loaded.

    device: cpu, cuda or cuda:N.  A model that one GPU is too small for is spread over all visible ones.
    """
    spread = exceeds_one_gpu(model, device)
    try:
        return JournaledLM(
            backend="causal",
            pretrained=str(model), tokenizer=str(model), device=device, dtype=dtype, softmax_dtype="float32",
            batch_size=AUTOMATIC[device.partition(":")[0]] if batch_size == "auto" else batch_size, parallelize=spread,
            journal=journal, on_progress=on_progress, share=share, trust_remote_code=False,
        )  # fmt: skip
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise EvaluationError(f"The model to evaluate cannot be loaded ({reason}); run its merge (or download) stage again.") from error
