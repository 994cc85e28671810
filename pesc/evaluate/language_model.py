"""Engine `transformers`: lm-eval's Hugging Face model, with progress, a journal of finished answers, and eyes open for what spoils a score.

How many requests go through the model at once has nothing to do with the journal's chunks: a batch that does not fit the GPU is halved
and tried again.
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
from pesc.evaluate.chunked import ChunkedAnswers, NotFiniteError, not_finite
from pesc.evaluate.journal import Answer, Journal
from pesc.evaluate.results import ModelFacts, model_facts
from pesc.models.placement import exceeds_one_gpu

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

logger = logging.getLogger(__name__)
_Base: Any = HFLM  # its registration hides its attributes from type checkers
AUTOMATIC = {"cuda": 64, "cpu": 8}
"""Requests of the first batch with `evaluate_batch_size: auto`."""


class FiniteLogits(LogitsProcessor):
    """Stops a generation whose logits give no next token: one of them is NaN or infinite."""

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """scores: [batch, vocabulary].  The largest is not finite when any is NaN or +inf, or all are -inf."""
        if not bool(torch.isfinite(scores.amax(-1)).all()):
            raise NotFiniteError
        return scores


class JournaledLM(ChunkedAnswers, _Base):
    """HFLM whose requests are answered chunk by chunk, journaled, and reported (see `ChunkedAnswers`)."""

    engine_version = None
    """The version of transformers is in the manifest, as that of every package is."""

    def __init__(
        self, *args: Any, journal: Journal, on_progress: Callable[[int, int, str], None], share: tuple[int, int] = (0, 1), **kwargs: Any
    ):
        super().__init__(*args, **kwargs)
        self.keep_answers(journal, on_progress, share)
        self._batch: Sequence[str] = ()

    def facts(self) -> ModelFacts:
        """What is evaluated."""
        return model_facts(self.config.to_dict(), self.model.num_parameters())

    def measurements(self) -> dict[str, Any]:
        """Where and how it answers, for the manifest."""
        return {"device": str(self.device), "batch_size": int(self.batch_size)}

    def close(self) -> None:
        """Nothing is open."""

    def _answer(self, kind: str, requests: list[Instance], answer: Callable[..., Any]) -> list[Answer]:
        """Answers of one chunk.  Raises EvaluationError for logits that are not finite, or a single request that does not fit."""
        self._truncated, self._cut = set(), set()
        while True:
            try:
                values = list(answer(requests, disable_tqdm=True))
                break
            except NotFiniteError:
                raise EvaluationError(not_finite(requests[0], str(self.model.dtype).removeprefix("torch."))) from None
            except torch.OutOfMemoryError as error:
                if self.batch_size_per_gpu <= 1:
                    raise EvaluationError(
                        f"One request of task {requests[0].task_name} does not fit the GPU's memory beside the model; use a larger GPU, or several."
                    ) from error
                self.batch_size_per_gpu //= 2
                logger.warning("a batch did not fit the GPU's memory: going on with %d requests a batch", self.batch_size_per_gpu)
            torch.cuda.empty_cache()  # outside the handler, whose traceback holds the batch
        return self.with_marks(kind, requests, values)

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
