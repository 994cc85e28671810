"""lm-eval's client of a completions server, made to ask and read as its Hugging Face model does.

lm-eval's own `local-completions` differs from its `hf` in ways that change scores: it leaves out the tokens that a tokenizer adds in
front (Llama's beginning of text), keeps one position less for a prompt that is continued, takes texts as the server decodes them, and
loses the server's reason when a request is refused.  Here tokens are made and texts decoded by the model's own tokenizer, as `hf` does.

A log-likelihood is read from the echo of the prompt: its tokens' log-probabilities (vLLM's prompt_logprobs), and whether each was the
likeliest.  The server must generate a token after them, so that context and continuation together may be one token shorter than its
longest, two shorter than in `hf`; only prompts that are cut differ by that.
Imported only inside a stage's process.
"""

from __future__ import annotations

import copy
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from lm_eval.models.huggingface import HFLM
from lm_eval.models.openai_completions import LocalCompletionsAPI
from lm_eval.models.utils import handle_stop_sequences, has_bos_prefix, normalize_gen_kwargs, postprocess_generated_text

from pesc.errors import EvaluationError
from pesc.evaluate.chunked import NotFiniteError

_Base: Any = LocalCompletionsAPI  # its registration hides its attributes from type checkers
_Hf: Any = HFLM
MAX_GEN_TOKS = 256
"""Longest generation where the task says nothing, as in `hf`."""
SECONDS = 4 * 3600
"""Longest wait for one answer, in which it may stand behind many others."""
UNDERSTOOD = frozenset({"until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k", "min_p", "repetition_penalty"})
"""Settings of a generation that mean the same to the server as to transformers."""
_EMPTY = {"num_beams": 1, "use_cache": True, "num_return_sequences": 1}
"""Settings that ask for nothing where they have this value."""
_NOT_JSON = "Out of range float values are not JSON compliant"
"""What Python says where a server was to write a number that is none; a status of 500 or, from vLLM, of 400."""
_MINUS_INFINITY = -9999.0
"""What vLLM writes for a log-probability of minus infinity."""


class RefusedError(Exception):
    """The server answered a request with an error.  `str()` is what it said."""

    def __init__(self, status: int, said: str):
        super().__init__(f"{status} {said}")
        self.status = status


class CompletionsLM(_Base):
    """lm-eval's model behind `url`, whose prompts, windows and texts are those of the Hugging Face one.

    _truncated, _cut: see `pesc.evaluate.chunked`.  max_positions: the model's longest text, in tokens.
    """

    chat_template_args: Mapping[str, Any] = {}
    apply_chat_template = _Hf.apply_chat_template
    tok_decode = _Hf.tok_decode
    _truncated: set[str]
    _cut: set[Any]

    def __init__(self, model: str, *, max_positions: int, seed: int, concurrent: int):
        super().__init__(
            base_url=None, model=model, tokenizer=model, tokenizer_backend="huggingface", tokenized_requests=True, add_bos_token=None,
            max_length=max_positions, max_gen_toks=MAX_GEN_TOKS, seed=seed, num_concurrent=max(2, concurrent), max_retries=1, timeout=SECONDS,
        )  # fmt: skip
        self._repeats: Counter[str] = Counter()
        self._room = max_positions
        self._error: Exception | None = None

    def tok_encode(
        self, string: str | Sequence[str], left_truncate_len: int | None = None, add_special_tokens: bool | None = None, truncation: bool = False,
        **_others: Any,
    ) -> Any:  # fmt: skip
        """Tokens of a text, or of each prompt that is to be continued."""
        if isinstance(string, str):
            return _Hf.tok_encode(self, string, add_special_tokens=add_special_tokens, left_truncate_len=left_truncate_len)
        begin = self.tokenizer.bos_token
        rows = [self.tokenizer(text, **({"add_special_tokens": False} if has_bos_prefix(text, begin) else {})).input_ids for text in string]
        self._cut.update(text for text, row in zip(string, rows, strict=True) if len(row) > self._room)
        return rows

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Texts of one chunk, whose settings are all the same.  Raises EvaluationError for settings that the server does not know."""
        settings: dict[str, Any] = {**normalize_gen_kwargs(requests[0].args[1], MAX_GEN_TOKS)}
        _require_understood(requests[0].task_name, settings)
        positions = self.max_length + 1  # lm-eval keeps one for a token that is generated anyway
        self._room = positions - settings["max_gen_toks"]
        if self._room <= 0:
            raise EvaluationError(
                f"Task {requests[0].task_name} asks for {settings['max_gen_toks']} new tokens, but the model has {positions} positions: set max_gen_toks."
            )
        self.max_length = positions
        try:
            known = {name: value for name, value in settings.items() if name in UNDERSTOOD}
            return super().generate_until([SimpleNamespace(args=(request.args[0], known)) for request in requests])
        finally:
            self.max_length = positions - 1

    def _loglikelihood_tokens(self, requests: Any, **_settings: Any) -> list[tuple[float, bool]]:
        self._cut.update(text for text, context, end in requests if text is not None and len(context) + len(end) > self.max_length)
        answers = super()._loglikelihood_tokens(requests)
        if not all(math.isfinite(value) for value, _ in answers):
            raise NotFiniteError
        return answers

    def _create_payload(
        self, messages: Any, generate: bool = False, gen_kwargs: Any = None, seed: int = 0, **_others: Any
    ) -> dict[str, Any]:
        payload = super()._create_payload(messages, generate=generate, gen_kwargs=gen_kwargs, seed=seed)
        if generate:
            payload["stop"] = [end for end in payload["stop"] if end]
            # Token ids, for texts as the tokenizer here decodes them; log-probabilities, to see a NaN that would be a word.
            payload |= {"return_token_ids": True, "logprobs": 0}
        return payload

    async def get_batched_requests(self, *arguments: Any, **settings: Any) -> list[Any]:
        """Answers of one chunk, asked at the same time.  Raises what went wrong first, when every request has come to an end."""
        self._error = None
        answers = await super().get_batched_requests(*arguments, **settings)
        if self._error is not None:
            raise self._error
        return answers

    async def amodel_call(self, session: Any, sem: Any, messages: Any, **settings: Any) -> list[Any]:
        """One answer; None after an error, which is kept: raised here, it would leave its neighbours' behind in asyncio's log."""
        async with sem:
            if self._error is None:
                try:
                    return [await self._ask(session, messages, **settings)]
                except Exception as error:
                    self._error = self._error or error
        return [None]

    async def _ask(
        self, session: Any, messages: Any, *, generate: bool = True, cache_keys: Any = None, ctxlens: Any = None, gen_kwargs: Any = None, **_others: Any
    ) -> Any:  # fmt: skip
        """Raises RefusedError and NotFiniteError, and aiohttp's errors when nobody answers."""
        seed = self._seed
        if generate:
            seed += self._repeats[cache_keys[0][0]]  # a prompt that is asked several times is sampled anew each time
            self._repeats[cache_keys[0][0]] += 1
        payload = self._create_payload(messages, generate=generate, gen_kwargs=copy.deepcopy(gen_kwargs), seed=seed)
        async with session.post(self.base_url, json=payload) as response:
            text = await response.text()
        if response.status != 200:
            if _NOT_JSON in text or (response.status >= 500 and "NaN" in text):
                raise NotFiniteError
            raise RefusedError(response.status, _said(text))
        outputs = json.loads(text)
        if generate:
            return self._read(outputs["choices"][0], *cache_keys[0])
        if any(value <= _MINUS_INFINITY for value in outputs["choices"][0]["logprobs"]["token_logprobs"][ctxlens[0] : -1]):
            raise NotFiniteError
        return self.parse_logprobs(outputs, tokens=messages, ctxlens=ctxlens)[0]

    def _read(self, choice: Mapping[str, Any], prompt: str, settings: Mapping[str, Any]) -> str:
        """The text of a generation, as `hf` makes it of the same tokens."""
        if not all(value is not None and math.isfinite(value) for value in choice["logprobs"]["token_logprobs"]):
            raise NotFiniteError
        if choice["finish_reason"] == "length":
            self._truncated.add(prompt)
        end = self.tok_decode([self.eot_token_id], skip_special_tokens=False)
        stops = handle_stop_sequences(list(settings.get("until") or ()), eos=end)
        return postprocess_generated_text(self.tok_decode(choice["token_ids"]), stops, None)


def _require_understood(task: str, settings: Mapping[str, Any]) -> None:
    for name, value in settings.items():
        if name not in UNDERSTOOD and not (name in _EMPTY and value == _EMPTY[name]):
            raise EvaluationError(
                f"Task {task} asks for generations with {name}: {value!r}, which engine vllm does not offer; set engine: transformers for this benchmark."
            )


def _said(text: str) -> str:
    """The message in a server's error, on one line."""
    try:
        found = json.loads(text)
        message = found["error"]["message"] if isinstance(found.get("error"), dict) else found["message"]
    except (ValueError, KeyError, TypeError, AttributeError):
        message = text
    return " ".join(str(message).split())[:500].rstrip(".")
