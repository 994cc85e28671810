"""Two checkpoints on the same tokens: how often they choose the same experts, as they are and after the best matching of the experts.

Two runs from other seeds number their experts at random: the matching (Hungarian algorithm on the tokens that both chose) undoes that.  What equal
loads alone give is measured by the same two numbers with the second model's tokens shuffled.

T tokens, E experts, K choices of a token.
"""

from __future__ import annotations

import numpy as np

from pesc.errors import ModelError
from pesc.routing.counts import Observation
from pesc.routing.results import Agreement, LayerAgreement, Shares


def compare_routing(first: Observation, second: Observation, model: str, other: str, seed: int = 42) -> Agreement:
    """Agreement of every layer.  Raises ModelError when layers, experts or K differ."""
    _check_shapes(first, second, model, other)
    shuffle_T = np.random.default_rng(seed).permutation(first.num_tokens)
    layers = []
    for one, two in zip(first.layers, second.layers, strict=True):
        first_TK, second_TK = one.index_TK.astype(np.int64), two.index_TK.astype(np.int64)
        matching_E = match_experts(first_TK, second_TK, one.num_experts)
        shuffled_TK = second_TK[shuffle_T]
        chance_E = match_experts(first_TK, shuffled_TK, one.num_experts)
        layers.append(
            LayerAgreement(
                layer=one.layer,
                plain=share_alike(first_TK, second_TK),
                chance=share_alike(first_TK, shuffled_TK),
                matched=share_alike(matching_E[first_TK], second_TK),
                matched_chance=share_alike(chance_E[first_TK], shuffled_TK),
                matching=tuple(matching_E.tolist()),
            )
        )
    return Agreement(model=model, other=other, num_tokens=first.num_tokens, layers=tuple(layers))


def match_experts(first_TK: np.ndarray, second_TK: np.ndarray, num_experts: int) -> np.ndarray:
    """Expert of the first -> expert of the second, [E], one to one, so that the most choices meet."""
    from scipy.optimize import linear_sum_assignment

    chosen = [np.zeros((len(first_TK), num_experts)) for _ in range(2)]
    for table_TE, index_TK in zip(chosen, (first_TK, second_TK), strict=True):
        np.put_along_axis(table_TE, index_TK, 1.0, axis=1)
    _, matching_E = linear_sum_assignment(chosen[0].T @ chosen[1], maximize=True)
    return matching_E


def share_alike(first_TK: np.ndarray, second_TK: np.ndarray) -> Shares:
    """Over the tokens: equal sets, Jaccard, equal first choices."""
    common_T = (first_TK[:, :, None] == second_TK[:, None, :]).any(axis=2).sum(axis=1)
    top_k = first_TK.shape[1]
    values = ((common_T == top_k).mean(), (common_T / (2 * top_k - common_T)).mean(), (first_TK[:, 0] == second_TK[:, 0]).mean())
    same_set, overlap, first = (float(f"{value:.6g}") for value in values)
    return Shares(same_set=same_set, overlap=overlap, first=first)


def _check_shapes(first: Observation, second: Observation, model: str, other: str) -> None:
    shapes = [(seen.top_k, [(layer.layer, layer.num_experts) for layer in seen.layers]) for seen in (first, second)]
    if shapes[0] == shapes[1]:
        return
    described = [
        f"{name} chooses {k} of {_counts(layers)} experts in {len(layers)} layers"
        for name, (k, layers) in zip((model, other), shapes, strict=True)
    ]
    raise ModelError(f"The routing cannot be compared: {' and '.join(described)}. Give two checkpoints of one shape.")


def _counts(layers: list[tuple[int, int]]) -> str:
    low, high = min(count for _, count in layers), max(count for _, count in layers)
    return str(low) if low == high else f"{low} to {high}"
