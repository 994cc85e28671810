"""The published sample of the PESC mix, 500 real rows, through dedup with the settings of the real recipe."""

from __future__ import annotations

import json
from collections import Counter

import pyarrow.parquet as pq
import pytest

from pesc.data.config import DedupConfig
from pesc.data.dedup import build
from pesc.recipe import load_recipe
from tests.data.builders import run_stage

FILES = {
    "slimorca": ("slimorca.jsonl", 300),
    "magicoder-evol": ("magicoder_evol_instruct.jsonl", 66),
    "magicoder-oss": ("magicoder_oss_instruct.jsonl", 34),
    "metamathqa": ("metamathqa.jsonl", 100),
}


def recipe_config(**changes: object) -> DedupConfig:
    """dedup of camelidae-8x7b over the sample's files; the sample lacks the columns `type` and `original_question`."""
    settings = load_recipe("camelidae-8x7b").dedup.model_dump(mode="json")
    for name, (file, _) in FILES.items():
        settings["datasets"][name] |= {"source": "rows", "files": [f"instructions/{file}"]}
    settings["datasets"]["metamathqa"] |= {"stratify_by": None, "group_by": None, "max_per_group": None}
    settings["benchmarks"] = {
        "gsm8k": {"source": "rows", "files": ["benchmarks/gsm8k_test.jsonl"], "fields": ["question"]},
        "math": {"source": "rows", "files": ["benchmarks/math_test.jsonl"], "fields": ["problem"]},
        "humaneval": {"source": "rows", "files": ["benchmarks/humaneval_test.jsonl"], "fields": ["prompt"]},
    }
    return DedupConfig.model_validate({**settings, **changes})


@pytest.fixture(scope="module")
def built(shared_data, tmp_path_factory):
    return run_stage(build, recipe_config(), tmp_path_factory.mktemp("real"), {"rows": shared_data / "data"})


def test_every_row_is_kept_or_in_the_ledger(built):
    out, result = built
    stats = json.loads((out / "stats.json").read_text())["datasets"]
    assert {name: stats[name]["read"] for name in FILES} == {name: rows for name, (_, rows) in FILES.items()}
    rows, ledger = pq.read_table(out / "rows.parquet"), pq.read_table(out / "removed.parquet")
    assert rows.num_rows + ledger.num_rows == result.metrics["read"] == 500
    places = Counter((item["dataset"], item["row"]) for item in ledger.to_pylist())
    assert max(places.values(), default=1) == 1


def test_almost_all_real_rows_stay(built):
    """The sample is a published, cleaned mix: what is taken from it had better have a reason (each was looked at)."""
    out, _ = built
    reasons = Counter(pq.read_table(out / "removed.parquet")["reason"].to_pylist())
    assert sum(reasons.values()) <= 40, reasons
    assert not any(reason.startswith("malformed") for reason in reasons)


def test_multi_turn_rows_survive(shared_data, tmp_path):
    chats = {"tools": {"source": "rows", "files": ["instructions_extra/glaive_toolcall_en_demo.json"], "domain": "general"}}
    out, _ = run_stage(build, recipe_config(datasets=chats, benchmarks={}), tmp_path, {"rows": shared_data / "data"})
    rows = pq.read_table(out / "rows.parquet").to_pylist()
    turns = [row for row in rows if sum(turn["role"] == "assistant" for turn in row["messages"]) > 1]
    tools = [row for row in rows if any(turn["role"] == "tool" for turn in row["messages"])]
    assert len(turns) > 200
    assert len(tools) >= 120  # of 153; the rest are refusals that the filters name
