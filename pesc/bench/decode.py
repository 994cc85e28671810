"""Greedy decoding at batch 1: the sparse model against the dense one it was made of, token by token in turn.

    pesc bench decode MODEL                   a dense or sparse directory
    pesc bench decode smollm2-135m            random weights of that shape

Both models hold the same dense weights and decode the same tokens with a KV cache; the bank is filled, so that every adapter really adds something.
Each step of the one is followed by the same step of the other, so that a slow moment of the machine meets both; the median over the steps counts.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pesc.errors import ModelError
from pesc.moe.config import PescConfig

SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": dict(
        model_type="llama", vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, rope_theta=100000.0, tie_word_embeddings=True, max_position_embeddings=8192,
    ),
    "llama-2-7b": dict(
        model_type="llama", vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=32, max_position_embeddings=4096,
    ),
    "yi-34b": dict(
        model_type="llama", vocab_size=64000, hidden_size=7168, intermediate_size=20480, num_hidden_layers=60, num_attention_heads=56,
        num_key_value_heads=8, max_position_embeddings=4096,
    ),
}  # fmt: skip
"""Shapes that can be measured without weights."""


@dataclass(frozen=True)
class DecodeTimes:
    """Tokens a second of both, and their ratio (1: the adapters cost nothing)."""

    model: str
    pesc: dict[str, Any]
    dtype: str
    device: str
    threads: int
    prompt_tokens: int
    new_tokens: int
    dense_tokens_per_second: float
    sparse_tokens_per_second: float
    dispatch: str

    @property
    def ratio(self) -> float:
        """Sparse over dense."""
        return self.sparse_tokens_per_second / self.dense_tokens_per_second


def measure_decode(
    model: str, pesc: PescConfig, dtype: torch.dtype, device: str = "cpu", prompt_tokens: int = 32, new_tokens: int = 64
) -> DecodeTimes:
    """Decode with both models in turn.  Raises ModelError for a model that is neither a shape nor a dense directory."""
    dense, sparse = _make_pair(model, pesc, dtype, device)
    prompt = torch.randint(0, dense.config.vocab_size, (1, prompt_tokens), generator=torch.Generator().manual_seed(0)).to(device)
    seconds: dict[str, list[float]] = {"dense": [], "sparse": []}
    with torch.inference_mode():
        runs = {"dense": _Decoder(dense, prompt), "sparse": _Decoder(sparse, prompt)}
        token = runs["dense"].first
        for _ in range(new_tokens):
            following = {name: _timed_step(decoder, token, seconds[name], device) for name, decoder in runs.items()}
            token = following["dense"]
    rates = {name: 1 / statistics.median(values[4:]) for name, values in seconds.items()}
    name = torch.cuda.get_device_name() if device.startswith("cuda") else device
    return DecodeTimes(
        model, pesc.to_dict(), str(dtype).removeprefix("torch."), name, torch.get_num_threads(), prompt_tokens, new_tokens, rates["dense"],
        rates["sparse"], _dispatch_of_one_token(pesc),
    )  # fmt: skip


class _Decoder:
    """A model with the KV cache of a prompt."""

    def __init__(self, model: Any, prompt: torch.Tensor) -> None:
        self._model = model
        output = model(prompt, use_cache=True, logits_to_keep=1)
        self._cache = output.past_key_values
        self.first = output.logits[:, -1].argmax(-1, keepdim=True)

    def step(self, token: torch.Tensor) -> torch.Tensor:
        output = self._model(token, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        return output.logits[:, -1].argmax(-1, keepdim=True)


def _timed_step(decoder: _Decoder, token: torch.Tensor, seconds: list[float], device: str) -> torch.Tensor:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    started = time.perf_counter()
    following = decoder.step(token)
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    seconds.append(time.perf_counter() - started)
    return following


def _make_pair(model: str, pesc: PescConfig, dtype: torch.dtype, device: str) -> tuple[Any, Any]:
    """The dense model, and the sparse one that shares its weights."""
    from transformers import AutoModelForCausalLM

    from pesc.models import register
    from pesc.models.factory import architecture_of, is_sparse, sparse_config
    from pesc.models.upcycle import read_config

    register()
    torch.manual_seed(0)
    if model in SHAPES:
        fields = SHAPES[model]
        classes = architecture_of(fields)
        with torch.device(device):
            dense = classes.dense_causal_lm(classes.dense_config.from_dict(fields)).to(dtype).eval()
    else:
        fields = read_config(Path(model))
        if is_sparse(fields):
            raise ModelError(f"{model} is a sparse model: give its dense base; the adapters are added here.")
        classes = architecture_of(fields)
        dense = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).to(device).eval()
    with torch.device("meta"):
        sparse = classes.causal_lm(sparse_config(dense.config, pesc))
    sparse.load_state_dict(dense.state_dict(), strict=False, assign=True)
    for name, buffer in dense.named_buffers():  # the rotary embedding's frequencies, which no state dict holds
        holder, _, attribute = name.rpartition(".")
        setattr(sparse.get_submodule(holder), attribute, buffer)
    _fill(sparse, dtype, device)
    sparse.tie_weights()
    return dense, sparse.eval()


def _fill(sparse: Any, dtype: torch.dtype, device: str) -> None:
    """Give routers and banks random values; nothing else lacks them."""
    generator = torch.Generator().manual_seed(1)
    for module in sparse.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                values = torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5
                setattr(module, name, torch.nn.Parameter(values.to(device, dtype), requires_grad=False))


def _dispatch_of_one_token(pesc: PescConfig) -> str:
    if pesc.dispatch != "auto":
        return pesc.dispatch
    from pesc.moe.tuning import export_choices

    return next((c["path"] for c in reversed(export_choices()) if c["tokens"] == 1 and not c["gradients"]), "auto")
