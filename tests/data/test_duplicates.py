"""Exact and near-duplicates: one survivor a cluster, every removal verified, no dependence on order or batches."""

from __future__ import annotations

import random
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pesc.data.conversation import Conversation, Message, conversation_id
from pesc.data.exact_dedup import split_exact_duplicates, survival_order
from pesc.data.minhash import choose_bands, find_near_duplicates, jaccard, shingles
from pesc.data.text import words

WORDS = [f"w{number}" for number in range(3000)]
NEAR = {"threshold": 0.8, "ngram": 5, "permutations": 128}


def conversation(prompt: str, answer: str, *, dataset: str = "d", file: str = "f", row: int = 1) -> Conversation:
    messages = (Message("user", prompt), Message("assistant", answer))
    return Conversation(conversation_id(dataset, messages), dataset, "general", "", messages, (prompt,), file, row)


def documents(seed: int, count: int, edits: list[int]) -> list[str]:
    """Random documents of 200 words; `edits[i]` words of every fourth one are changed in a copy."""
    draw = random.Random(seed)
    texts = []
    for number in range(count):
        tokens = [draw.choice(WORDS) for _ in range(200)]
        texts.append(" ".join(tokens))
        if number % 4 == 0:
            copy = tokens[:]
            for place in range(edits[(number // 4) % len(edits)]):
                copy[20 + place * 14] = "changed"
            texts.append(" ".join(copy))
    return texts


def similarity(left: str, right: str) -> float:
    return jaccard(shingles(words(left), 5), shingles(words(right), 5))


def test_equal_conversations_leave_one_survivor_whatever_the_order():
    rows = [
        conversation("Why?", "Because.", dataset="a"),
        conversation("why? ", "BECAUSE.", dataset="b"),
        conversation("Why?", "Because.", dataset="a", row=2),
        conversation("Why", "Because.", dataset="a"),
        conversation("5 + 3", "8"),
        conversation("5 - 3", "8"),
    ]
    kept, removed = split_exact_duplicates(rows)
    assert len(kept) == 4
    assert len(removed) == 2
    assert all(survivor in kept and row not in kept for row, survivor in removed)
    for seed in range(5):
        shuffled = random.Random(seed).sample(rows, len(rows))
        assert split_exact_duplicates(shuffled) == (kept, removed)


def test_the_longer_row_survives():
    short, long = conversation("Why?", "Because."), conversation("Why?", "Because it is so.")
    assert sorted([short, long], key=survival_order) == [long, short]


def test_planted_near_duplicates_are_found_and_nothing_else():
    """Copies with 1 to 2 changed words of 200 (J ≥ 0.9) are found; with 12 (J ≈ 0.54) not; unrelated rows never."""
    texts = documents(1, 400, [1, 2, 12])
    found = find_near_duplicates(texts, **NEAR)
    truth = {
        right for left, right in ((place, place + 1) for place in range(len(texts) - 1)) if similarity(texts[left], texts[right]) >= 0.8
    }
    assert {item.removed for item in found} == truth
    assert 60 <= len(truth) <= 70
    for item in found:
        assert item.kept < item.removed
        assert item.score == pytest.approx(similarity(texts[item.removed], texts[item.kept]))


@pytest.mark.parametrize("batch", [1, 7, 100])
def test_batches_do_not_change_the_result(batch):
    texts = documents(2, 60, [0, 1, 2])
    assert find_near_duplicates(texts, **NEAR, batch=batch) == find_near_duplicates(texts, **NEAR)


def test_a_chain_does_not_run_through_rows_that_are_gone():
    """a ~ b ~ c but a is not like c: b goes, and c stays because the row it resembles is gone."""
    base = [f"x{number}" for number in range(300)]
    a = base[:]
    b = [*base[:40], *(f"y{number}" for number in range(14)), *base[54:]]
    c = [*b[:140], *(f"z{number}" for number in range(14)), *b[154:]]
    texts = [" ".join(tokens) for tokens in (a, b, c)]
    assert similarity(texts[0], texts[1]) > 0.85
    assert similarity(texts[1], texts[2]) > 0.85
    assert similarity(texts[0], texts[2]) < 0.8
    assert [(item.removed, item.kept) for item in find_near_duplicates(texts, **NEAR)] == [(1, 0)]


def test_a_cluster_of_copies_keeps_exactly_one():
    tokens = [f"x{number}" for number in range(100)]
    texts = [" ".join([*tokens, f"tail{number}"]) for number in range(50)]
    found = find_near_duplicates(texts, **NEAR)
    assert {item.removed for item in found} == set(range(1, 50))
    assert {item.kept for item in found} == {0}


def test_templated_questions_with_different_contents_stay():
    """A long shared template alone does not make duplicates (the trap that wipes out templated sets)."""
    draw = random.Random(3)
    template = "If we know the answer to the above question is {}, what is the value of unknown variable x?"
    texts = [" ".join(draw.choices(WORDS, k=40)) + " " + template.format(number) for number in range(200)]
    assert find_near_duplicates(texts, **NEAR) == []


def test_rows_shorter_than_a_shingle_are_left_alone():
    assert find_near_duplicates(["a b c", "a b d", "x", ""], **NEAR) == []


@settings(deadline=None, max_examples=60)
@given(st.lists(st.lists(st.sampled_from("abc"), min_size=0, max_size=14).map(" ".join), max_size=12))
def test_survivors_and_removals_hold_for_any_texts(texts):
    """Every removed row truly resembles a row that stays."""
    found = find_near_duplicates(texts, threshold=0.5, ngram=2, permutations=128)
    removed = {item.removed for item in found}
    for item in found:
        assert item.kept not in removed
        assert jaccard(shingles(words(texts[item.removed]), 2), shingles(words(texts[item.kept]), 2)) == item.score >= 0.5
    equal = [(i, j) for i, j in combinations(range(len(texts)), 2) if texts[i] == texts[j] and len(texts[i].split()) >= 2]
    assert all(j in removed or i in removed for i, j in equal)


@pytest.mark.parametrize(("permutations", "threshold"), [(128, 0.8), (128, 0.7), (256, 0.9), (64, 0.5), (16, 0.3)])
def test_bands_reach_the_promised_recall(permutations, threshold):
    bands, rows = choose_bands(permutations, threshold)
    assert bands * rows <= permutations
    assert 1 - (1 - threshold**rows) ** bands >= 0.99 or rows == 1
