"""Exact and near-duplicates: one survivor a cluster, every removal verified, no dependence on order or batches."""

from __future__ import annotations

import random
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pesc.data.conversation import Conversation, Message, conversation_id
from pesc.data.exact_dedup import KEYS, content_key, find_exact_duplicates, halves, hex_of, survival_order
from pesc.data.minhash import choose_bands, find_near_duplicates, hash_shingles
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


def shingles(text: str, size: int) -> set[tuple[str, ...]]:
    """The set of word n-grams, the plain way."""
    tokens = words(text)
    return {tuple(tokens[start : start + size]) for start in range(len(tokens) - size + 1)}


def similarity(left: str, right: str, size: int = 5) -> float:
    a, b = shingles(left, size), shingles(right, size)
    return len(a & b) / len(a | b) if a | b else 0.0


def keys_of(rows: list[Conversation]) -> np.ndarray:
    keys = np.zeros(len(rows), KEYS)
    keys["id"] = halves([bytes.fromhex(row.id) for row in rows])
    keys["content"] = halves([content_key(row) for row in rows])
    keys["chars"] = [row.chars for row in rows]
    keys["row"] = [row.row for row in rows]
    return keys


def exact(rows: list[Conversation]) -> set[tuple[str, int, str]]:
    """(id and row of the removed, id of its survivor)."""
    keys = keys_of(rows)
    removed, survivors = find_exact_duplicates(keys, survival_order(keys))
    return {(rows[gone].id, rows[gone].row, rows[kept].id) for gone, kept in zip(removed, survivors, strict=True)}


def test_equal_conversations_leave_one_survivor_whatever_the_order():
    rows = [
        conversation("Why?", "Because.", dataset="a"),
        conversation("why? ", "BECAUSE.", dataset="b"),
        conversation("Why?", "Because.", dataset="a", row=2),
        conversation("Why", "Because.", dataset="a"),
        conversation("5 + 3", "8"),
        conversation("5 - 3", "8"),
    ]
    removed = exact(rows)
    assert removed == {(rows[0].id, 1, rows[1].id), (rows[2].id, 2, rows[1].id)}  # the longest stays
    for seed in range(5):
        assert exact(random.Random(seed).sample(rows, len(rows))) == removed


@given(st.lists(st.sampled_from(["Why?", "why?", " WHY? ", "How?", "Who? Me."]), max_size=12), st.integers(0, 9))
def test_of_equal_rows_exactly_one_stays(prompts, seed):
    rows = [conversation(prompt, "x", row=number) for number, prompt in enumerate(prompts)]
    removed = exact(rows)
    contents = {content_key(row) for row in rows}
    assert len(rows) - len(removed) == len(contents)
    assert exact(random.Random(seed).sample(rows, len(rows))) == removed


def test_the_longer_row_survives_then_the_smaller_id():
    rows = [conversation("Why?", "Because."), conversation("Why?", "Because it is so."), conversation("Why!", "Because.")]
    keys = keys_of(rows)
    order = survival_order(keys).tolist()
    assert order[0] == 1
    assert order[1:] == sorted([0, 2], key=lambda place: rows[place].id)
    assert [hex_of(half) for half in keys["id"]] == [row.id for row in rows]


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


@pytest.mark.parametrize("size", [1, 2, 5])
def test_there_is_one_hash_for_each_ngram(size):
    texts = ["a b c a b c d", "", "a", "Été à la plage, où l'été", "a b c a b c d"]
    hashes = hash_shingles(texts, size)
    assert [len(set(hashes.of(place).tolist())) for place in range(5)] == [len(shingles(text, size)) for text in texts]
    assert hashes.of(0).tolist() == hashes.of(4).tolist()


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
        assert similarity(texts[item.removed], texts[item.kept], 2) == item.score >= 0.5
    equal = [(i, j) for i, j in combinations(range(len(texts)), 2) if texts[i] == texts[j] and len(texts[i].split()) >= 2]
    assert all(j in removed or i in removed for i, j in equal)


@pytest.mark.parametrize(("permutations", "threshold"), [(128, 0.8), (128, 0.7), (256, 0.9), (64, 0.5), (16, 0.3)])
def test_bands_reach_the_promised_recall(permutations, threshold):
    bands, rows = choose_bands(permutations, threshold)
    assert bands * rows <= permutations
    assert 1 - (1 - threshold**rows) ** bands >= 0.99 or rows == 1
