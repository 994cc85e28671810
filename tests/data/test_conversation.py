"""Rows of every format become the one schema, or say which field is wrong."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from pesc.data.conversation import BadRow, Message, RowError, conversation_id, detect_format, parse_row
from pesc.data.rows import read_rows

USER, ANSWER, SYSTEM = Message("user", "Why?"), Message("assistant", "Because."), Message("system", "Be brief.")

_TURNS = ({"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."})


@pytest.mark.parametrize(
    ("row", "row_format", "messages"),
    [
        (
            {
                "conversations": [
                    {"from": "system", "value": "Be brief.", "weight": None},
                    {"from": "human", "value": "Why?", "weight": 0.0},
                    {"from": "gpt", "value": "Because.", "weight": 1.0},
                ]
            },
            "sharegpt",
            (SYSTEM, USER, ANSWER),
        ),
        ({"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]}, "messages", (USER, ANSWER)),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "Why?"}]},
                    {"role": "assistant", "content": [{"type": "text", "value": "Because."}]},
                ]
            },
            "messages",
            (USER, ANSWER),
        ),
        (
            {
                "instruction": "Be brief.",
                "conversation": [{"input": "Why?", "output": "Because."}, {"input": "Why?", "output": "Because."}],
            },
            "pesc",
            (SYSTEM, USER, ANSWER, USER, ANSWER),
        ),
        ({"instruction": "", "conversation": [{"input": "Why?", "output": "Because."}]}, "pesc", (USER, ANSWER)),
        ({"instruction": "Add.", "input": "1 2", "output": "3"}, "alpaca", (Message("user", "Add.\n\n1 2"), Message("assistant", "3"))),
        ({"instruction": "Why?", "input": "", "output": "Because."}, "alpaca", (USER, ANSWER)),
        ({"query": "Why?", "response": "Because.\r\n", "type": "GSM_SV"}, "query_response", (USER, ANSWER)),
        ({"lang": "py", "problem": "Why?", "solution": "Because."}, "problem_solution", (USER, ANSWER)),
        ({"instruction": "Why?", "response": "Because."}, "instruction_response", (USER, ANSWER)),
        (
            {"question": "Where?", "options": "\nA. here\nB. there", "answer": "B. there"},
            "multiple_choice",
            (Message("user", "Where?\nA. here\nB. there"), Message("assistant", "B. there")),
        ),
        (
            {"question": "Where?", "choices": ["here", "there"], "answer": 1},
            "multiple_choice",
            (Message("user", "Where?\nA. here\nB. there"), Message("assistant", "B. there")),
        ),
        (
            {"question": "Where?", "choices": {"text": ["here", "there"], "label": ["1", "2"]}, "answerKey": "2"},
            "multiple_choice",
            (Message("user", "Where?\n1. here\n2. there"), Message("assistant", "2. there")),
        ),
        (
            {"passage": "Two red, one green.", "question": "How many?", "answer": "3"},
            "question_answer",
            (Message("user", "Two red, one green.\nHow many?"), Message("assistant", "3")),
        ),
        ({"question": "Why?", "answer": ["Because.", "Since."]}, "question_answer", (USER, ANSWER)),
        (
            {"id": "niv.1", "system_prompt": "Be brief.", "question": "Why?", "response": "Because."},
            "question_answer",
            (SYSTEM, USER, ANSWER),
        ),
        ({"prompt": "Why?", "completion": "Because."}, "prompt_completion", (USER, ANSWER)),
        ({"prompt": "Why?", "response": "Because."}, "prompt_completion", (USER, ANSWER)),
        (
            {
                "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}],
                "completion": [{"role": "assistant", "content": "Because."}],
            },
            "prompt_completion",
            (SYSTEM, USER, ANSWER),
        ),
        (
            {"instruction": "Why?", "input": "", "output": "Because.", "system": "Be brief.", "history": [["Why?", "Because."]]},
            "alpaca",
            (SYSTEM, USER, ANSWER, USER, ANSWER),
        ),
        ({"query": "Why?", "response": "Because.", "history": [], "system": None}, "query_response", (USER, ANSWER)),
        (
            {"instruction": "Sum up.", "context": "A text.", "response": "Short.", "category": "summarization"},
            "instruction_response",
            (Message("user", "Sum up.\n\nA text."), Message("assistant", "Short.")),
        ),
        ({"conversations": [{"from": "Human", "value": "Why?"}, {"from": "GPT", "value": "Because."}]}, "sharegpt", (USER, ANSWER)),
        ({"messages": [{"role": "developer", "content": "Be brief."}, *_TURNS]}, "messages", (SYSTEM, USER, ANSWER)),
        ({"system": "Be brief.", "messages": [{"role": "system", "content": "Be brief."}, *_TURNS]}, "messages", (SYSTEM, USER, ANSWER)),
    ],
)
def test_a_row_of_each_format_is_detected_and_parsed(row, row_format, messages):
    assert detect_format(row) == row_format
    assert parse_row(row, row_format).messages == messages
    assert parse_row(row).messages == messages


def test_the_question_of_multiple_choice_is_bare():
    row = {"question": "Where?", "options": "A. here\nB. there", "answer": "A. here"}
    assert parse_row(row, "multiple_choice").questions == ("Where?",)


def test_tools_are_not_lost():
    turns = [
        {"from": "human", "value": "Weather?"},
        {"from": "function_call", "value": "{}"},
        {"from": "observation", "value": "sun"},
        {"from": "gpt", "value": "Sunny."},
    ]
    messages = parse_row({"conversations": turns, "tools": '[{"name": "weather"}]'}, "sharegpt").messages
    assert [message.role for message in messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert messages[0].content == 'Tools:\n[{"name": "weather"}]'


def test_tool_calls_without_content_are_turns_of_the_assistant():
    """As OpenAI's chat API has them: null content, arguments as a JSON text, two calls at once and their two results."""
    calls = [
        {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Wien",  "days": 1.0}'}},
        {"id": "2", "type": "function", "function": {"name": "time", "arguments": {"city": "Wien"}}},
    ]
    turns = [
        {"role": "user", "content": "Weather and time?"},
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "tool_call_id": "1", "content": "sun"},
        {"role": "tool", "tool_call_id": "2", "content": [{"type": "text", "text": "noon"}]},
        {"role": "assistant", "content": "Sunny at noon.", "tool_calls": None},
    ]
    parsed = parse_row({"messages": turns, "tools": [{"type": "function", "function": {"name": "weather"}}]})
    assert parsed.messages == (
        Message("system", 'Tools:\n[{"function": {"name": "weather"}, "type": "function"}]'),
        Message("user", "Weather and time?"),
        Message(
            "assistant",
            '{"name": "weather", "arguments": {"city": "Wien",  "days": 1.0}}\n{"name": "time", "arguments": {"city": "Wien"}}',
        ),
        Message("tool", "sun\nnoon"),
        Message("assistant", "Sunny at noon."),
    )
    assert parsed.questions == ("Weather and time?",)


def test_a_call_behind_a_text_and_the_older_function_call_are_kept():
    turns = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "I look.", "function_call": {"name": "weather", "arguments": "not json"}},
        {"role": "function", "name": "weather", "content": "sun"},
        {"role": "assistant", "content": "Sunny."},
    ]
    assert parse_row({"messages": turns}).messages[1].content == 'I look.\n{"name": "weather", "arguments": "not json"}'


def test_a_row_without_tools_has_no_list_of_them():
    assert parse_row({"messages": list(_TURNS), "tools": "[]"}).messages == (USER, ANSWER)


@pytest.mark.parametrize(
    ("row", "row_format"),
    [
        ({"messages": None, "query": "Why?", "response": "Because."}, "query_response"),
        ({"query": None, "response": "Because.", "instruction": "Why?"}, "instruction_response"),
        ({"question": "Why?", "choices": None, "answer": "Because."}, "question_answer"),
    ],
)
def test_columns_that_are_null_say_nothing_of_the_format(row, row_format):
    """Tables that hold sets of several schemas have the columns of all in each row."""
    assert detect_format(row) == row_format
    assert parse_row(row).messages == (USER, ANSWER)


@pytest.mark.parametrize(
    ("row", "row_format", "says"),
    [
        ({"query": "a"}, "query_response", "'response' is missing"),
        ({"query": "a", "response": "  "}, "query_response", "'response' is empty"),
        ({"query": "a", "response": 7}, "query_response", "'response' is a int, not a text"),
        ({"query": "a", "response": "\ud800"}, "query_response", "lone surrogate"),
        ({"question": "a?", "options": "A. x\nB. y"}, "multiple_choice", "'answer' is missing"),
        ({"question": "a?", "options": "A. x\nB. y", "answer": "C. z"}, "multiple_choice", "not one of the options"),
        ({"question": "a?", "options": "x", "answer": "x"}, "multiple_choice", "fewer than two options"),
        ({"conversations": []}, "sharegpt", "has no turns"),
        ({"conversations": [{"from": "gpt", "value": "x"}]}, "sharegpt", "begins with a turn of the assistant"),
        ({"conversations": [{"from": "human", "value": "x"}]}, "sharegpt", "ends with a turn of the user"),
        ({"conversations": [{"from": "alien", "value": "x"}]}, "sharegpt", "unknown role 'alien'"),
        (
            {"messages": [{"role": role, "content": "x"} for role in ("user", "assistant", "assistant")]},
            "messages",
            "two turns of the assistant in a row",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages", "part of type 'image'"),
        (["a"], "messages", "not a map of fields"),
        ({"text": "Once upon a time."}, "auto", "field 'text' is a plain text without an answer"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "auto", r"the fields of no known format \(chosen, prompt, rejected\)"),
        ({"query": "a", "response": None}, "auto", "'response' is empty"),
        ({"query": "a\0b", "response": "c"}, "auto", "'query' holds a NUL character"),
        ({"query": "a", "response": ["b", "c"]}, "auto", "'response' is a list, not a text"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "auto", "unknown role"),
        ({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": None}]}, "auto", r"'messages\[1\]' is empty"),
        ({"messages": [_TURNS[0], {"role": "assistant", "tool_calls": [{"id": "1"}]}]}, "auto", "without the name of a function"),
        ({"instruction": "a", "output": "b", "history": [["x"]]}, "auto", "'history' holds something else than a pair"),
        (BadRow("is not valid JSON"), "auto", "is not valid JSON"),
    ],
)
def test_a_row_that_is_no_conversation_names_the_field(row, row_format, says):
    with pytest.raises(RowError, match=says):
        parse_row(row, row_format)


def test_an_id_depends_on_the_data_set_and_the_turns_alone():
    ids = {conversation_id("a", (USER, ANSWER)), conversation_id("b", (USER, ANSWER)), conversation_id("a", (ANSWER, USER))}
    assert len(ids) == 3
    assert conversation_id("a", (USER, ANSWER)) == conversation_id("a", (Message("user", "Why?"), Message("assistant", "Because.")))


def test_an_unknown_row_has_no_format():
    assert detect_format({"text": "once"}) is None
    assert detect_format(BadRow("x")) is None


def test_the_published_sample_and_its_hub_schemas_give_the_same_conversations(shared_data):
    """500 real rows in the reference code's format, and the same rows in the schemas of the four hub sets."""
    folder = shared_data / "data" / "instructions"
    original = Counter(parse_row(row, "pesc").messages for _, row in read_rows(folder / "pesc_example_500.json"))
    formats = {
        "slimorca": "sharegpt",
        "magicoder_evol_instruct": "instruction_response",
        "magicoder_oss_instruct": "problem_solution",
        "metamathqa": "query_response",
    }
    recast = Counter()
    for name, row_format in formats.items():
        for _, row in read_rows(folder / f"{name}.jsonl"):
            assert detect_format(row) == row_format
            recast[parse_row(row, row_format).messages] += 1
    assert original.total() == 500
    assert original == recast


@pytest.mark.parametrize(
    ("name", "rows", "multi_turn"),
    [
        ("alpaca_en_demo.json", 999, 0),
        ("glaive_toolcall_en_demo.json", 300, 250),
        ("v1_sft_demo.jsonl", 500, 0),
        ("code_alpaca_2k.json", 2017, 0),
    ],
)
def test_real_files_of_other_projects_parse(shared_data, name, rows, multi_turn):
    parsed = []
    problems = []
    for _, row in read_rows(shared_data / "data" / "instructions_extra" / name):
        try:
            parsed.append(parse_row(row, detect_format(row)).messages)
        except RowError as error:
            problems.append(str(error))
    assert len(parsed) + len(problems) == rows
    assert len(problems) <= rows // 100, problems[:3]
    assert sum(len(messages) > 3 for messages in parsed) >= multi_turn
    assert json.dumps(parsed)
