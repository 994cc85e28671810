"""The demo's mixture from the real packages: what the recipe's comments promise."""

from __future__ import annotations

import json
from collections import Counter

import pyarrow.parquet as pq
import pytest

from pesc.data import dedup, download, mixture
from pesc.errors import SourceError
from pesc.recipe import load_recipe
from tests.data.builders import run_stage


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """(dedup object, mix object) of the demo; skips where pip cannot reach an index."""
    root = tmp_path_factory.mktemp("demo")
    recipe = load_recipe("demo")
    names = {item.source for item in (*recipe.dedup.datasets.values(), *recipe.dedup.benchmarks.values())}
    try:
        sources = {name: run_stage(download.build, recipe.sources[name], root / name)[0] for name in sorted(names)}
    except SourceError as error:
        pytest.skip(str(error))
    rows, _ = run_stage(dedup.build, recipe.dedup, root / "dedup", sources)
    return rows, run_stage(mixture.build, recipe.mix, root / "mix", {"rows": rows})[0]


@pytest.mark.slow
def test_every_row_of_the_openbookqa_benchmark_is_removed_as_contaminated(demo):
    stats = json.loads((demo[0] / "stats.json").read_text())
    counts = stats["datasets"]["openbookqa"]
    assert counts["kept"] == 0
    assert counts["contaminated"] == counts["read"] == 500
    cell = stats["contamination"]["openbookqa"]["datasets"]["openbookqa"]
    assert cell["item_share"] == 1.0
    assert stats["datasets"]["commonsenseqa"]["contaminated"] == stats["datasets"]["asdiv"]["contaminated"] == 0


@pytest.mark.slow
def test_rows_whose_answer_is_no_option_are_quarantined(demo):
    """Three validation rows of CommonsenseQA, as packaged, have a last option with a stray question mark."""
    bad = [item for item in pq.read_table(demo[0] / "removed.parquet").to_pylist() if item["reason"].startswith("malformed")]
    assert [item["row"] for item in bad] == [117, 364, 634]


@pytest.mark.slow
def test_the_mixture_is_three_one_one(demo):
    table = pq.read_table(demo[1] / "mixture.parquet")
    assert Counter(table.column("domain").to_pylist()) == {"general": 360, "code": 120, "math": 120}
    assert Counter(table.column("dataset").to_pylist())["openbookqa"] == 0
