"""A loaded model that answers, one reply at a time.

speaker = load_speaker(find_model("out/merged", store_root()), LoadOptions(device="cpu"))
reply = speaker.answer([{"role": "user", "content": "Why is the sky blue?"}], Sampling(), on_text=print)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jinja2 import TemplateError
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, BatchEncoding, set_seed
from transformers.utils import logging as transformers_logging

import pesc.models
from pesc.errors import ModelError
from pesc.generate.prompts import Message
from pesc.generate.settings import LoadOptions, Sampling
from pesc.generate.streaming import PieceStreamer, Stop
from pesc.model_argument import ModelPlace
from pesc.models.placement import choose_device, device_map
from pesc.remote_code import knows_type

DEFAULT_NEW_TOKENS = 512
"""Tokens of a reply where neither an option nor the model's generation config says how many."""
_LOST = (".adapters.", ".router.", ".experts.", ".moe_")
"""Parts of names of tensors without which a model is another one."""


class ContextFullError(ModelError):
    """The prompt leaves no room for a reply."""


@dataclass(frozen=True)
class Reply:
    """What was said, and how it ended."""

    text: str
    tokens: int
    prompt_tokens: int
    finish: str
    """stop: the model's end token. length: no more tokens were allowed. interrupted: by the user."""
    seconds: float


@dataclass
class Speaker:
    """A model, its tokenizer and the chat template in use."""

    model: Any
    tokenizer: Any
    place: ModelPlace
    stops: list[int] = field(default_factory=list)

    @property
    def has_template(self) -> bool:
        """Whether conversations can be put."""
        return bool(self.place.template or self.tokenizer.chat_template)

    @property
    def context(self) -> int | None:
        """Tokens that the model was made for, or None where its config does not say."""
        return getattr(self.model.config, "max_position_embeddings", None)

    def encode(self, content: str | Sequence[Message]) -> BatchEncoding:
        """Ids and mask [1, T] of a text as it is, or of a conversation through the chat template.  Raises ModelError for what cannot be put."""
        encoded = self.tokenizer(content, return_tensors="pt") if isinstance(content, str) else self._encode_chat(content)
        if not encoded["input_ids"].numel():
            raise ModelError("The prompt is empty, and the tokenizer puts nothing before it: write something.")
        return BatchEncoding({name: encoded[name] for name in ("input_ids", "attention_mask")})

    def _encode_chat(self, messages: Sequence[Message]) -> BatchEncoding:
        if not self.has_template:
            raise ModelError(
                f"The tokenizer of {self.place.name} has no chat template: give one with --chat-template (chatml, pesc, or a file), or use "
                "`pesc generate --raw`, which takes the prompt as it is."
            )
        try:
            return self.tokenizer.apply_chat_template(
                list(messages), chat_template=self.place.template, add_generation_prompt=True, return_dict=True, return_tensors="pt"
            )
        except (TemplateError, TypeError) as error:
            roles = ", ".join(message["role"] for message in messages)
            raise ModelError(f"The chat template of {self.place.name} does not take the turns {roles} ({error}).") from None

    def answer(
        self,
        content: str | Sequence[Message],
        sampling: Sampling,
        on_text: Callable[[str], None] = lambda _piece: None,
        stop: Stop | None = None,
    ) -> Reply:
        """The reply; `on_text` gets each piece as it is made.  Raises ContextFullError, or ModelError for want of memory."""
        encoded, started = self.encode(content).to(self.model.device), time.monotonic()
        length = encoded["input_ids"].shape[1]
        options = self._options(sampling, length)
        streamer = PieceStreamer(self.tokenizer, on_text)
        if sampling.seed is None:
            torch.seed()
        else:
            set_seed(sampling.seed)
        try:
            self.model.generate(**encoded, **options, streamer=streamer, stopping_criteria=[stop] if stop else None)
        except KeyboardInterrupt:
            if stop is None:
                raise
            streamer.end()
        except torch.OutOfMemoryError:
            raise ModelError(
                f"There is no memory for {length} tokens and the reply: say less, allow fewer with --max-new-tokens, or load with --four-bit."
            ) from None
        finish = "stop" if streamer.last in self.stops else "interrupted" if stop and stop.asked else "length"
        return Reply(streamer.text, streamer.count, length, finish, time.monotonic() - started)

    def _options(self, sampling: Sampling, length: int) -> dict[str, Any]:
        """Arguments of `generate`; what is not here comes from the model's generation config."""
        own = self.model.generation_config
        wanted = sampling.max_new_tokens or own.max_new_tokens or DEFAULT_NEW_TOKENS
        if self.context is not None:
            if length >= self.context:
                raise ContextFullError(
                    f"The prompt has {length} tokens, but the model was made for {self.context} with the reply: say less."
                )
            wanted = min(wanted, self.context - length)
        pad = own.pad_token_id if own.pad_token_id is not None else self.tokenizer.pad_token_id
        ends = {"eos_token_id": self.stops, "pad_token_id": self.stops[0] if pad is None else pad} if self.stops else {}
        return {"max_new_tokens": wanted, "num_beams": 1, **ends, **sampling.generate_options()}


def load_speaker(place: ModelPlace, options: LoadOptions) -> Speaker:
    """Tokenizer and model.  Raises ModelError for files that do not load, weights that are missing, and a device that is not there."""
    pesc.models.register()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    device = choose_device(options.device)
    code = {"trust_remote_code": options.trust_remote_code}
    _check_trust(place, options)
    tokenizer = _load(place, "tokenizer", lambda: AutoTokenizer.from_pretrained(place.directory, **code))
    model, info = _load(
        place,
        "model",
        lambda: AutoModelForCausalLM.from_pretrained(place.directory, output_loading_info=True, **code, **_how(place, options, device)),
    )
    _check_loaded(place, info)
    _check_vocabulary(place, tokenizer, model)
    return Speaker(model.eval(), tokenizer, place, _stops(model.generation_config.eos_token_id, tokenizer.eos_token_id))


def _check_trust(place: ModelPlace, options: LoadOptions) -> None:
    if "auto_map" in place.fields and not knows_type(place.fields.get("model_type")) and not options.trust_remote_code:
        raise ModelError(
            f"{place.name} is of model_type {place.fields.get('model_type')!r} and brings its own code, which would run on this machine: read "
            "it, then give --trust-remote-code."
        )


def _how(place: ModelPlace, options: LoadOptions, device: str) -> dict[str, Any]:
    """Arguments of from_pretrained: type, device, 4 bit."""
    dtype = ("auto" if device == "cuda" else "float32") if options.dtype == "auto" else options.dtype
    how: dict[str, Any] = {"dtype": dtype, "device_map": device_map(place.directory, device)}
    if not options.four_bit:
        return how
    if "quantization_config" in place.fields:
        raise ModelError(f"The weights of {place.name} are quantised already: leave out --four-bit.")
    from pesc.models.nf4 import quantization_config

    compute = "bfloat16" if dtype == "auto" else dtype
    return how | {"dtype": compute, "quantization_config": quantization_config(compute)}


def _load(place: ModelPlace, what: str, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except torch.OutOfMemoryError:
        raise ModelError(f"{place.name} does not fit the GPU: load it with --four-bit, or use --device cpu.") from None
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, AttributeError, ImportError, SafetensorError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(f"The {what} of {place.name} cannot be loaded ({lines[0]}): write or download the directory again.") from error


def _check_loaded(place: ModelPlace, info: dict[str, Any]) -> None:
    """Of weights that it made up, or left out, transformers only warns."""
    if info["missing_keys"]:
        first = min(info["missing_keys"])
        raise ModelError(f"{place.name} lacks {len(info['missing_keys'])} tensors ({first}): the model would answer with random weights.")
    lost = sorted(name for name in info["unexpected_keys"] if any(part in name for part in _LOST))
    if lost:
        raise ModelError(f"{place.name} has experts that its model_type {place.fields.get('model_type')!r} would leave out ({lost[0]}).")
    if info.get("mismatched_keys"):
        raise ModelError(f"{place.name} has tensors of other shapes than its config.json says ({min(info['mismatched_keys'])}).")


def _check_vocabulary(place: ModelPlace, tokenizer: Any, model: Any) -> None:
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise ModelError(f"The tokenizer of {place.name} has {len(tokenizer)} tokens, but the model {rows}: they are not of one model.")


def _stops(*tokens: int | list[int] | None) -> list[int]:
    """The end tokens of the generation config and of the tokenizer: a chat template may end turns with the latter alone."""
    flat = [one for token in tokens if token is not None for one in (token if isinstance(token, list) else [token])]
    return list(dict.fromkeys(flat))
