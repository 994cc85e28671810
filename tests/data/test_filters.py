"""Each filter on clear cases of both kinds, and all of them on real rows."""

from __future__ import annotations

import pytest

from pesc.data.config import FilterConfig
from pesc.data.conversation import Conversation, Message, detect_format, parse_row
from pesc.data.filters import has_loop, has_unclosed_code, is_refusal, reason_to_drop
from pesc.data.rows import read_rows


def conversation(answer: str, prompt: str = "Why is the sky blue?") -> Conversation:
    messages = (Message("user", prompt), Message("assistant", answer))
    return Conversation("id", "d", "general", "", messages, (prompt,), "f", 1)


@pytest.mark.parametrize(
    "answer",
    [
        "As an AI language model, I do not have feelings.",
        "I'm sorry, but I can't assist with that request.",
        "I’m sorry, but I cannot help with that.",
        "I cannot provide medical advice.",
        "Sure! I was trained by OpenAI to help.",
        "Well, I am ChatGPT.",
    ],
)
def test_refusals_and_self_references_are_found(answer):
    assert is_refusal(answer)


@pytest.mark.parametrize(
    "answer",
    [
        "I cannot say which of the two is older; the text gives no dates.",
        "A language model assigns probabilities to texts. OpenAI released GPT-2 in 2019.",
        "The company was sorry. It could not assist the victims.",
        "Unfortunately, the train was late, so Ann arrived at nine.",
        "You can train an AI model by gradient descent.",
    ],
)
def test_answers_about_the_same_words_are_kept(answer):
    assert not is_refusal(answer)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("the cat sat on the mat " * 12, True),
        ("A good start of an answer. " + "and then " * 40, True),
        ("yes " * 30, True),
        ("0, " * 200, False),
        ("| --- | --- |\n" * 20, False),
        (" ".join(f"Step {n}: add {n} to the sum." for n in range(40)), False),
        ("short short short short short", False),
        (" ".join(f"word{n}" for n in range(400)), False),
    ],
)
def test_loops_of_words_are_found_but_not_rows_of_numbers(answer, expected):
    assert has_loop(answer) is expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("```python\nx = 1\n```", False),
        ("```python\nx = 1\n", True),
        ("```\na\n```\ntext\n```js\nb", True),
        ("use `x` and ``y``", False),
        ("````md\n```py\nx\n```\n````", False),
        ("  ```\nx\n  ```", False),
    ],
)
def test_unclosed_code_fences_are_found(answer, expected):
    assert has_unclosed_code(answer) is expected


@pytest.mark.parametrize(
    ("row", "settings", "reason"),
    [
        (conversation("It scatters."), {}, None),
        (conversation("It scatters."), {"min_answer_chars": 20}, "short_answer"),
        (conversation("It scatters."), {"max_chars": 20}, "too_long"),
        (conversation("I cannot help with that."), {}, "refusal"),
        (conversation("I cannot help with that."), {"drop_refusals": False}, None),
        (conversation("blah blah " * 30), {}, "ngram_loop"),
        (conversation("```"), {}, "unclosed_code"),
        (conversation("why is  the sky BLUE?"), {}, "copied_prompt"),
    ],
)
def test_the_reason_is_the_first_filter_that_is_on(row, settings, reason):
    assert reason_to_drop(row, FilterConfig(**settings)) == reason


def test_an_empty_answer_can_be_caught():
    assert reason_to_drop(conversation(""), FilterConfig()) == "short_answer"


def test_real_rows_are_nearly_all_kept(shared_data):
    """The published 500 rows: the filters take fewer than 2 %."""
    dropped = total = 0
    for name in ("slimorca", "magicoder_evol_instruct", "magicoder_oss_instruct", "metamathqa"):
        for _, raw in read_rows(shared_data / "data" / "instructions" / f"{name}.jsonl"):
            messages, questions = parse_row(raw, detect_format(raw))
            total += 1
            dropped += reason_to_drop(Conversation("", name, "", "", messages, questions, "", 1), FilterConfig()) is not None
    assert total == 500
    assert 0 < dropped < 10
