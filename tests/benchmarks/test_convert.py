"""Conversion costs what a plain write of the bank costs, and its memory does not grow with the model."""

import pytest

from pesc.bench.convert import MAX_MEMORY_SPREAD, MAX_RATIO, Shape, make_dense, measure, plain_write, render
from pesc.errors import PescError
from pesc.models.tensor_files import TensorDirectory

pytestmark = pytest.mark.benchmark


def shape(name, hidden, layers, adapter_dim):
    fields = {"intermediate_size": 2 * hidden, "num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 32000}
    return Shape(name, "llama", {"hidden_size": hidden, "num_hidden_layers": layers, **fields}, adapter_dim)


SHAPES = (shape("70 MB", 512, 8, 512), shape("270 MB", 1024, 16, 512), shape("540 MB", 2048, 16, 512))
"""Sizes of the bank.  Smaller ones measure what every conversion costs at first, not the conversion."""


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    found = measure(SHAPES, tmp_path_factory.mktemp("convert"), repeats=3)
    print(render(found))
    return found


def test_memory_does_not_grow_with_the_model(rows):
    assert rows[-1].bank_bytes > 7 * rows[0].bank_bytes
    assert max(row.peak_bytes for row in rows) <= MAX_MEMORY_SPREAD * min(row.peak_bytes for row in rows)


def test_it_takes_the_time_of_a_plain_write(rows):
    """The largest of the shapes: the smaller ones are seconds in which a busy machine shows more than the conversion."""
    assert rows[-1].ratio <= MAX_RATIO, render(rows)


def test_a_dense_model_of_any_size_costs_no_room(tmp_path):
    make_dense(tmp_path / "dense", shape("any", 2048, 16, 8))
    specs = TensorDirectory(tmp_path / "dense").specs
    assert sum(spec.num_bytes for spec in specs.values()) > 1_000_000_000
    assert sum(path.stat().st_blocks * 512 for path in (tmp_path / "dense").iterdir()) < 1_000_000


def test_the_control_leaves_nothing_and_a_wrong_directory_is_a_sentence(tmp_path):
    assert plain_write(tmp_path / "control", 3_000_001) > 0
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(PescError, match="is not a directory"):
        measure(SHAPES, tmp_path / "lost", 1)
