"""Engine `vllm`: a server of vLLM that this stage starts, asks and ends, behind lm-eval's interface, with the journal of the other engine.

The server starts with the first chunk that no journal has, so that a benchmark that was answered before needs none, and so that its
longest text is no longer than these requests need: a long context that the GPU has no room for is not asked for.
Imported only inside a stage's process.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import aiohttp

from pesc.errors import EvaluationError, ModelError, ServeError
from pesc.evaluate.chunked import ChunkedAnswers, NotFiniteError, not_finite
from pesc.evaluate.completions import MAX_GEN_TOKS, CompletionsLM, RefusedError
from pesc.evaluate.journal import Answer, Journal
from pesc.evaluate.results import ModelFacts, model_facts
from pesc.models.placement import exceeds_one_gpu
from pesc.serve.background import BackgroundServer
from pesc.serve.environment import Vllm, find_vllm

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

logger = logging.getLogger(__name__)
CONTEXTS = {"loglikelihood": 64, "loglikelihood_rolling": 16, "generate_until": 64}
"""Contexts in a chunk; more generations than on the other engine, for the server waits for the last of a chunk."""
AUTOMATIC = {"cuda": 128, "cpu": 16}
"""Requests at the same time with `evaluate_batch_size: auto`; the server makes its own batches of them."""
LOG_NAME = "vllm.log"
_LAST_WORDS_SECONDS = 15.0
"""How long a server that does not answer any more may take to end."""
_SPARE_TOKENS = 32
_SMALLEST = 512
"""Shortest longest text of a server, in tokens."""


class Server(Protocol):
    """What answers."""

    @property
    def url(self) -> str:
        """Where it answers."""
        ...

    @property
    def name(self) -> str:
        """What the model is called in requests."""
        ...

    @property
    def max_model_len(self) -> int:
        """Longest text that it takes, in tokens."""
        ...

    def failure(self, seconds: float) -> str | None:
        """How it ended, if it does within so many seconds."""
        ...


StartServer = Callable[[int, ExitStack], Server]
"""Starts a server for texts of so many tokens, to be ended by the stack."""


@dataclass(frozen=True)
class Place:
    """A model directory as `pesc.serve` wants it."""

    directory: Path
    fields: Mapping[str, Any]
    template: str | None = None


class ServedLM(ChunkedAnswers, CompletionsLM):
    """A server's model whose requests are answered chunk by chunk, journaled, and reported (see `ChunkedAnswers`)."""

    contexts = CONTEXTS

    def __init__(
        self, place: Place, *, dtype: str, device: str, seed: int, concurrent: int, engine_version: str, start: StartServer, journal: Journal,
        on_progress: Callable[[int, int, str], None],
    ):  # fmt: skip
        from lm_eval.models.utils import resolve_max_length
        from transformers import AutoConfig, AutoTokenizer

        directory = str(place.directory)
        self.config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        positions = resolve_max_length(self.config, AutoTokenizer.from_pretrained(directory, trust_remote_code=False))
        super().__init__(directory, max_positions=positions, seed=seed, concurrent=concurrent)
        self.keep_answers(journal, on_progress)
        self.engine_version = engine_version
        self._dtype, self._device_name = dtype, device
        self._start, self._open = start, ExitStack()
        self._server: Server | None = None
        self._needed = 0

    def facts(self) -> ModelFacts:
        """What is evaluated; its parameters are counted without memory for them."""
        import torch
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(self.config, trust_remote_code=False)
        return model_facts(self.config.to_dict(), empty.num_parameters())

    def measurements(self) -> dict[str, Any]:
        """Where and how it answers, for the manifest."""
        return {"device": self._device_name, "batch_size": self._concurrent, "engine": self.engine_version}

    def close(self) -> None:
        """End the server."""
        self._server = None
        self._open.close()

    def _in_chunks(self, kind: str, requests: list[Instance], answer: Callable[..., Any]) -> list[Any]:
        self._needed = min(self.max_length + 1, max((_bound(request.args) for request in requests), default=0))
        return super()._in_chunks(kind, requests, answer)

    def _answer(self, kind: str, requests: list[Instance], answer: Callable[..., Any]) -> list[Answer]:
        """Answers of one chunk.  Raises EvaluationError when the server cannot be had, ends, refuses, or its numbers are none."""
        self._truncated, self._cut = set(), set()
        self._repeats.clear()
        self._require_server()
        try:
            values = list(answer(requests, disable_tqdm=True))
        except NotFiniteError:
            raise EvaluationError(not_finite(requests[0], self._dtype)) from None
        except (aiohttp.ClientError, RefusedError, OSError) as error:  # TimeoutError is an OSError
            raise EvaluationError(self._why(requests[0].task_name, error)) from error
        return self.with_marks(kind, requests, values)

    def _require_server(self) -> None:
        if self._server is not None and self._server.max_model_len >= self._needed:
            return
        self.close()
        try:
            self._server = self._start(self._needed, self._open)
        except (ServeError, ModelError) as error:
            raise EvaluationError(f"Engine vllm did not start: {error}") from error
        self.base_url, self.model = f"{self._server.url}/v1/completions", self._server.name

    def _why(self, task: str | None, error: Exception) -> str:
        assert self._server is not None
        kept = "What was answered before is kept: run the stage again."
        lives = isinstance(error, RefusedError) and error.status < 500
        if not lives and (ended := self._server.failure(_LAST_WORDS_SECONDS)):
            return f"The server of engine vllm ended in the middle of task {task}: {ended} {kept}"
        if isinstance(error, RefusedError):
            return f"The server of engine vllm refused a request of task {task}: {error}. Set engine: transformers for this benchmark."
        said = str(error) or type(error).__name__
        return f"The server of engine vllm gave no answer to a request of task {task} ({said}). {kept}"


def _bound(arguments: Sequence[Any]) -> int:
    """Tokens that a request may need, at most: a token is at least one byte."""
    texts = [text for text in arguments if isinstance(text, str)]
    settings = next((one for one in arguments if isinstance(one, Mapping)), {})
    new = max([int(value) for name, value in settings.items() if name.startswith("max_") and isinstance(value, int)], default=MAX_GEN_TOKS)
    return max(_SMALLEST, sum(len(text.encode()) for text in texts) + _SPARE_TOKENS + new)


def load_served_model(
    model: Path, *, device: str, dtype: str, batch_size: int | str, seed: int, python: str | None, work: Path,
    on_progress: Callable[[int, int, str], None],
) -> ServedLM:  # fmt: skip
    """The model directory behind a server that is still to be started.  Raises EvaluationError when there is no vLLM for the device.

    device: cpu, cuda or auto.  python: where vLLM is (see `find_vllm`).  The journal and the server's log lie in `work`.
    """
    vllm = require_vllm(python, device)
    where = "cpu" if vllm.cpu else "cuda"
    try:
        place = Place(model, json.loads((model / "config.json").read_text(encoding="utf-8")))
        return ServedLM(
            place, dtype=dtype, device=where, seed=seed, concurrent=AUTOMATIC[where] if isinstance(batch_size, str) else batch_size,
            engine_version=f"{vllm.package} {vllm.version}", start=starter(vllm, place, dtype, work / LOG_NAME),
            journal=Journal(work / f"served-{vllm.package}-{vllm.version}.jsonl"), on_progress=on_progress,
        )  # fmt: skip
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise EvaluationError(f"The model to evaluate cannot be loaded ({reason}); run its merge (or download) stage again.") from error


def require_vllm(python: str | None, device: str) -> Vllm:
    """The vLLM that answers.  Raises EvaluationError when there is none, or one for another device than the one asked for."""
    try:
        vllm = find_vllm(python)
    except ServeError as error:
        raise EvaluationError(f"evaluate.engine is vllm, but {error} Or set evaluate.engine: transformers.") from error
    if (device, vllm.cpu) in (("cuda", True), ("cpu", False)):
        build = "CPUs" if vllm.cpu else "GPUs"
        raise EvaluationError(
            f"execution.device is {device}, but the vLLM at {vllm.python} is a build for {build}: set PESC_VLLM to another environment, "
            "or evaluate.engine: transformers."
        )
    return vllm


def starter(vllm: Vllm, place: Place, dtype: str, log_path: Path) -> StartServer:
    """Starts vLLM on one GPU, or on all visible ones where the model is too large for one."""

    def start(max_model_len: int, stack: ExitStack) -> Server:
        import torch

        spread = torch.cuda.device_count() if exceeds_one_gpu(place.directory, "cpu" if vllm.cpu else "cuda") else 1
        room = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pesc-vllm-")))
        logger.info("starting %s %s for texts of %d tokens; its log is %s", vllm.package, vllm.version, max_model_len, log_path)
        server = BackgroundServer(vllm, place, room, log_path, dtype=dtype, max_model_len=max_model_len, tensor_parallel_size=spread)
        return stack.enter_context(server)

    return start
