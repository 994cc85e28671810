"""Quotas, strata, shortfalls, held-out rows, and what the draw depends on."""

from __future__ import annotations

import hashlib
import json
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pesc.data.allocation import allocate, temperature_weights
from pesc.data.config import MixConfig
from pesc.data.mixture import RARE, build, draw_mixture
from pesc.errors import DataError
from tests.data.builders import run_stage, tree_bytes

WEIGHTS = {"general": 3, "code": 1, "math": 1}


def pool(tokens=lambda _number: 1, **sizes: int):
    """A table of rows from domain/dataset/stratum sizes as keyword `domain__dataset__stratum`; ids are KEYWORD-NUMBER."""
    rows = []
    for key, count in sizes.items():
        domain, dataset, stratum = (*key.split("__"), "", "")[:3]
        labels = {"domain": domain, "dataset": dataset or domain, "stratum": stratum}
        rows += [{"id": f"{key}-{number}", **labels, "approximate_tokens": tokens(number)} for number in range(count)]
    return pa.Table.from_pylist(rows)


def drawn(table, held_out=0, **settings):
    """(Counter of keywords, ids in order, statistics)."""
    draw = draw_mixture(table, MixConfig(held_out=held_out, **settings))
    ids = table.column("id").take(pa.array(draw.mixture)).to_pylist()
    return Counter(row_id.partition("-")[0] for row_id in ids), ids, draw.stats


def held_out_ids(table, **settings):
    draw = draw_mixture(table, MixConfig(**settings))
    return table.column("id").take(pa.array(draw.held_out)).to_pylist()


def test_the_papers_mixture_is_312_104_104_thousand():
    assert allocate(520_000, WEIGHTS) == {"general": 312_000, "code": 104_000, "math": 104_000}


@settings(deadline=None)
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


@settings(deadline=None)
@given(st.integers(0, 2000), st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 50), min_size=1))
def test_without_limits_each_is_within_one_of_its_ideal(total, weights):
    places = allocate(total, weights)
    assert sum(places.values()) == total
    assert all(abs(places[name] - total * weight / sum(weights.values())) < 1 for name, weight in weights.items())


def test_quotas_are_drawn_without_copies():
    counts, ids, stats = drawn(pool(general=500, code=500, math=500), total=100, weights=WEIGHTS)
    assert counts == {"general": 60, "code": 20, "math": 20}
    assert len(set(ids)) == 100
    assert stats["total"] == {"wanted": 100, "drawn": 100, "shortfall": 0, "rows": 100, "held_out": 0}


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
        "held_out": 0,
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


STRATA = st.dictionaries(
    st.sampled_from(["general__a", "general__b__x", "general__b__y", "code__c", "code__d__x", "math__e__x", "math__e__y"]),
    st.integers(1, 60),
    min_size=1,
)
SETTINGS = st.fixed_dictionaries(
    {
        "unit": st.sampled_from(["rows", "tokens"]),
        "mode": st.just("temperature"),
        "temperature": st.sampled_from([1.0, 2.0, 5.0]),
        "temperature_over": st.sampled_from(["datasets", "domains"]),
        "shortfall": st.sampled_from(["redistribute", "keep"]),
        "seed": st.integers(0, 3),
    }
)


def tokens_of(number: int) -> int:
    return 1 + (number * 7) % 13


@settings(deadline=None)
@given(STRATA, st.integers(1, 200), st.integers(1, 200), SETTINGS)
def test_within_a_stratum_a_larger_mixture_holds_the_smaller_one(sizes, one, more, settings):
    """Between strata, largest remainders may move one place when the total grows."""
    table = pool(tokens_of, **sizes)
    small, large = (drawn(table, total=total, min_stratum_rows=1, **settings)[1] for total in (one, one + more))
    for key in sizes:
        first, second = ({row_id for row_id in ids if row_id.partition("-")[0] == key} for ids in (small, large))
        assert first <= second or second <= first


def test_a_larger_mixture_holds_the_smaller_one():
    rows = pool(general=400, code=200)
    small = set(drawn(rows, total=60, weights={"general": 2, "code": 1})[1])
    assert small < set(drawn(rows, total=120, weights={"general": 2, "code": 1})[1])


@settings(deadline=None)
@given(STRATA, st.integers(1, 400), SETTINGS, st.randoms(use_true_random=False))
def test_the_draw_has_no_copies_does_not_depend_on_row_order_and_adds_up(sizes, total, settings, random):
    table = pool(tokens_of, **sizes)
    _, ids, stats = drawn(table, total=total, **settings)
    order = list(range(table.num_rows))
    random.shuffle(order)
    assert drawn(table.take(pa.array(order)), total=total, **settings)[1:] == (ids, stats)
    assert len(set(ids)) == len(ids) == stats["total"]["rows"]
    assert stats["total"]["drawn"] == sum(item["drawn"] for item in stats["domains"].values()) <= total
    for domain in stats["domains"].values():
        assert domain["drawn"] == sum(item["drawn"] for item in domain["datasets"].values()) <= domain["available"]
        for dataset in domain["datasets"].values():
            assert sum(item["drawn"] for item in dataset.get("strata", {}).values()) in (0, dataset["drawn"])
    if settings["unit"] == "rows" and settings["shortfall"] == "redistribute":
        assert len(ids) == min(total, table.num_rows)


@settings(deadline=None)
@given(st.integers(1, 300), st.integers(0, 500))
def test_another_domain_does_not_change_the_rows_of_this_one(size, other):
    alone = drawn(pool(code=size + 1), total=10, held_out=5, weights={"code": 1})[1]
    beside = pool(code=size + 1, general=other)
    assert drawn(beside, total=10, held_out=5, weights={"code": 1})[1] == alone


# --- held out --------------------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(STRATA.map(lambda sizes: {key: 20 * size for key, size in sizes.items()}), st.integers(1, 3000), st.integers(0, 30), SETTINGS)
def test_held_out_rows_are_never_in_the_mixture(sizes, total, held_out, settings):
    table = pool(tokens_of, **sizes)
    chosen = {"held_out": held_out, "total": total, **settings}
    held = held_out_ids(table, **chosen)
    _, ids, stats = drawn(table, **chosen)
    assert not set(held) & set(ids)
    assert len(set(held)) == len(held)
    domains = Counter(table.column("domain").to_pylist())
    found = Counter(row_id.partition("__")[0] for row_id in held)
    assert {name: item["held_out"] for name, item in stats["domains"].items()} == {
        name: min(held_out, count // 100) for name, count in domains.items()
    }
    assert all(found[name] == item["held_out"] for name, item in stats["domains"].items())
    assert all(
        item["available"] == sum(tokens_of(int(i.partition("-")[2])) if settings["unit"] == "tokens" else 1 for i in rest)
        for name, item in stats["domains"].items()
        if (rest := [i for i in table.column("id").to_pylist() if i.startswith(name) and i not in held]) is not None
    )


def test_held_out_rows_do_not_depend_on_the_size_of_the_mixture():
    table = pool(general=2000, code=500)
    small, large = (held_out_ids(table, total=total, held_out=64, weights={"general": 1, "code": 1}) for total in (10, 2400))
    assert small == large
    assert Counter(row_id.partition("-")[0] for row_id in small) == {"general": 20, "code": 5}


def test_a_domain_without_weight_holds_out_nothing():
    assert held_out_ids(pool(general=2000, code=2000), total=10, held_out=3, weights={"code": 1}) == [
        row_id for row_id in held_out_ids(pool(code=2000), total=10, held_out=3, weights={"code": 1})
    ]


# --- tokens and temperature --------------------------------------------------------------------------------------------------------


def test_a_token_budget_is_met_within_one_row_of_each_stratum():
    table = pool(tokens_of, math__meta__gsm=600, math__meta__sv=300, code=900)
    counts, ids, stats = drawn(table, total=3000, unit="tokens", weights={"math": 2, "code": 1})
    tokens = Counter()
    for row_id in ids:
        tokens[row_id.partition("-")[0]] += tokens_of(int(row_id.partition("-")[2]))
    strata = stats["domains"]["math"]["datasets"]["meta"]["strata"]
    assert {key: item["drawn"] for key, item in strata.items()} == {"gsm": tokens["math__meta__gsm"], "sv": tokens["math__meta__sv"]}
    assert 2000 - 2 * 13 < tokens["math__meta__gsm"] + tokens["math__meta__sv"] <= 2000
    assert 1000 - 13 < tokens["code"] <= 1000
    assert stats["domains"]["code"]["wanted"] == 1000
    assert stats["domains"]["code"]["shortfall"] == 1000 - tokens["code"]
    assert stats["domains"]["code"]["datasets"]["code"]["rows"] == counts["code"]


def test_temperature_weights_are_the_published_ones():
    """n^(1/T): T = 1 in proportion, T = 2 square roots; T = 1/0.3 is mT5's."""
    assert temperature_weights({"a": 9, "b": 4}, 1) == {"a": 9, "b": 4}
    assert temperature_weights({"a": 9, "b": 4}, 2) == {"a": 3, "b": 2}
    third = temperature_weights({"a": 1000, "b": 10}, 1 / 0.3)
    assert float(third["a"] / third["b"]) == pytest.approx(100**0.3, rel=1e-12)


def test_temperature_over_data_sets_or_domains():
    table = pool(code__evol=400, code__oss=100, math__meta=900)
    over_sets, _, stats = drawn(table, total=60, mode="temperature", temperature=2, temperature_over="datasets")
    assert over_sets == {"code__evol": 20, "code__oss": 10, "math__meta": 30}
    assert (stats["mode"], stats["temperature"]) == ("temperature", 2)
    over_domains, _, _ = drawn(
        pool(code__evol=320, code__oss=80, math__meta=900), total=100, mode="temperature", temperature=2, temperature_over="domains"
    )
    assert over_domains == {"code__evol": 32, "code__oss": 8, "math__meta": 60}
    some, _, _ = drawn(table, total=30, mode="temperature", temperature=2, weights={"code": 1})
    assert some == {"code__evol": 20, "code__oss": 10}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": {}}, "weights must name at least one domain"),
        ({"weights": {"a": 0}}, "weights must be above 0, but a is not"),
        ({"weights": {"a": 1}, "temperature": 2}, "temperature has no effect on quotas"),
    ],
)
def test_settings_that_contradict_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        MixConfig(total=1, **settings)


# --- rare strata -------------------------------------------------------------------------------------------------------------------


def test_strata_of_a_few_rows_are_drawn_from_together():
    """A thousand system prompts of one row each: by the alphabet they would be drawn from the front."""
    sizes = {f"general__orca__p{number:04}": 1 for number in range(1000)} | {"general__orca__common": 1000}
    counts, _, stats = drawn(pool(**sizes), total=600, weights={"general": 1})
    rare = sorted(key for key in counts if key != "general__orca__common")
    assert counts["general__orca__common"] == len(rare) == 300
    assert sum(key < "general__orca__p0500" for key in rare) == pytest.approx(150, abs=40)
    dataset = stats["domains"]["general"]["datasets"]["orca"]
    assert dataset["rare_strata"] == 1000
    assert dataset["strata"] == {RARE: {"available": 1000, "drawn": 300}, "common": {"available": 1000, "drawn": 300}}


def test_the_seed_decides_the_rows():
    rows = pool(general=400)
    first, again, other = (set(drawn(rows, total=50, weights={"general": 1}, seed=seed)[1]) for seed in (1, 1, 2))
    assert first == again != other


# --- the object --------------------------------------------------------------------------------------------------------------------


def golden_rows():
    sets = {"slimorca": ("general", 3000, 7), "evol": ("code", 800, 1), "oss": ("code", 500, 1), "metamath": ("math", 1500, 8)}
    return pa.Table.from_pylist(
        [
            {
                "id": hashlib.sha256(f"{name}/{n}".encode()).hexdigest()[:32],
                "dataset": name,
                "domain": domain,
                "stratum": f"s{(n * n) % strata}" if strata > 1 else "",
            }
            for name, (domain, count, strata) in sets.items()
            for n in range(count)
        ]
    )


@pytest.mark.parametrize(
    ("settings", "count", "digest"),
    [
        (
            {"total": 2000, "weights": WEIGHTS, "dataset_weights": {"evol": 66, "oss": 34}},
            2000,
            "b9a76859a7ef1dac64a6511e84f5926e3d5c74fe979fc423d7cb511794bd726a",
        ),
        ({"total": 5400, "weights": WEIGHTS, "seed": 7}, 5400, "0cb3eee2434dd553a699c1340ab5749a8fd40c5f4e3ee30b1acea0bc02fba94d"),
        (
            {"total": 5400, "weights": WEIGHTS, "seed": 7, "shortfall": "keep", "dataset_weights": {"evol": 1, "oss": 1}},
            5160,
            "0ef3723ac9d00f37357f40700f3799a7bfd316da10f5bbc7d5ecb6a978a60f74",
        ),
        (
            {"total": 1001, "weights": {"math": 1, "code": 2}, "seed": 3},
            1001,
            "ad24b3b36bc77a27308bc5f7ce545716f618314255ee432e35debb2dae56393d",
        ),
    ],
)
def test_ids_and_their_order_are_those_of_the_first_version(settings, count, digest):
    """Golden: made by the first implementation, which held all rows in dictionaries."""
    ids = drawn(golden_rows(), min_stratum_rows=1, **settings)[1]
    assert len(ids) == count
    assert hashlib.sha256("\n".join(ids).encode()).hexdigest() == digest


def save_rows(path, order, group_rows=None, tokens=True):
    path.mkdir()
    rows = [
        {
            "id": f"id{n}",
            "dataset": "d",
            "domain": "code" if n % 4 == 0 else "general",
            "stratum": "",
            "messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": f"a{n}" * (n % 9)}],
            **({"approximate_tokens": n} if tokens else {}),
        }
        for n in order
    ]
    pq.write_table(pa.Table.from_pylist(rows), path / "rows.parquet", row_group_size=group_rows)
    return path


def test_the_object_does_not_depend_on_the_order_of_the_rows_or_their_row_groups(tmp_path):
    config = MixConfig(total=200, weights={"general": 3, "code": 1}, held_out=2)
    one, result = run_stage(build, config, tmp_path / "a", {"rows": save_rows(tmp_path / "in", range(800))})
    two, _ = run_stage(build, config, tmp_path / "b", {"rows": save_rows(tmp_path / "in2", reversed(range(800)), group_rows=7)})
    assert tree_bytes(one) == tree_bytes(two)
    table = pq.read_table(one / "mixture.parquet")
    assert table.column_names == ["id", "dataset", "domain", "stratum", "messages", "approximate_tokens"]
    assert Counter(table.column("domain").to_pylist()) == {"general": 150, "code": 50}
    ids = table.column("id").to_pylist()
    assert ids != sorted(ids), "the mixture is shuffled"
    row = table.slice(7, 1).to_pylist()[0]
    assert row["messages"][0]["content"] == f"q{row['id'][2:]}", "a row stays together"
    held_out = pq.read_table(one / "heldout.parquet")
    assert held_out.schema == table.schema
    assert Counter(held_out.column("domain").to_pylist()) == {"general": 2, "code": 2}
    assert not set(held_out.column("id").to_pylist()) & set(ids)
    assert result.metrics == {"drawn": 200, "wanted": 200, "shortfall": 0, "rows": 200, "held_out": 4, "unit": "rows"}
    assert json.loads((one / "stats.json").read_text())["total"]["drawn"] == 200


def test_rows_without_token_counts_can_be_mixed_by_rows_only(tmp_path):
    rows = save_rows(tmp_path / "in", range(80), tokens=False)
    out, _ = run_stage(build, MixConfig(total=20, weights={"general": 1}), tmp_path / "a", {"rows": rows})
    assert pq.read_table(out / "mixture.parquet").num_rows == 20
    assert pq.read_table(out / "heldout.parquet").num_rows == 0
    with pytest.raises(DataError, match=r"mix\.unit is tokens, but rows\.parquet has no column approximate_tokens"):
        run_stage(build, MixConfig(total=20, unit="tokens", weights={"general": 1}), tmp_path / "b", {"rows": rows})


def test_rows_with_one_id_twice_are_refused(tmp_path):
    with pytest.raises(DataError, match="one id twice"):
        run_stage(build, MixConfig(total=2, weights={"general": 1}), tmp_path / "a", {"rows": save_rows(tmp_path / "in", [1, 1])})


def test_a_weighted_data_set_without_rows_is_named(caplog):
    settings = {"total": 50, "weights": {"code": 1}, "dataset_weights": {"evol": 66, "oss": 34}}
    count, _, stats = drawn(pool(code__evol=100), **settings)
    assert count["code__evol"] == 50
    assert stats["datasets_without_rows"] == ["oss"]
    assert "names oss, of which no row is left" in caplog.text
    with pytest.raises(DataError, match=r"dataset_weights names oss.*mix\.shortfall"):
        drawn(pool(code__evol=100), shortfall="fail", **settings)


@pytest.mark.parametrize(("share", "count"), [(0.01, 29), (0.1, 64), (0.02, 58)])
def test_a_domain_gives_at_most_its_share_to_the_held_out_rows(share, count):
    table = pool(general=2900)
    settings = {"total": 100, "weights": {"general": 1}, "held_out": 64, "held_out_share": share}
    held = held_out_ids(table, **settings)
    assert len(held) == count
    _, ids, _ = drawn(table, **settings)
    assert not set(held) & set(ids)
    assert ("held_out_share" in MixConfig(**settings).model_dump()) == (share != 0.01)  # keys from before there was a choice stay
