"""Agreement of two checkpoints: a model with itself, with its experts renamed, and by chance."""

import copy

import numpy as np
import pytest
import torch

from pesc.errors import ModelError
from pesc.routing.agreement import compare_routing, match_experts, share_alike
from pesc.routing.counts import observe
from tests.models.builders import make_sparse, tokens
from tests.routing.builders import make_observation
from tests.routing.test_counts import make_rows


@pytest.fixture(scope="module")
def model():
    return make_sparse()


@pytest.fixture(scope="module")
def rows():
    return make_rows(tokens(8, 40))


def test_a_model_agrees_with_itself(model, rows):
    seen = observe(model, rows, "x")
    found = compare_routing(seen, seen, "x", "x")
    for entry in found.layers:
        assert (entry.plain.same_set, entry.plain.overlap, entry.plain.first) == (1, 1, 1)
        assert entry.matched == entry.plain
        assert entry.matching == (0, 1, 2, 3)
        assert entry.chance.same_set < 0.9
    assert found.num_tokens == 320


def test_renamed_experts_are_matched(model, rows):
    """The same function with other numbers for its experts: plain agreement is poor, matched it is whole, and the names come back."""
    orders = {0: [2, 0, 3, 1], 1: [3, 2, 1, 0]}
    renamed = copy.deepcopy(model)
    with torch.no_grad():
        for number, order in orders.items():
            mlp = renamed.model.layers[number].mlp
            for parameter in (mlp.router.weight, mlp.adapters.down, mlp.adapters.up):
                parameter.copy_(parameter[order].clone())
        ids = tokens(2, 20)
        assert torch.allclose(renamed(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-4)
    found = compare_routing(observe(model, rows, "x"), observe(renamed, rows, "y"), "x", "y")
    for entry in found.layers:
        assert entry.plain.same_set < 0.7
        assert (entry.matched.same_set, entry.matched.overlap, entry.matched.first) == (1, 1, 1)
        assert [orders[entry.layer][other] for other in entry.matching] == [0, 1, 2, 3]


def test_shares_of_a_known_table():
    first = np.array([[0, 1], [0, 1], [2, 3], [4, 5]])
    second = np.array([[0, 1], [1, 0], [2, 4], [0, 1]])
    found = share_alike(first, second)
    assert (found.same_set, found.first) == (0.5, 0.5)
    assert found.overlap == pytest.approx((1 + 1 + 1 / 3 + 0) / 4, rel=1e-5)
    assert match_experts(first, first[:, ::-1], 6).tolist() == [0, 1, 2, 3, 4, 5]


def test_routers_that_have_nothing_in_common_agree_as_chance_says():
    """Both send 90 % of the tokens to one expert: they agree often, and chance says as much."""
    draw = np.random.default_rng(2)
    one, two = (np.where(draw.random(4000) < 0.9, 0, draw.integers(0, 6, 4000))[:, None] for _ in range(2))
    row_of = np.zeros(4000, int)
    seen = [make_observation([chosen], row_of, [0], domains=("all",)) for chosen in (one, two)]
    entry = compare_routing(*seen, "x", "y").layers[0]
    assert entry.plain.first > 0.8
    assert entry.plain.first == pytest.approx(entry.chance.first, abs=0.02)
    assert entry.matched.first == pytest.approx(entry.matched_chance.first, abs=0.02)


def test_other_shapes_are_refused():
    one = make_observation([[[0, 1]]], [0], [0], domains=("all",))
    for other, words in (
        (make_observation([[[0]]], [0], [0], domains=("all",)), "y chooses 1 of 6 experts in 1 layers"),
        (make_observation([[[0, 1]]], [0], [0], domains=("all",), num_experts=8), "y chooses 2 of 8 experts in 1 layers"),
        (make_observation([[[0, 1]]] * 2, [0], [0], domains=("all",)), "y chooses 2 of 6 experts in 2 layers"),
    ):
        with pytest.raises(ModelError, match=f"x chooses 2 of 6 experts in 1 layers and {words}. Give two checkpoints of one shape"):
            compare_routing(one, other, "x", "y")
