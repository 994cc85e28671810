"""The data stages at a scale that takes minutes, and rows that are made for measuring."""

from __future__ import annotations

import json

import pytest

from pesc.bench.data import QUESTION_FIELDS, measure_data, render
from pesc.bench.synthetic_rows import read_seeds, write_chunk
from pesc.errors import DataError

QUESTIONS = [("gsm", "A farmer has 12 sheep and buys 7 more; how many sheep does the farmer have now?")]


def test_made_rows_repeat_and_what_is_planted_is_what_it_says(shared_data, tmp_path):
    seeds = read_seeds(shared_data / "data" / "instructions" / "metamathqa.jsonl", "query_response")
    planted = write_chunk(tmp_path / "a.jsonl", seeds, QUESTIONS, 600, "seed")
    assert write_chunk(tmp_path / "b.jsonl", seeds, QUESTIONS, 600, "seed") == planted
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().rstrip("\n").split("\n")]
    assert {item.kind for item in planted} == {"exact", "edit_1", "edit_2", "verbatim", "reworded"}
    for item in planted:
        row = rows[item.row - 1]
        if item.kind == "exact":
            assert row["query"].split() == rows[int(item.origin) - 1]["query"].upper().split()
        elif item.kind == "verbatim":
            assert QUESTIONS[0][1] in row["query"]
    own = [row["query"] for number, row in enumerate(rows, 1) if number not in {item.row for item in planted}]
    assert len(set(own)) > 0.97 * len(own)


def test_a_directory_without_the_sets_is_a_sentence(tmp_path):
    with pytest.raises(DataError, match=r"has no file slimorca\.jsonl"):
        measure_data(tmp_path, tmp_path, None, 1000, 100, 1, tmp_path, lambda *_args, **_more: None)


@pytest.mark.benchmark
def test_dedup_and_mix_find_what_was_planted_at_speed(shared_data, tmp_path):
    """60,000 rows: the rate that 1.1 million rows in six minutes need, and the recalls."""
    assert QUESTION_FIELDS
    data = shared_data / "data"
    times = measure_data(data / "instructions", data / "benchmarks", None, 60_000, 30_000, 2, tmp_path, lambda *_args, **_more: None)
    print("\n" + render(times))
    seconds = sum(step.seconds for step in times.steps if step.step in ("dedup", "mix"))
    assert times.rows / seconds >= 1_100_000 / 360
    assert times.recall["exact"] >= 0.999
    assert times.recall["edit_1"] >= 0.99
    assert times.recall["verbatim"] >= 0.99
    assert times.recall["reworded"] >= 0.95
    assert times.false_share <= 0.001
