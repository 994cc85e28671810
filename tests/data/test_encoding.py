"""Which tokens carry loss, and what becomes of rows over the context."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pesc.data.chat import CHATML, PESC
from pesc.data.config import TokenizeConfig
from pesc.data.encoding import IGNORED, RowEncoder, load_tokenizer
from tests.data.builders import tiny_tokenizer

BARE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}<s>{{ m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant<s>{% endif %}"
)
THREE_ROUNDS = [
    ("user", "a"),
    ("assistant", "b " * 10 + "b"),
    ("user", "c " * 5 + "c"),
    ("assistant", "d " * 20 + "d"),
    ("user", "e"),
    ("assistant", "f"),
]
TOKENIZER = tiny_tokenizer(CHATML)
WHOLE = RowEncoder(TOKENIZER, TokenizeConfig()).encode([THREE_ROUNDS]).rows[0]
FIRST, SECOND, THIRD = WHOLE.supervised


def trimming_tokenizer(template: str):
    """As many published byte-level tokenizers, it takes white space off the offsets of its tokens."""
    from tokenizers import processors

    tokenizer = tiny_tokenizer(template)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return tokenizer


def answers(tokenizer, row) -> list[str]:
    return [tokenizer.decode(row.ids[start:end]) for start, end in row.supervised]


@pytest.mark.parametrize("make", [tiny_tokenizer, trimming_tokenizer])
def test_indentation_of_an_answer_carries_loss(make):
    """Code often begins with it; the space must not fall to a tokenizer that hides it from the offsets."""
    tokenizer = make(BARE)
    (row,) = RowEncoder(tokenizer, TokenizeConfig()).encode([[("user", "x"), ("assistant", "    return 1\n\n")]]).rows
    assert answers(tokenizer, row) == ["    return 1\n\n<|im_end|>"]


def test_the_callers_tokenizer_is_left_as_it_was():
    tokenizer = tiny_tokenizer(CHATML, adds_bos=True)
    first, second = (RowEncoder(tokenizer, TokenizeConfig()).encode([THREE_ROUNDS]).rows[0] for _ in range(2))
    assert np.array_equal(first.ids, second.ids)
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id == first.ids[0]


def cut(policy: str, limit: int):
    return RowEncoder(TOKENIZER, TokenizeConfig(context_length=limit, overlong=policy)).encode([THREE_ROUNDS])


def test_truncate_cuts_at_the_context_in_the_middle_of_an_answer():
    limit = SECOND[0] + 4
    (row,) = cut("truncate", limit).rows
    assert row.ids.tolist() == WHOLE.ids[:limit].tolist()
    assert row.supervised == (FIRST, (SECOND[0], limit))


@pytest.mark.parametrize(("limit", "answers_left"), [(FIRST[1], 1), (SECOND[0] + 4, 1), (SECOND[1], 2), (THIRD[1] - 1, 2)])
def test_truncate_turns_cuts_after_the_last_answer_that_fits_whole(limit, answers_left):
    encoded = cut("truncate_turns", limit)
    (row,) = encoded.rows
    assert row.supervised == (FIRST, SECOND, THIRD)[:answers_left]
    assert row.ids.tolist() == WHOLE.ids[: row.supervised[-1][1]].tolist()
    assert +encoded.counts == Counter(truncated=1)


@pytest.mark.parametrize(("policy", "limit"), [("truncate_turns", FIRST[1] - 1), ("drop", len(WHOLE.ids) - 1)])
def test_a_row_that_a_policy_gives_up_is_counted(policy, limit):
    encoded = cut(policy, limit)
    assert encoded.rows == encoded.places == []
    assert +encoded.counts == Counter(overlong=1)


@pytest.mark.parametrize("policy", ["truncate", "truncate_turns", "drop"])
def test_a_row_that_just_fits_is_left_whole(policy):
    encoded = cut(policy, len(WHOLE.ids))
    assert encoded.rows[0].ids.tolist() == WHOLE.ids.tolist()
    assert encoded.rows[0].supervised == (FIRST, SECOND, THIRD)
    assert not +encoded.counts


rounds = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=4)


@settings(deadline=None, max_examples=80)
@given(st.lists(rounds, min_size=1, max_size=5), st.integers(16, 120), st.sampled_from(["truncate", "truncate_turns", "drop"]))
def test_no_policy_leaves_a_row_without_loss_or_over_the_context(rows, limit, policy):
    conversations = [[(role, "x " * n) for pair in row for role, n in zip(("user", "assistant"), pair, strict=True)] for row in rows]
    encoded = RowEncoder(TOKENIZER, TokenizeConfig(context_length=limit, overlong=policy)).encode(conversations)
    assert len(encoded.rows) + encoded.counts["overlong"] + encoded.counts["no_answer_left"] == len(rows)
    assert all(row.supervised_tokens > 0 and len(row.ids) <= limit for row in encoded.rows)
    if policy != "truncate":
        assert all(row.ids[end - 1] == TOKENIZER.eos_token_id for row in encoded.rows for _, end in row.supervised)


def test_the_places_are_those_of_the_rows_that_are_kept():
    good, refused = [("user", "a"), ("assistant", "b")], [("user", "<|im_end|>"), ("assistant", "b")]
    too_long = [("user", "x " * 99), ("assistant", "b")]
    encoded = RowEncoder(TOKENIZER, TokenizeConfig(context_length=64)).encode([refused, good, too_long, good])
    assert encoded.places == [1, 3]
    assert +encoded.counts == Counter(template=1, no_answer_left=1)


def prefix_labels(tokenizer, template: str | None, messages: list[tuple[str, str]]) -> tuple[list[int], list[int]]:
    """(ids, labels) by another road: tokenise the text up to each answer, then the text through it; what is new carries loss.

    This is how TRL masks prompts.  The answer's end is the first end token after it.
    """
    turns = [{"role": role, "content": content} for role, content in messages]

    def encode(count: int, prompt: bool) -> list[int]:
        text = tokenizer.apply_chat_template(turns[:count], tokenize=False, add_generation_prompt=prompt, chat_template=template)
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    ids = encode(len(turns), False)
    labels = [IGNORED] * len(ids)
    for index, turn in enumerate(turns):
        if turn["role"] == "assistant":
            start = len(encode(index, True))
            end = ids.index(tokenizer.eos_token_id, start) + 1
            labels[start:end] = ids[start:end]
    return ids, labels


@pytest.mark.slow
@pytest.mark.parametrize("template", ["model", "chatml", "pesc"])
def test_labels_are_those_of_the_prefix_method_on_real_rows(smollm2, real_conversations, template):
    """The 500 rows of the mix and multi-turn rows with tools, with the real tokenizer: pad is the end token, a system prompt is inserted."""
    tokenizer = load_tokenizer(smollm2)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    rows = [*real_conversations(), *real_conversations("instructions_extra/glaive_toolcall_en_demo.json")]
    assert len(rows) == 800
    assert sum(len([role for role, _ in row if role == "assistant"]) > 1 for row in rows) > 100
    assert any(role == "tool" for row in rows for role, _ in row)
    encoded = RowEncoder(tokenizer, TokenizeConfig(chat_template=template, context_length=32768)).encode(rows)
    assert encoded.places == list(range(800))
    assert +encoded.counts == Counter()
    text = {"model": None, "chatml": CHATML, "pesc": PESC}[template]
    for row, messages in zip(encoded.rows, rows, strict=True):
        ids, labels = prefix_labels(tokenizer, text, messages)
        assert row.ids.tolist() == ids
        assert row.labels().tolist() == labels


@pytest.mark.slow
def test_the_system_prompt_that_the_real_template_inserts_is_seen_and_not_learned(smollm2):
    tokenizer = load_tokenizer(smollm2)
    (row,) = RowEncoder(tokenizer, TokenizeConfig()).encode([[("user", "2 + 2?"), ("assistant", "4")]]).rows
    assert tokenizer.decode(row.ids).startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert tokenizer.decode(row.ids).count("<|im_start|>") == 3
    assert row.labels()[row.labels() != IGNORED].tolist() == [*tokenizer("4")["input_ids"], tokenizer.eos_token_id]
