"""One pass over some rows: which experts each token chose, layer by layer.

T counted tokens, R rows, E experts of a layer, K choices of a token, D domains.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from pesc.errors import ModelError
from pesc.models import mixtral
from pesc.moe.balance import RouterRecorder
from pesc.moe.router import select_experts
from pesc.routing.rows import Row


@dataclass(frozen=True)
class LayerChoices:
    """One layer's router on all counted tokens."""

    layer: int
    num_experts: int
    index_TK: np.ndarray
    """uint16, the router's first choice first."""
    weight_E: np.ndarray
    """float64, Σ over the tokens of the gate weights."""
    entropy: float
    """Σ over the tokens of the entropy of softmax over all experts, in nats."""


@dataclass(frozen=True)
class Observation:
    """What the routers of one model did.  2·T·K·L bytes for L layers."""

    layers: tuple[LayerChoices, ...]
    row_of_T: np.ndarray
    """int64, the token's row."""
    domain_of_R: np.ndarray
    """int64, the row's domain as a number."""
    domains: tuple[str, ...]

    @property
    def top_k(self) -> int:
        """K."""
        return self.layers[0].index_TK.shape[1]

    @property
    def num_tokens(self) -> int:
        """T."""
        return len(self.row_of_T)

    def choices_KRE(self, layer: LayerChoices) -> np.ndarray:
        """Tokens of each row whose k-th choice the expert was, int64."""
        rows, experts = len(self.domain_of_R), layer.num_experts
        flat = [np.bincount(self.row_of_T * experts + index_T, minlength=rows * experts) for index_T in layer.index_TK.T.astype(np.int64)]
        return np.stack(flat).reshape(-1, rows, experts)

    @cached_property
    def one_hot_DR(self) -> np.ndarray:
        """float64, 1 where the row is of the domain."""
        return (np.arange(len(self.domains))[:, None] == self.domain_of_R[None, :]).astype(np.float64)


def count_pairs(layer: LayerChoices) -> np.ndarray:
    """Tokens that chose both experts, [E, E] int64, the diagonal 0."""
    experts = layer.num_experts
    chosen_TE = np.zeros((len(layer.index_TK), experts), dtype=np.float64)
    np.put_along_axis(chosen_TE, layer.index_TK.astype(np.int64), 1.0, axis=1)
    pairs_EE = (chosen_TE.T @ chosen_TE).round().astype(np.int64)
    np.fill_diagonal(pairs_EE, 0)
    return pairs_EE


def record_routers(model: torch.nn.Module, name: str) -> RouterRecorder:
    """The recorder of a sparse model's routers, a Mixtral's too.  Raises ModelError for a dense model."""
    foreign = mixtral.find_routers(model)
    try:
        return RouterRecorder(model, foreign or None)
    except ValueError:
        raise ModelError(
            f"{name} is dense: it has no router, so there is no routing to look at. Give a sparse model, such as 'demo:merge[pesc]'."
        ) from None


def observe(model: torch.nn.Module, rows: Sequence[Row], name: str, progress: Callable[..., None] = lambda *_, **__: None) -> Observation:
    """Run the rows, one by one, and keep each router's choices for the tokens that count.

    Raises ModelError: dense, token ids beyond the embedding, logits that are not finite, no token that counts.
    """
    recorder = record_routers(model, name)
    _check_ids(model, rows, name)
    counted = [row for row in rows if row.counts_S.any()]
    if not counted:
        raise ModelError(f"None of the {len(rows)} rows has a token that counts: there is no routing of {name} to look at.")
    parts: dict[str, list[tuple[np.ndarray, np.ndarray, float]]] = {key: [] for key in recorder.routers}
    for done, row in enumerate(counted, start=1):
        for key, logits_TE in _router_logits(model, recorder, row).items():
            if not bool(torch.isfinite(logits_TE).all()):
                raise ModelError(f"The logits of {key} of {name} are not finite on row {done}: load it in float32, or check its weights.")
            parts[key].append(_choose(recorder.routers[key], logits_TE))
        progress(done, len(counted), unit="rows")
    layers = [_join(key, recorder.routers[key].num_experts, found) for key, found in parts.items()]
    domains = sorted({row.domain for row in counted})
    return Observation(
        layers=tuple(sorted(layers, key=lambda item: item.layer)),
        row_of_T=np.repeat(np.arange(len(counted)), [int(row.counts_S.sum()) for row in counted]),
        domain_of_R=np.array([domains.index(row.domain) for row in counted]),
        domains=tuple(domains),
    )


def _check_ids(model: Any, rows: Sequence[Row], name: str) -> None:
    known, last = model.get_input_embeddings().num_embeddings, max((int(row.ids_S.max()) for row in rows), default=-1)
    if last >= known:
        raise ModelError(f"The rows have the token {last}, but {name} knows {known} tokens: they were made with another model's tokenizer.")


@torch.inference_mode()
def _router_logits(model: Any, recorder: RouterRecorder, row: Row) -> dict[str, torch.Tensor]:
    """Router's name -> logits [T, E] of the counted tokens, in the router's dtype.  The head is not run."""
    device = model.get_input_embeddings().weight.device
    ids_BS, mask_BS = (torch.from_numpy(np.ascontiguousarray(array))[None].to(device) for array in (row.ids_S, row.counts_S))
    with recorder:
        model.base_model(input_ids=ids_BS, use_cache=False)
    return recorder.counted(mask_BS)


def _choose(router: Any, logits_TE: torch.Tensor) -> tuple[np.ndarray, np.ndarray, float]:
    bias = getattr(router, "selection_bias", None)
    index_TK, weight_TK = select_experts(logits_TE, router.top_k, bias)
    weight_E = torch.zeros(logits_TE.shape[-1], dtype=torch.float64)
    weight_E.index_add_(0, index_TK.flatten().cpu(), weight_TK.flatten().double().cpu())
    entropy = torch.special.entr(logits_TE.double().softmax(-1)).sum().item()
    return index_TK.cpu().numpy().astype(np.uint16), weight_E.numpy(), entropy


def _join(key: str, num_experts: int, parts: Sequence[tuple[np.ndarray, np.ndarray, float]]) -> LayerChoices:
    found = re.search(r"layers\.(\d+)\.", key)
    assert found, "routers live in numbered layers"
    index_TK = np.concatenate([index for index, _, _ in parts])
    return LayerChoices(
        int(found[1]), num_experts, index_TK, np.sum([weight for _, weight, _ in parts], axis=0), sum(e for _, _, e in parts)
    )
