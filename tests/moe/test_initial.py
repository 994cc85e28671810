"""Start values are the same bits however they are drawn."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pesc.moe.initial import draw_initial, draw_initial_chunks


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["layers.0.mlp.adapters.down", "layers.7.mlp.router.weight", "layers.1.mlp.adapters.up"]),
    st.lists(st.integers(1, 9), min_size=2, max_size=3),
    st.integers(0, 2**31),
    st.integers(1, 50),
)
def test_pieces_are_the_whole(name, shape, seed, elements):
    pieces = [piece.clone() for piece in draw_initial_chunks(name, tuple(shape), seed, elements)]
    assert torch.equal(torch.cat(pieces).view(shape), draw_initial(name, tuple(shape), seed))


def test_pieces_of_the_usual_size_are_the_whole():
    shape = (3, 100, 131)
    pieces = torch.cat([piece.clone() for piece in draw_initial_chunks("layers.0.mlp.adapters.down", shape, 42)])
    assert torch.equal(pieces.view(shape), draw_initial("layers.0.mlp.adapters.down", shape, 42))


def test_another_name_or_seed_is_another_draw():
    draws = {name: draw_initial(name, (4, 8), seed) for name, seed in (("a", 1), ("b", 1), ("c", 2))}
    assert len({tuple(draw.flatten().tolist()) for draw in draws.values()}) == 3
