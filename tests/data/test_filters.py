"""The chain of filters: reasons, switches, settings of one data set, and what is taken from real rows."""

from __future__ import annotations

import json
import time
import typing
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from pesc.data.config import DatasetConfig, DedupConfig, FilterConfig, filters_of
from pesc.data.conversation import Conversation, Message, RowError, detect_format, parse_row
from pesc.data.dedup import build
from pesc.data.filters import FILTER_REASONS, reason_to_drop
from pesc.data.rows import read_rows
from pesc.data.text import approximate_tokens
from pesc.errors import RecipeError
from pesc.recipe import load_recipe
from tests.data.builders import run_stage, write_jsonl

ALL_ON = FilterConfig(drop_broken_python=True, drop_python2=True, drop_math_disagreements=True)
BROKEN = "```python\ndef f(n):\nreturn n\nprint(f(1))\n```"
PYTHON2 = "```python\nimport os\nx = 1\nprint 'x', x\n```"
MATHS = "So $\\boxed{7}$.\nThe answer is: 8"


def conversation(answer: str, prompt: str = "Why is the sky blue?") -> Conversation:
    messages = (Message("user", prompt), Message("assistant", answer))
    return Conversation("id", "d", "general", "", messages, (prompt,), "f", 1)


# reason -> (an answer that it takes, the settings that switch it off, those that switch it on)
CASES: dict[str, tuple[str, dict, dict]] = {
    "short_answer": ("It.", {}, {"min_answer_chars": 4}),
    "empty_answer": ("...", {"drop_empty_answers": False}, {}),
    "too_long": ("It scatters.", {}, {"max_chars": 20}),
    "too_few_tokens": ("It scatters.", {}, {"min_tokens": 50}),
    "too_many_tokens": ("It scatters.", {}, {"max_tokens": 3}),
    "bad_encoding": ("It scattersâ€¦", {"drop_bad_encoding": False}, {}),
    "foreign_script": ("Синий свет рассеивается сильнее красного.", {"drop_foreign_script": False}, {}),
    "language": ("La lumière bleue est plus dispersée que la lumière rouge par les molécules de l'air. " * 4, {}, {"languages": ("en",)}),
    "refusal": ("I cannot help with that.", {"drop_refusals": False}, {}),
    "self_reference": ("It scatters, as an AI, I think.", {"drop_self_references": False}, {}),
    "ngram_loop": ("blah blah " * 30, {"drop_ngram_loops": False}, {}),
    "truncated": ("It is blue. The sun shines. It is so because the light of the sun is", {"drop_truncated": False}, {}),
    "unclosed_code": ("```\nblue", {"drop_unclosed_code": False}, {}),
    "broken_python": (BROKEN, {}, {"drop_broken_python": True}),
    "python2": (PYTHON2, {}, {"drop_python2": True}),
    "math_disagreement": (MATHS, {}, {"drop_math_disagreements": True}),
    "copied_prompt": ("why is  the sky BLUE?", {"drop_copied_prompt": False}, {}),
}


def test_every_reason_has_a_case_and_a_setting():
    assert tuple(CASES) == FILTER_REASONS
    assert len(set(FILTER_REASONS)) == len(FILTER_REASONS)
    switches = {name for name in FilterConfig.model_fields if name != "max_malformed_share"}
    assert len(switches) == len(FILTER_REASONS)


@pytest.mark.parametrize("reason", FILTER_REASONS)
def test_a_row_goes_for_its_reason_when_the_filter_is_on_and_stays_when_it_is_off(reason):
    if reason == "language":
        pytest.importorskip("pycld2", reason="optional: pip install 'pesc[language]'")
    answer, off, on = CASES[reason]
    assert reason_to_drop(conversation(answer), FilterConfig(**on)) == reason
    assert reason_to_drop(conversation(answer), FilterConfig(**off)) is None


def test_a_plain_answer_stays_and_an_empty_one_is_short():
    assert reason_to_drop(conversation("It scatters."), ALL_ON) is None
    assert reason_to_drop(conversation(""), FilterConfig()) == "short_answer"


def test_one_bad_answer_of_many_removes_the_row():
    good, bad = Message("assistant", "It scatters."), Message("assistant", "I cannot help with that.")
    user = Message("user", "Why?")
    for turns in ((user, good, user, bad), (user, bad, user, good)):
        assert reason_to_drop(Conversation("", "d", "", "", turns, ("Why?",), "f", 1), FilterConfig()) == "refusal"


def test_the_text_of_the_user_alone_removes_nothing():
    for reason, (answer, _, on) in CASES.items():
        if reason not in ("too_long", "too_few_tokens", "too_many_tokens", "short_answer", "language", "copied_prompt"):
            assert reason_to_drop(conversation("It scatters.", prompt=answer), FilterConfig(**on)) is None


SWITCHES = {
    reason: off or {key: typing.cast(object, FilterConfig.model_fields[key].default) for key in on}
    for reason, (_, off, on) in CASES.items()
}


@settings(deadline=None)
@given(st.lists(st.sampled_from([case[0] for case in CASES.values()]), min_size=1, max_size=4), st.sampled_from(FILTER_REASONS))
def test_switching_one_filter_off_moves_only_its_own_rows_and_only_down_the_list(parts, switched):
    row = conversation("\n".join(parts))
    before = reason_to_drop(row, ALL_ON)
    after = reason_to_drop(row, ALL_ON.model_copy(update=SWITCHES[switched]))
    if before != switched:
        assert after == before
    else:
        assert after is None or FILTER_REASONS.index(after) > FILTER_REASONS.index(before)


@settings(deadline=None)
@given(st.text(max_size=400), st.text(max_size=100))
def test_any_text_gets_one_of_the_reasons_and_the_same_one_again(answer, prompt):
    row = conversation(answer, prompt)
    reason = reason_to_drop(row, ALL_ON)
    assert reason is None or reason in FILTER_REASONS
    assert reason_to_drop(row, ALL_ON) == reason


@pytest.mark.parametrize(
    "unit",
    [
        "(",
        "`",
        "~~~\n",
        "```python\n",
        '"',
        "$",
        "\\boxed{",
        "#### 1\n",
        "a ",
        "as an ai ",
        "as an ai i ",
        "“a ",
        "$x = ",
        "i am ",
        "Ã",
        "the answer is ",
        "...",
        " ",
    ],
)
@pytest.mark.timeout(60)
def test_time_grows_no_faster_than_the_row(unit):
    """Texts made to make patterns try everything: 200,000 characters in well under a second."""
    start = time.process_time()
    reason_to_drop(conversation(unit * (200_000 // len(unit))), ALL_ON.model_copy(update={"max_chars": 10**9}))
    assert time.process_time() - start < 2


# --- settings of one data set --------------------------------------------------------------------------------------------------


def dedup(filters: dict, **overrides: dict) -> DedupConfig:
    sets = {name: DatasetConfig(source=name, domain="d", format="query_response", filters=changes) for name, changes in overrides.items()}
    return DedupConfig(datasets=sets, filters=FilterConfig(**filters))


def test_a_data_set_overrides_the_filters_of_all():
    config = dedup({"max_chars": 500, "drop_refusals": False}, a={"drop_refusals": True}, b={})
    assert filters_of(config, "a") == FilterConfig(max_chars=500, drop_refusals=True)
    assert filters_of(config, "b") == config.filters


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"drop_refusal": True}, r"datasets\.a\.filters\.drop_refusal: there is no such setting"),
        ({"max_chars": 0}, r"datasets\.a\.filters\.max_chars: .*greater than 0.* \(got 0\)"),
    ],
)
def test_a_wrong_override_is_named_when_the_recipe_is_read(changes, sentence):
    with pytest.raises(ValidationError, match=sentence):
        dedup({}, a=changes)
    with pytest.raises(RecipeError, match=sentence):
        load_recipe(
            "camelidae-8x7b",
            [f"dedup.datasets.a={{source: slimorca, domain: general, filters: {changes}}}".replace("'", "").replace("True", "true")],
        )


def test_groups_need_both_settings():
    with pytest.raises(ValidationError, match="group_by and max_per_group go together"):
        DatasetConfig(source="s", domain="d", group_by="original_question")
    assert DatasetConfig(source="s", domain="d", group_by="original_question", max_per_group=3).max_per_group == 3


def test_the_published_mix_checks_python_in_code_and_answers_in_maths_alone():
    config = load_recipe("camelidae-8x7b").dedup
    python = {name for name in config.datasets if filters_of(config, name).drop_broken_python}
    maths = {name for name in config.datasets if filters_of(config, name).drop_math_disagreements}
    assert python == {"magicoder-evol", "magicoder-oss"}
    assert maths == {"metamathqa"}
    assert config.datasets["metamathqa"].group_by == "original_question"


def test_the_stage_counts_each_reason_by_data_set(tmp_path):
    rows = [
        {"query": "How many?", "response": MATHS},
        {"query": "Why?", "response": "I cannot help with that."},
        {"query": "Who?", "response": "Ann."},
    ]
    config = dedup({}, a={"drop_math_disagreements": True}, b={"drop_refusals": False})
    inputs = {
        name: write_jsonl(tmp_path / name / "rows.jsonl", [{**row, "query": name + row["query"]} for row in rows]).parent for name in "ab"
    }
    out, _ = run_stage(build, config, tmp_path / "run", inputs)
    counts = json.loads((out / "stats.json").read_text())["datasets"]
    taken = {name: {key: value for key, value in item.items() if key.startswith("filter_") and value} for name, item in counts.items()}
    assert taken == {"a": {"filter_refusal": 1, "filter_math_disagreement": 1}, "b": {}}
    assert {f"filter_{reason}" for reason in FILTER_REASONS} <= counts["a"].keys()


# --- estimated tokens ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "tokens"),  # SmolLM2's own counts
    [
        ("", 0),
        (
            "The house at the end of the road was built by a doctor who had come from the city. He planted apple trees behind it, and for many "
            "years his children sold the fruit to the people of the village in the autumn.",
            46,
        ),
        (
            "def fibonacci(n):\n    if n <= 1:\n        return n\n    a, b = 0, 1\n    for _ in range(n - 1):\n        a, b = b, a + b\n"
            "    return b\n\nprint(fibonacci(10))",
            60,
        ),
        (
            "Each shirt costs $24, so 15 shirts cost 15 * $24 = $360.\nWith 12.5% off, he pays 360 - 45 = $315.\n#### 315\nThe answer is: 315",
            67,
        ),
        ("Эти сексуальные права включают право выбирать своих партнеров и решать, когда иметь детей.", 69),
        ("今天天气很好，我们去公园散步吧。你想和我一起去吗？", 49),
    ],
)
def test_tokens_are_estimated_within_fifteen_percent(text, tokens):
    assert approximate_tokens(text) == pytest.approx(tokens, rel=0.15)


@given(st.text(max_size=300), st.text(max_size=300))
def test_the_estimate_of_two_texts_is_the_sum_of_theirs(first, second):
    assert abs(approximate_tokens(first + second) - approximate_tokens(first) - approximate_tokens(second)) <= 1
    assert approximate_tokens(first) >= 0


def test_bounds_count_all_turns_of_a_row():
    row = conversation("It scatters. " * 10, prompt="Why? " * 40)
    tokens = sum(approximate_tokens(message.content) for message in row.messages)
    assert reason_to_drop(row, FilterConfig(min_tokens=tokens, max_tokens=tokens, drop_ngram_loops=False)) is None
    assert reason_to_drop(row, FilterConfig(min_tokens=tokens + 1, drop_ngram_loops=False)) == "too_few_tokens"
    assert reason_to_drop(row, FilterConfig(max_tokens=tokens - 1, drop_ngram_loops=False)) == "too_many_tokens"


# --- real rows -----------------------------------------------------------------------------------------------------------------


def taken_from(path, config: FilterConfig) -> tuple[int, Counter]:
    total, taken = 0, Counter()
    for _, raw in read_rows(path):
        try:
            messages, questions = parse_row(raw, detect_format(raw) or "")
        except (RowError, KeyError):
            continue
        total += 1
        reason = reason_to_drop(Conversation("", "d", "", "", messages, questions, "", 1), config)
        taken.update([reason] if reason else [])
    return total, taken


@pytest.mark.parametrize(
    ("name", "rows", "expected"),
    [
        ("slimorca", 300, {}),
        ("magicoder_evol_instruct", 66, {"refusal": 1, "self_reference": 1}),  # "As an AI text-based model, I'm unable to …"
        ("magicoder_oss_instruct", 34, {}),
        ("metamathqa", 100, {}),
    ],
)
def test_the_published_rows_lose_two_that_speak_of_themselves(shared_data, name, rows, expected):
    """Every check is on; each removed row was read."""
    assert taken_from(shared_data / "data" / "instructions" / f"{name}.jsonl", ALL_ON) == (rows, expected)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("alpaca_en_demo.json", {"refusal": 9, "self_reference": 19, "unclosed_code": 1, "truncated": 1}),
        ("code_alpaca_2k.json", {"ngram_loop": 1}),
        ("new_codealpaca.json", {"bad_encoding": 1}),
        ("glaive_toolcall_en_demo.json", {"refusal": 43, "broken_python": 6, "unclosed_code": 1}),  # bookings it has no tool for
        ("v1_sft_demo.jsonl", {"refusal": 5, "self_reference": 10, "unclosed_code": 1}),
    ],
)
def test_other_real_sets_lose_what_was_read_and_no_more(shared_data, name, expected):
    """Each removed row was read and is what its reason says, but one: a page of equal table cells counts as a loop."""
    _, taken = taken_from(shared_data / "data" / "instructions_extra" / name, ALL_ON)
    assert taken == expected
