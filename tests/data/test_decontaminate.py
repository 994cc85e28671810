"""The overlap rule against a direct reading of it, and against measured numbers on real sets."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pesc.data.decontaminate import BenchmarkIndex, ContaminationTable, Item
from pesc.data.rows import read_rows
from pesc.data.text import words


def covered_share(item: str, turns: list[str], size: int) -> float:
    """The rule, read literally: the share of the item's words that lie in an n-gram which also occurs in a turn."""
    theirs = {tuple(tokens[i : i + size]) for tokens in map(words, turns) for i in range(len(tokens) - size + 1)}
    ours = words(item)
    covered = {i + k for i in range(len(ours) - size + 1) if tuple(ours[i : i + size]) in theirs for k in range(size)}
    return len(covered) / len(ours)


def find(items: list[str], rows: list[list[str]], ngram: int = 8, coverage: float = 0.5) -> list[list[int]]:
    index = BenchmarkIndex([Item("b", text) for text in items], ngram, coverage)
    return [[hit.item for hit in hits] for hits in index.find(rows)]


QUESTION = "A train leaves the station at nine and travels sixty miles an hour; when does it arrive?"


def test_a_reworded_question_is_found_and_a_different_one_is_not():
    reworded = "Tom asks: a train leaves the station at nine and travels sixty miles an hour, so when is it there?"
    other = "A train leaves the station at noon and a bus leaves it at one; which is faster?"
    assert find([QUESTION], [[reworded], [other], [QUESTION.upper()]]) == [[0], [], [0]]


def test_coverage_must_come_from_one_row():
    tokens = words(QUESTION)
    half, rest = " ".join(tokens[:8]), " ".join(tokens[9:])
    assert find([QUESTION], [[half], [rest]]) == [[], []]
    assert find([QUESTION], [[half, rest]]) == [[0]]


def test_an_ngram_does_not_span_two_turns_or_two_rows():
    tokens = words(QUESTION)
    assert find([QUESTION], [[" ".join(tokens[:7]), " ".join(tokens[7:14])]]) == [[]]


@pytest.mark.parametrize(
    ("turn", "hit"), [("Predators eat", True), ("predators eat:", True), ("What do predators eat", False), ("Predators", False)]
)
def test_items_shorter_than_an_ngram_must_equal_a_turn(turn, hit):
    assert find(["Predators eat "], [[turn]]) == [[0] if hit else []]


def test_full_coverage_always_counts():
    assert find([QUESTION], [[QUESTION]], coverage=1.0) == [[0]]


def test_no_items_and_no_rows():
    assert find([], [["anything at all that is long enough to hold an n-gram"]]) == [[]]
    assert find([QUESTION], []) == []


texts = st.lists(st.sampled_from(["a", "b", "c", "d"]), min_size=1, max_size=12).map(" ".join)


@settings(deadline=None, max_examples=200)
@given(st.lists(texts, min_size=1, max_size=6), st.lists(st.lists(texts, max_size=3), max_size=5), st.sampled_from([0.3, 0.5, 0.8]))
def test_the_index_is_the_rule(items, rows, coverage):
    got = find(items, rows, ngram=3, coverage=coverage)
    for row, hits in zip(rows, got, strict=True):
        expected = set()
        for number, item in enumerate(items):
            if len(words(item)) < 3:
                if any(words(turn) == words(item) for turn in row):
                    expected.add(number)
            elif covered_share(item, row, 3) > coverage:
                expected.add(number)
        assert set(hits) == expected


def test_the_table_counts_rows_and_items_by_benchmark_and_data_set():
    items = [Item("x", QUESTION), Item("x", "Predators eat"), Item("y", QUESTION)]
    index = BenchmarkIndex(items, 8, 0.5)
    table = ContaminationTable(items)
    for name, turns in (("one", [QUESTION]), ("one", [QUESTION]), ("two", ["predators eat"])):
        (hits,) = index.find([turns])
        table.add(name, "id", turns[0], hits)
    summary = table.summary(["one", "two", "three"])
    assert {name: (cell["rows"], cell["items"]) for name, cell in summary["x"]["datasets"].items()} == {
        "one": (2, 1),
        "two": (1, 1),
        "three": (0, 0),
    }
    assert summary["x"]["items"] == 2
    assert summary["y"]["datasets"]["one"]["rows"] == 2
    assert summary["y"]["datasets"]["one"]["item_share"] == 1.0
    assert summary["x"]["datasets"]["two"]["examples"][0]["item"] == "Predators eat"


def test_real_controls_give_the_measured_counts(shared_data):
    """GSM8K train against its test: 3 of 7,473 rows.  CodeAlpaca against MBPP: 13 of 2,017.  Every item finds itself."""
    data = shared_data / "data"

    def column(path, *fields):
        return [["\n".join(row[field] for field in fields)] for _, row in read_rows(data / path)]

    gsm = [turns[0] for turns in column("benchmarks/gsm8k_test.jsonl", "question")]
    assert sum(map(bool, find(gsm, column("benchmarks/gsm8k_train.jsonl", "question")))) == 3
    assert all(number in hits for number, hits in enumerate(find(gsm, [[text] for text in gsm])))
    mbpp = [turns[0] for turns in column("benchmarks/mbpp_test.jsonl", "text")]
    assert sum(map(bool, find(mbpp, column("instructions_extra/code_alpaca_2k.json", "instruction", "input")))) == 13
