"""Greedy decoding at batch 1: the sparse model against the dense one it was made of, token by token in turn.

    pesc bench decode MODEL                   a dense model's directory
    pesc bench decode smollm2-135m            random weights of that shape

Both models hold the same dense weights and `generate` greedily with a KV cache; the bank is filled, so that every adapter really adds
something.  They take turns, a short stretch each; the median time of a token counts, which other work on the machine hardly moves.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

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
    model: str, pesc: PescConfig, dtype: torch.dtype, device: str = "cpu", prompt_tokens: int = 128, new_tokens: int = 32, rounds: int = 5
) -> DecodeTimes:
    """Decode with both models in turn.  Raises ModelError for a model that is neither a shape nor a dense directory."""
    pair = dict(zip(("dense", "sparse"), _make_pair(model, pesc, dtype, device), strict=True))
    prompt = torch.randint(0, pair["dense"].config.vocab_size, (1, prompt_tokens), generator=torch.Generator().manual_seed(0)).to(device)
    seconds: dict[str, list[float]] = {name: [] for name in pair}
    for turn in range(rounds + 1):
        for name, made in pair.items():
            stretch = _token_seconds(made, prompt, new_tokens, device)
            if turn:  # the first warms up
                seconds[name].extend(stretch)
    name = torch.cuda.get_device_name() if device.startswith("cuda") else device
    return DecodeTimes(
        model, pesc.to_dict(), str(dtype).removeprefix("torch."), name, torch.get_num_threads(), prompt_tokens, new_tokens,
        1 / median(seconds["dense"]), 1 / median(seconds["sparse"]), _dispatch_of_one_token(pesc),
    )  # fmt: skip


def _token_seconds(model: Any, prompt: torch.Tensor, new_tokens: int, device: str) -> list[float]:
    """The time of each token after the first, whose time is the prompt's."""
    clock = _Clock(device)
    settings = GenerationConfig(do_sample=False, max_new_tokens=new_tokens, min_new_tokens=new_tokens, pad_token_id=0)
    with torch.inference_mode():
        model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=settings, streamer=clock)
    return [after - before for before, after in pairwise(clock.times)]


class _Clock(BaseStreamer):
    """Notes when each new token comes."""

    def __init__(self, device: str) -> None:
        self.times: list[float] = []
        self._on_cuda = device.startswith("cuda")
        self._is_prompt = True

    def put(self, value: torch.Tensor) -> None:
        """A new token (the prompt comes first)."""
        if self._is_prompt:
            self._is_prompt = False
            return
        if self._on_cuda:
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing."""


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
            built: Any = classes.dense_causal_lm(classes.dense_config.from_dict(fields))
            dense = built.to(dtype).eval()
    else:
        fields = read_config(Path(model))
        if is_sparse(fields):
            raise ModelError(f"{model} is a sparse model: give its dense base; the adapters are added here.")
        classes = architecture_of(fields)
        loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, trust_remote_code=False)
        dense = loaded.to(device).eval()
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


def render(times: DecodeTimes) -> str:
    """One line a model."""
    pesc = times.pesc
    return "\n".join(
        [
            f"{times.model}, {times.dtype} on {times.device} with {times.threads} threads; greedy, batch 1, {times.new_tokens} tokens after "
            f"{times.prompt_tokens}",
            f"dense   {times.dense_tokens_per_second:>8.2f} tokens/s",
            f"sparse  {times.sparse_tokens_per_second:>8.2f} tokens/s   E={pesc['num_experts']} K={pesc['top_k']} R={pesc['adapter_dim']}, "
            f"dispatch {times.dispatch}",
            f"ratio   {times.ratio:>8.3f}",
        ]
    )
