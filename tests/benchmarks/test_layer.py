"""The bank runs near the speed of the FFN's own GEMMs, and faster than the reference loop at every width."""

import pytest
import torch

from pesc.bench.layer import LayerShape, measure_layer, render

pytestmark = pytest.mark.benchmark
WIDTHS = (16, 64, 512)


@pytest.fixture(scope="module")
def times():
    found = measure_layer(LayerShape(), WIDTHS, torch.float32, "cpu", rounds=5)
    print(render(found))
    return found


@pytest.mark.parametrize(("width", "bar"), [(64, 0.5), (512, 0.7)])
def test_efficiency_against_the_frozen_ffn(times, width, bar):
    assert times.row(width, "auto").efficiency >= bar, render(times)


@pytest.mark.parametrize("width", WIDTHS)
def test_faster_than_the_reference_loop(times, width):
    assert times.row(width, "auto").seconds < times.row(width, "reference").seconds, render(times)


def test_the_flops_are_those_of_the_definition():
    shape = LayerShape(tokens=10, hidden=3, ffn=5, experts=4, top_k=2)
    assert shape.ffn_flops == 3 * (2 * 10 * 3 * 5) * 2  # three projections, forward and the gradient of the input
    assert shape.bank_flops(7) == 2 * (2 * 10 * 2 * 3 * 7) * 3  # two projections of two adapters, and the gradient of the bank
