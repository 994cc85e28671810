"""Quotas, strata, shortfalls, and what the draw depends on."""

from __future__ import annotations

import json
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pesc.data.config import MixConfig
from pesc.data.mixture import allocate, build, draw_mixture
from pesc.errors import DataError
from tests.data.builders import run_stage, tree_bytes

WEIGHTS = {"general": 3, "code": 1, "math": 1}


def pool(**sizes: int):
    """domain/dataset/stratum sizes as keyword `domain__dataset__stratum`."""
    rows = {}
    for key, count in sizes.items():
        domain, dataset, stratum = (*key.split("__"), "", "")[:3]
        strata = rows.setdefault(domain, {}).setdefault(dataset or domain, {})
        strata[stratum] = [f"{key}-{number}" for number in range(count)]
    return rows


def drawn(rows, **settings):
    ids, stats = draw_mixture(rows, MixConfig(**settings))
    return Counter(row_id.partition("-")[0] for row_id in ids), ids, stats


def test_the_papers_mixture_is_312_104_104_thousand():
    assert allocate(520_000, WEIGHTS) == {"general": 312_000, "code": 104_000, "math": 104_000}


@given(
    st.integers(0, 500),
    st.dictionaries(st.sampled_from("abcdef"), st.floats(0.01, 50), min_size=1),
    st.data(),
)
def test_places_are_filled_exactly_and_never_over(total, weights, data):
    available = {name: data.draw(st.integers(0, 200)) for name in weights}
    given_places = allocate(total, weights, available)
    assert set(given_places) == set(weights)
    assert sum(given_places.values()) == min(total, sum(available.values()))
    assert all(0 <= given_places[name] <= available[name] for name in weights)


@given(st.integers(0, 2000), st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 50), min_size=1))
def test_without_limits_each_is_within_one_of_its_ideal(total, weights):
    places = allocate(total, weights)
    assert sum(places.values()) == total
    assert all(abs(places[name] - total * weight / sum(weights.values())) < 1 for name, weight in weights.items())


def test_quotas_are_drawn_without_copies():
    counts, ids, stats = drawn(pool(general=500, code=500, math=500), total=100, weights=WEIGHTS)
    assert counts == {"general": 60, "code": 20, "math": 20}
    assert len(set(ids)) == 100
    assert stats["total"] == {"wanted": 100, "drawn": 100, "shortfall": 0}


@pytest.mark.parametrize(
    ("policy", "counts", "shortfall"),
    [("redistribute", {"general": 69, "code": 8, "math": 23}, 0), ("keep", {"general": 60, "code": 8, "math": 20}, 12)],
)
def test_a_shortfall_is_redistributed_or_kept_and_always_reported(policy, counts, shortfall):
    got, _, stats = drawn(pool(general=500, code=8, math=500), total=100, weights=WEIGHTS, shortfall=policy)
    assert got == counts
    assert stats["domains"]["code"] == {
        "wanted": 20,
        "available": 8,
        "drawn": 8,
        "shortfall": 12,
        "datasets": {"code": {"wanted": 8, "available": 8, "drawn": 8, "shortfall": 0}},
    }
    assert stats["total"]["shortfall"] == shortfall


def test_a_shortfall_can_be_an_error():
    with pytest.raises(DataError, match=r"'code' has 8 rows, 12 fewer than its quota of 20.*mix\.shortfall"):
        drawn(pool(general=500, code=8, math=500), total=100, weights=WEIGHTS, shortfall="fail")


def test_a_domain_without_rows_is_an_error():
    with pytest.raises(DataError, match=r"'math' of mix\.weights has no rows"):
        drawn(pool(general=500, code=8), total=10, weights=WEIGHTS)


def test_data_sets_share_a_domain_by_size_or_by_weight():
    rows = pool(code__evol=300, code__oss=100)
    assert drawn(rows, total=40, weights={"code": 1})[0] == {"code__evol": 30, "code__oss": 10}
    weights = {"evol": 1, "oss": 1}
    assert drawn(rows, total=40, weights={"code": 1}, dataset_weights=weights)[0] == {"code__evol": 20, "code__oss": 20}
    short, _, stats = drawn(rows, total=300, weights={"code": 1}, dataset_weights=weights)
    assert short == {"code__evol": 200, "code__oss": 100}
    assert stats["domains"]["code"]["datasets"]["oss"]["shortfall"] == 50
    with pytest.raises(DataError, match="has evol but not oss"):
        drawn(rows, total=40, weights={"code": 1}, dataset_weights={"evol": 1})


def test_strata_keep_their_proportions():
    counts, _, stats = drawn(pool(math__meta__gsm=600, math__meta__sv=300, math__meta__fobar=100), total=50, weights={"math": 1})
    assert counts == {"math__meta__gsm": 30, "math__meta__sv": 15, "math__meta__fobar": 5}
    assert stats["domains"]["math"]["datasets"]["meta"]["strata"]["sv"] == {"available": 300, "drawn": 15}


def test_a_larger_mixture_holds_the_smaller_one():
    rows = pool(general=400, code=200)
    small = set(drawn(rows, total=60, weights={"general": 2, "code": 1})[1])
    assert small < set(drawn(rows, total=120, weights={"general": 2, "code": 1})[1])


def test_the_seed_decides_the_rows():
    rows = pool(general=400)
    first, again, other = (set(drawn(rows, total=50, weights={"general": 1}, seed=seed)[1]) for seed in (1, 1, 2))
    assert first == again != other


def save_rows(path, order):
    path.mkdir()
    rows = [
        {
            "id": f"id{n}",
            "dataset": "d",
            "domain": "code" if n % 4 == 0 else "general",
            "stratum": "",
            "messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": f"a{n}"}],
        }
        for n in order
    ]
    pq.write_table(pa.Table.from_pylist(rows), path / "rows.parquet")
    return path


def test_the_object_does_not_depend_on_the_order_of_the_rows(tmp_path):
    config = MixConfig(total=20, weights={"general": 3, "code": 1})
    one, result = run_stage(build, config, tmp_path / "a", {"rows": save_rows(tmp_path / "in", range(80))})
    two, _ = run_stage(build, config, tmp_path / "b", {"rows": save_rows(tmp_path / "in2", reversed(range(80)))})
    assert tree_bytes(one) == tree_bytes(two)
    table = pq.read_table(one / "mixture.parquet")
    assert table.column_names == ["id", "dataset", "domain", "stratum", "messages"]
    assert Counter(table.column("domain").to_pylist()) == {"general": 15, "code": 5}
    ids = table.column("id").to_pylist()
    assert ids != sorted(ids), "the mixture is shuffled"
    assert result.metrics == {"drawn": 20, "wanted": 20, "shortfall": 0}
    assert json.loads((one / "stats.json").read_text())["total"]["drawn"] == 20


def test_rows_with_one_id_twice_are_refused(tmp_path):
    with pytest.raises(DataError, match="one id twice"):
        run_stage(build, MixConfig(total=2, weights={"general": 1}), tmp_path / "a", {"rows": save_rows(tmp_path / "in", [1, 1])})
