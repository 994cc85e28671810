"""Merging costs no more than twice a plain copy, and its memory does not grow with the model."""

import json

import pytest

from pesc.bench.convert import QUICK_SHAPES, SHAPES
from pesc.bench.merge import MAX_MEMORY_SPREAD, MIN_SHARE, make_trained, measure, merge_once, plain_copy, render
from pesc.errors import PescError
from pesc.models.tensor_files import TensorDirectory


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """The shapes of Qwen2.5-0.5B, Gemma-2-2B and Llama-2-7B: some 30 GB of disk."""
    found = measure(SHAPES, tmp_path_factory.mktemp("merge"), repeats=1)
    print(render(found))
    return found


@pytest.mark.benchmark
@pytest.mark.timeout(3600)
def test_memory_does_not_grow_with_the_model(rows):
    assert rows[-1].merged_bytes > 7 * rows[0].merged_bytes
    assert max(row.peak_bytes for row in rows) <= MAX_MEMORY_SPREAD * min(row.peak_bytes for row in rows), render(rows)


@pytest.mark.benchmark
@pytest.mark.timeout(3600)
def test_it_is_at_least_half_as_fast_as_a_copy(rows):
    assert min(row.share for row in rows) >= MIN_SHARE, render(rows)


def test_what_is_measured_is_a_merge(tmp_path):
    """The smallest shape: every tensor is written, LoRA and bank are in it."""
    model, trained = make_trained(tmp_path / "tiny", QUICK_SHAPES[0])
    (tmp_path / "out").mkdir()
    found = merge_once(model, trained, tmp_path / "out")
    assert found["merge_seconds"] > 0
    assert found["peak_bytes"] > 0
    assert TensorDirectory(tmp_path / "out").specs.keys() == TensorDirectory(model).specs.keys()
    ledger = json.loads((tmp_path / "out/ledger.json").read_text())["tensors"]
    assert sum(entry["action"] == "merged" for entry in ledger) == 4 * 7
    assert all(entry["change"] > 0 for entry in ledger if entry["action"] in ("merged", "trained"))


def test_the_control_leaves_nothing_and_a_wrong_directory_is_a_sentence(tmp_path):
    (tmp_path / "file").write_bytes(b"x" * 100_001)
    assert plain_copy(tmp_path / "file", tmp_path / "control") > 0
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    with pytest.raises(PescError, match="is not a directory"):
        measure(SHAPES, tmp_path / "lost", 1)
