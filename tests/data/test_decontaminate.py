"""The overlap rule against a direct reading of it, and against measured numbers on real sets."""

from __future__ import annotations

import json
import random
from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pesc.data.decontaminate import BenchmarkIndex, ContaminatedRow, ContaminationTable, Hit, Item, removing_hit
from pesc.data.rows import read_rows
from pesc.data.text import words
from pesc.errors import DataError
from tests.data.rewording import reword


def ngrams(text: str, size: int) -> list[tuple[str, ...]]:
    tokens = words(text)
    return [tuple(tokens[i : i + size]) for i in range(len(tokens) - size + 1)]


def is_covered(item: str, items: list[str], turns: list[str], size: int, coverage: float) -> bool:
    """The rule, read literally: the weight of the item's words in n-grams that also occur in a turn, over the weight of all of them."""
    theirs = {gram for turn in turns for gram in ngrams(turn, size)}
    distinct = {tuple(words(other)): set(ngrams(other, size)) for other in items}
    weight = [Fraction(1)] * len(words(item))
    for place, gram in enumerate(ngrams(item, size)):
        shared = sum(gram in grams for grams in distinct.values())
        for k in range(place, place + size):
            weight[k] = min(weight[k], Fraction(1, shared) if shared < 10 else Fraction(0))
    nothing_but_template = not sum(weight)
    if nothing_but_template:
        weight = [Fraction(1)] * len(weight)
    covered = {place + k for place, gram in enumerate(ngrams(item, size)) if gram in theirs for k in range(size)}
    share = sum(weight[k] for k in covered) / sum(weight)
    return share == 1 or (share > coverage and not nothing_but_template)


def find(items: list[str], rows: list[list[str]], ngram: int = 8, coverage: float = 0.5) -> list[list[int]]:
    return [[hit.item for hit in hits if hit.kind != "number_twin"] for hits in hits_of(items, rows, ngram, coverage)]


def hits_of(items: list[str], rows: list[list[str]], ngram: int = 8, coverage: float = 0.5) -> list[list[Hit]]:
    return BenchmarkIndex.build([Item("b", text) for text in items], ngram, coverage).find(rows)


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


texts = st.lists(st.sampled_from(["a", "b", "c", "d"]), min_size=1, max_size=7).map(" ".join)


@settings(deadline=None, max_examples=300)
@given(
    st.lists(texts, min_size=1, max_size=30), st.lists(st.lists(texts, max_size=3), max_size=5), st.sampled_from([0.25, 0.5, 0.75])
)  # exact in binary: the index divides as floats, the rule in fractions
def test_the_index_is_the_rule(items, rows, coverage):
    got = find(items, rows, ngram=3, coverage=coverage)
    for row, hits in zip(rows, got, strict=True):
        expected = set()
        for number, item in enumerate(items):
            if len(words(item)) < 3:
                if any(words(turn) == words(item) for turn in row):
                    expected.add(number)
            elif is_covered(item, items, row, 3, coverage):
                expected.add(number)
        assert set(hits) == expected
        assert len(hits) == len(set(hits))


@settings(deadline=None, max_examples=50)
@given(st.lists(texts, min_size=1, max_size=8), st.lists(st.lists(texts, max_size=2), min_size=1, max_size=8), st.randoms())
def test_rows_are_judged_one_by_one(items, rows, rng):
    together = hits_of(items, rows, ngram=3)
    places = list(range(len(rows)))
    rng.shuffle(places)
    shuffled = hits_of(items, [rows[place] for place in places], ngram=3)
    assert shuffled == [together[place] for place in places]


# --- templates -----------------------------------------------------------------------------------------------------------------

TEMPLATE = "You are given a question with four options below it and must give the letter of the right one and nothing else"
SUBJECTS = ["lions", "tigers", "bears", "foxes", "hares", "deer", "owls", "crows", "hawks", "geese", "swans", "ducks", "seals", "whales"]


def test_a_template_alone_is_nothing_and_a_whole_item_is_everything():
    items = [f"{TEMPLATE} where do {subject} sleep" for subject in SUBJECTS]
    rows = [[TEMPLATE], [f"{TEMPLATE} where do cats sleep"], [items[3]], [TEMPLATE.upper() + " Who wrote Hamlet?"]]
    assert find(items, rows) == [[], [], [3], []]


def test_an_item_that_is_nothing_but_template_must_be_covered_whole():
    items = [TEMPLATE, *(f"{TEMPLATE} where do {subject} sleep" for subject in SUBJECTS)]
    assert find(items, [[TEMPLATE], [" ".join(TEMPLATE.split()[1:])]]) == [[0], []]


# --- small edits of short items --------------------------------------------------------------------------------------------------

SHORT = "Which gas do green plants take in from the air"  # 10 words


@pytest.mark.parametrize("place", range(10))
def test_one_replaced_word_of_a_short_item_does_not_hide_it(place):
    tokens = SHORT.split()
    tokens[place] = "chair"
    ((hit,),) = hits_of([SHORT], [[f"Hello there. {' '.join(tokens)}? Thanks a lot"]])
    assert (hit.item, hit.kind) == (0, "reworded")
    assert hit.coverage in (0.8, 0.9)  # an 8-gram that is left covers 8 of the 10 words and settles it; else 9 are equal


@pytest.mark.parametrize("turn", ["which gas do green little plants take in from the air", "which gas do green take in from the air"])
def test_a_word_put_in_or_left_out_does_not_hide_a_short_item(turn):
    assert find([SHORT], [[turn]]) == [[0]]


@pytest.mark.parametrize(
    "turn",
    [
        "which gas do cars take in from the sea",
        "from the air plants take in which gas do green",
        "which gas do green trees. plants take up. in from the air",
        "green plants take in light; which gas do we take from the air",
    ],
)
def test_scattered_words_of_a_short_item_are_another_text(turn):
    assert find([SHORT], [[turn]]) == [[]]


def test_what_distinguishes_an_item_from_its_siblings_must_be_there():
    items = [f"write a function to find the {what} of a given number" for what in SUBJECTS]
    assert find(items, [["Write a function to find the factorial of a given number"], [items[2]]]) == [[], [2]]


@pytest.mark.parametrize(
    ("turn", "hit"),
    [
        ("Answer this.\nWhat do predators eat?\nBe brief", True),
        ("Hello. What do predators eat? Thanks", True),
        ('He said: "what do predators eat"', True),
        ("Tell me what do predators eat in winter", False),
        ("What do predators eat in winter?", False),
        ("What do predators, eat", True),
    ],
)
def test_an_item_of_four_to_seven_words_is_found_as_a_sentence_or_a_line(turn, hit):
    assert hits_of(["What do predators eat?"], [[turn]]) == [[Hit(0, 1.0, "short")] if hit else []]


# --- number twins ----------------------------------------------------------------------------------------------------------------

SUM = "Ann buys 12 red pens for 3 dollars each and 5 blue pens for 2 dollars each so how much does Ann pay"


@pytest.mark.parametrize("row", [SUM.replace("12", "73").replace("3 d", "9 d").replace("5", "four").replace("2 d", "8 d")])
def test_the_same_item_with_other_numbers_is_a_class_of_its_own(row):
    ((hit,),) = hits_of([SUM], [[row]])
    assert hit.kind == "number_twin"
    assert removing_hit([hit]) is None
    assert removing_hit([hit], "drop") == hit


def test_other_words_with_other_numbers_are_no_twin():
    row = SUM.replace("12", "73").replace("3 d", "9 d").replace("pens", "hats").replace("Ann", "Bo").replace("5", "6")
    assert hits_of([SUM], [[row]]) == [[]]


def test_equal_numbers_are_no_twin():
    ((hit,),) = hits_of([SUM], [[SUM]])
    assert hit.kind == "verbatim"
    assert removing_hit([hit]) == hit


# --- saving ----------------------------------------------------------------------------------------------------------------------


def test_a_loaded_index_finds_the_same(tmp_path):
    texts = [SHORT, SUM, QUESTION, "Predators eat", "naïve café \ud800 ８", "What do predators eat?", "", SHORT.upper()]
    index = BenchmarkIndex.build([Item("b", text) for text in texts])
    index.save(tmp_path / "index")
    loaded = BenchmarkIndex.load(tmp_path / "index")
    rows = [[text] for text in texts] + [[SUM.replace("12", "13")], [], [""], ["x" * 10, SHORT]]
    assert loaded.find(rows) == index.find(rows)
    assert [{hit.item for hit in hits} for hits in loaded.find(rows)[:4]] == [{0, 7}, {1}, {2}, {3}]
    assert loaded.items == [Item("b", text) for text in texts]


def test_an_empty_index_can_be_saved_and_finds_nothing(tmp_path):
    BenchmarkIndex.build([]).save(tmp_path)
    assert BenchmarkIndex.load(tmp_path).find([[QUESTION]]) == [[]]


def test_an_incomplete_index_is_an_error_that_says_what_to_do(tmp_path):
    with pytest.raises(DataError, match=r"holds no complete benchmark index.*run the stage again"):
        BenchmarkIndex.load(tmp_path)
    BenchmarkIndex.build([Item("b", SUM)]).save(tmp_path)
    (tmp_path / "index.json").write_text(json.dumps({"format": 0}))
    with pytest.raises(DataError, match="format 0"):
        BenchmarkIndex.load(tmp_path)


# --- the table -------------------------------------------------------------------------------------------------------------------


def test_the_table_counts_rows_and_items_by_benchmark_and_data_set():
    items = [Item("x", QUESTION), Item("x", "Predators eat"), Item("y", QUESTION)]
    index = BenchmarkIndex.build(items)
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


def table_rows() -> list[ContaminatedRow]:
    kinds = ["verbatim", "reworded", "number_twin"]
    return [ContaminatedRow("d", f"id{n}", f"row {n}", [Hit(n % 2, 1.0 if n % 3 == 0 else 0.6 + n / 100, kinds[n % 3])]) for n in range(20)]


@given(st.permutations(range(20)), st.integers(0, 20))
def test_the_table_is_the_same_in_any_order_and_from_any_shards(order, cut):
    items, rows = [Item("x", QUESTION), Item("x", SHORT)], table_rows()
    expected = ContaminationTable(items, rows).summary({"d": 100})
    shuffled = [rows[place] for place in order]
    table = ContaminationTable(items, shuffled[:cut])
    table.merge(ContaminationTable(items, shuffled[cut:]))
    assert table.summary({"d": 100}) == expected


def test_the_table_counts_twins_apart_and_shows_the_most_covered_rows():
    cell = ContaminationTable([Item("x", QUESTION), Item("x", SHORT)], table_rows()).summary({"d": 100})["x"]["datasets"]["d"]
    assert (cell["rows"], cell["items"], cell["row_share"], cell["item_share"]) == (14, 2, 0.14, 1.0)
    assert cell["kinds"]["number_twin"] == {"rows": 6, "items": 2}
    assert Counter(example["kind"] for example in cell["examples"]) == {"verbatim": 3, "reworded": 3, "number_twin": 3}
    assert [example["id"] for example in cell["examples"] if example["kind"] == "verbatim"] == ["id0", "id12", "id15"]
    assert [example["id"] for example in cell["examples"] if example["kind"] == "reworded"] == ["id19", "id16", "id13"]


# --- real sets -------------------------------------------------------------------------------------------------------------------

FIELDS = {
    "gsm8k_test": "question",
    "math_test": "problem",
    "math500": "problem",
    "mmlu_dev": "question",
    "mmlu_val": "question",
    "mmlu_test": "question",
    "humaneval_test": "prompt",
    "mbpp_prompt": "text",
    "mbpp_test": "text",
    "mbpp_validation": "text",
    "mbpp_train": "text",
    "arc_easy_test": "question",
    "arc_challenge_test": "question",
    "openbookqa_test": "question_stem",
    "piqa_validation": "goal",
    "winogrande_validation": "sentence",
    "nq_open_validation": "question",
}


@pytest.fixture(scope="module")
def column(shared_data):
    def read(path: str, *fields: str) -> list[str]:
        rows = (row for _, row in read_rows(shared_data / "data" / path))
        return list(dict.fromkeys("\n".join(row[field] for field in fields) for row in rows))

    return read


@pytest.fixture(scope="module")
def benchmarks(column) -> dict[str, list[str]]:
    return {name: column(f"benchmarks/{name}.jsonl", field) for name, field in FIELDS.items()}


@pytest.fixture(scope="module")
def index(benchmarks):
    return BenchmarkIndex.build([Item(name, text) for name, texts in benchmarks.items() for text in texts])


def found_share(index: BenchmarkIndex, texts: list[str], rows: list[str]) -> float:
    """Of the texts planted into rows: the share whose row goes because of that very item."""
    found = [{index.items[hit.item].text for hit in hits if removing_hit([hit])} for hits in index.find([[row] for row in rows])]
    return sum(text in hits for text, hits in zip(texts, found, strict=True)) / len(texts)


@pytest.mark.parametrize("name", FIELDS)
def test_verbatim_items_are_found(index, benchmarks, name):
    texts = benchmarks[name]
    assert found_share(index, texts, texts) >= 0.99
    long = [text for text in texts if len(words(text)) >= 4]  # a shorter one says nothing inside another text: "dresser", "Predators eat"
    wrapped = [f"Please solve the following problem.\n\n{text}\n\nShow your work." for text in long]
    assert found_share(index, long, wrapped) >= 0.99


def test_lightly_reworded_items_are_found(index, benchmarks, column):
    others = sorted({word for text in column("instructions/metamathqa.jsonl", "response") for word in words(text) if word.isalpha()})
    shares, total = {}, 0.0
    for name, all_texts in benchmarks.items():
        texts = [text for text in all_texts if len(words(text)) >= 8]
        rng = random.Random(name)
        shares[name] = found_share(index, texts, [reword(text, rng, others) for text in texts])
        total += shares[name] * len(texts)
    assert total / sum(len(words(text)) >= 8 for texts in benchmarks.values() for text in texts) >= 0.98
    small = {"mbpp_prompt"}  # 10 items
    assert {name: share for name, share in shares.items() if share < 0.95 and name not in small and not name.startswith("mbpp")} == {}
    assert min(shares.values()) >= 0.9


def test_gsm8k_train_is_clean_of_gsm8k_test(benchmarks, column):
    """At most 0.1 % of 7,473 rows; the plain 8-gram rule, and this one, find 3."""
    train = column("benchmarks/gsm8k_train.jsonl", "question")
    assert sum(map(bool, find(benchmarks["gsm8k_test"], [[text] for text in train]))) == 3


def test_metamath_rows_against_math(benchmarks, column):
    """Two of 100 rows go (the reference measurement: 2 %), two more are the same question with other numbers."""
    rows = [[text] for text in column("instructions/metamathqa.jsonl", "query")]
    kinds = Counter(hits[0].kind for hits in hits_of(benchmarks["math_test"], rows) if hits)
    assert kinds["verbatim"] + kinds["reworded"] + kinds["short"] <= 3
    assert 1 <= kinds["number_twin"] <= 4


def test_code_alpaca_against_mbpp(benchmarks, column):
    """The plain rule flags 13 of 2,017 rows, mostly for shared forms of words; weights must not make it more."""
    rows = [[text] for text in column("instructions_extra/code_alpaca_2k.json", "instruction", "input")]
    assert 1 <= sum(map(bool, find(benchmarks["mbpp_test"], rows))) <= 13


def test_a_template_shared_by_rows_and_items_does_not_flood(benchmarks):
    template = "Question: {} Choose the one answer that is correct and reply with its letter alone, without any explanation. Answer:"
    items = [template.format(text) for text in benchmarks["arc_challenge_test"]]
    rows = [[template.format(text)] for text in benchmarks["openbookqa_test"]]
    assert sum(map(bool, find(items, rows))) <= 2


def test_a_real_index_survives_saving(index, benchmarks, tmp_path):
    index.save(tmp_path)
    rows = [[text] for text in benchmarks["math_test"][:300]]
    assert BenchmarkIndex.load(tmp_path).find(rows) == index.find(rows)
