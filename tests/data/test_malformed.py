"""Malformed rows: whatever a row is, it becomes a conversation or a reason, and none gets lost on the way.

One seeded generator damages good rows of every format and writes them to files of every kind; hypothesis looks for shapes that
nobody thought of.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pesc.data.conversation import BadRow, Conversation, RowError, conversation_id, parse_row
from pesc.data.formats import PARSERS
from pesc.data.rows import ROW_SUFFIXES, find_row_files
from pesc.data.shards import plan_shards, read_shard
from pesc.data.turns import check_turns

TURNS = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]
CALL = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}]}
GOOD: tuple[dict[str, Any], ...] = (
    {"conversations": [{"from": "human", "value": "Why?", "weight": 0.0}, {"from": "gpt", "value": "Because.", "weight": 1.0}]},
    {"messages": [TURNS[0], CALL, {"role": "tool", "content": "sun"}, {"role": "assistant", "content": "Sunny."}], "tools": "[]"},
    {"prompt": TURNS[:1], "completion": TURNS[1:]},
    {"prompt": "Why?", "completion": "Because."},
    {"instruction": "Be brief.", "conversation": [{"input": "Why?", "output": "Because."}]},
    {"instruction": "Add.", "input": "1 2", "output": "3", "system": "Be brief.", "history": [["Why?", "Because."]]},
    {"query": "Why?", "response": "Because.", "type": "GSM_SV", "original_question": "Why?"},
    {"lang": "py", "problem": "Why?", "solution": "Because.", "seed": "x", "index": 1, "raw_index": 2, "openai_fingerprint": "fp"},
    {"instruction": "Why?", "response": "Because."},
    {"question": "Where?", "choices": ["here", "there"], "answer": 1},
    {"question": "Where?", "options": "A. here\nB. there", "answer": "A"},
    {"passage": "Two red.", "question": "How many?", "answer": ["2"]},
)
NASTY: tuple[Any, ...] = (
    None, True, 0, -1, 10**400, 1e308, float("nan"), float("-inf"), "", "   ", "\0", "a\0b", "\ud800", "\udfff\ud800", "\ufeff", "\u202e",
    [], {}, [[]], [None], [{}], {"a": {"b": []}}, {"role": []}, {"from": {}}, "x" * 5000, "[" * 300, "{" * 300, "é" * 100, ["a", 1],
    [{"type": "image"}], [{"type": ["text"], "text": "a"}], [{"from": "human"}], [{"role": "user", "content": {"a": 1}}], [[1, 2], [3]],
)  # fmt: skip
RAW = (
    b"", b"   ", b"null", b"{", b"}", b"[", b"]", b'"', b'{"a": "', b'{"query": "a", "response": "b"', b"\xff\xfe\x00", b"\x00" * 40,
    b"\xef\xbb\xbf{}", b'{"query": "\xe9", "response": "b"}', b"[" * 2000, b'{"a":' * 600 + b"1" + b"}" * 600, b"9" * 6000, b"NaN",
    b'{"query": "a", "query": "b"}', b"'single': 1", b'{"query": "a",}', b"\\", b'\\"', b"\xed\xa0\x80", b"{} {}", b"# comment",
)  # fmt: skip


def damage(draw: random.Random, value: Any) -> Any:
    """A copy of a value with something wrong in it, somewhere; now and then with nothing wrong."""
    if draw.random() < 0.25 or not isinstance(value, dict | list) or not value:
        return draw.choice(NASTY)
    if isinstance(value, list):
        place = draw.randrange(len(value))
        damaged = [damage(draw, item) if index == place else item for index, item in enumerate(value)]
        return draw.choice([damaged, value[:place], value + value, value[::-1], [*value, draw.choice(NASTY)]])
    name = draw.choice(list(value))
    rest = {key: item for key, item in value.items() if key != name}
    return draw.choice(
        [rest, value, {**value, name: damage(draw, value[name])}, {**rest, name.upper(): value[name]}, {**value, "x": draw.choice(NASTY)}]
    )


def lines_of(draw: random.Random, count: int) -> list[bytes]:
    """JSON of damaged rows, or bytes that are no JSON; one row each."""
    found = []
    for _ in range(count):
        text = json.dumps(damage(draw, draw.choice(GOOD)), ensure_ascii=draw.random() < 0.5).encode("utf-8", "surrogatepass")
        found.append(draw.choice(RAW) if draw.random() < 0.1 else text)
    return found


def write_lines(path: Path, draw: random.Random, count: int, pack: Callable[[bytes], bytes] = bytes) -> int:
    """Rows, one a line.  Returns how many lines are not blank."""
    lines = lines_of(draw, count)
    path.write_bytes(pack(b"\n".join(lines)))
    return sum(1 for line in lines if line.strip(b" \t\r"))


def write_array(path: Path, draw: random.Random, count: int) -> int:
    """Rows of an array; bytes that open what they do not close would swallow their neighbours, so only JSON is written."""
    rows = [json.dumps(damage(draw, draw.choice(GOOD))) for _ in range(count)]
    path.write_text("[" + ",\n".join(rows) + "]")
    return count


def write_csv(path: Path, draw: random.Random, count: int) -> int:
    with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as stream:
        writer = csv.writer(stream)
        writer.writerow(["query", "response"])
        for _ in range(count):
            cells = [draw.choice(["Why?", "", "\0", "a\nb", '"', "\udcff", "é", " "]) for _ in range(draw.choice([1, 2, 2, 2, 3]))]
            writer.writerow(cells)
    return count


def write_table(path: Path, draw: random.Random, count: int) -> int:
    """Rows of all formats in one table: each has the columns of all, most of them null."""
    rows: list[dict[str, Any]] = []
    for _ in range(count):
        row = {name: value for name, value in draw.choice(GOOD).items() if name not in ("answer", "prompt", "completion", "history")}
        row = {name: draw.choice([value, value, None]) for name, value in row.items()}
        if draw.random() < 0.2:
            row["response"] = draw.choice(["", "\0", "é", " ", "x" * 5000])
        rows.append(row)
    table = pa.Table.from_pylist(rows, schema=pa.unify_schemas([pa.Table.from_pylist([{**row}]).schema for row in GOOD_TABLE]))
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=97)
    else:
        with pa.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=97)
    return count


GOOD_TABLE = [{name: value for name, value in row.items() if name not in ("answer", "prompt", "completion", "history")} for row in GOOD]


def as_conversation(row: Any, file: str, number: int) -> Conversation | str:
    """The conversation of a row, or the reason why it is none; nothing else may come out of it."""
    try:
        messages, questions = parse_row(row)
    except RowError as error:
        return str(error)
    check_turns(messages, "messages")
    return Conversation(conversation_id("fuzz", messages), "fuzz", "general", "", messages, questions, file, number)


def read_all(root: Path, target: int) -> dict[tuple[str, int], Conversation | str]:
    found: dict[tuple[str, int], Conversation | str] = {}
    for shard in plan_shards(root, find_row_files(root, ("**",), ROW_SUFFIXES, "Data set 'fuzz'"), target):
        for number, row in read_shard(shard):
            assert (shard.file, number) not in found, "a row is read once"
            found[shard.file, number] = as_conversation(row, shard.file, number)
    return found


def test_ten_thousand_malformed_rows_are_all_accounted_for(tmp_path):
    draw, start = random.Random(20), time.perf_counter()
    written = {
        "a.jsonl": write_lines(tmp_path / "a.jsonl", draw, 3000),
        "b.jsonl": write_lines(tmp_path / "b.jsonl", draw, 1000, lambda data: b"\xef\xbb\xbf" + data),
        "c.jsonl.gz": write_lines(tmp_path / "c.jsonl.gz", draw, 500, gzip.compress),
        "d.jsonl.bz2": write_lines(tmp_path / "d.jsonl.bz2", draw, 500, bz2.compress),
        "e.jsonl.xz": write_lines(tmp_path / "e.jsonl.xz", draw, 500, lambda data: lzma.compress(data, preset=0)),
        "f.ndjson.zst": write_lines(tmp_path / "f.ndjson.zst", draw, 500, lambda data: pa.compress(data, "zstd", asbytes=True)),
        "g.json": write_array(tmp_path / "g.json", draw, 2000),
        "h.csv": write_csv(tmp_path / "h.csv", draw, 1000),
        "i.parquet": write_table(tmp_path / "i.parquet", draw, 500),
        "j.arrow": write_table(tmp_path / "j.arrow", draw, 500),
    }
    found = read_all(tmp_path, 1 << 16)
    assert Counter(file for file, _ in found) == written
    assert len(found) > 9500
    reasons = [outcome for outcome in found.values() if isinstance(outcome, str)]
    kept = [outcome for outcome in found.values() if isinstance(outcome, Conversation)]
    assert len(reasons) > 4000
    assert len(kept) > 1000
    assert all(0 < len(reason) < 600 and reason.startswith("field ") for reason in reasons)
    for outcome in kept:
        text = "".join(message.content for message in outcome.messages)
        assert text.encode("utf-8").decode() == text
        assert "\0" not in text
    assert read_all(tmp_path, 1 << 30) == found, "what a row becomes does not depend on how the files are cut"
    assert time.perf_counter() - start < 20


def test_a_truncated_archive_of_junk_is_read_up_to_its_break(tmp_path):
    lines = lines_of(random.Random(4), 2000)
    whole = gzip.compress(b"\n".join(lines))
    (tmp_path / "a.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    found = read_all(tmp_path, 1 << 20)
    *before, last = found.values()
    assert "breaks off" in last
    assert not any(isinstance(outcome, str) and "breaks off" in outcome for outcome in before)
    numbers = [number for number, line in enumerate(lines, start=1) if line.strip(b" \t\r")]
    assert [number for _, number in found][:-1] == numbers[: len(found) - 1]


def test_each_good_row_is_a_conversation_in_its_own_format_whatever_stands_around_it():
    """Mixed schemas: the format of a row is that of its own fields."""
    assert {type(as_conversation(row, "f", 1)) for row in GOOD} == {Conversation}
    empty = dict.fromkeys(name for row in GOOD for name in row)
    for row in GOOD:
        assert parse_row({**empty, **row}) == parse_row(row), "columns of other rows, null in this one, change nothing"


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["user", "assistant", "tool", "text", "\0", "\ud800"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["role", "content", "from", "value", "type", "text", "label", "input", "output", "tool_calls", "function", "name", "arguments"]),
        inner, max_size=3,
    ),
    max_leaves=8,
)  # fmt: skip
FIELDS = sorted({name for row in GOOD for name in row} | {"context", "choices", "answerKey", "system", "system_prompt", "text"})


@settings(max_examples=600, deadline=None)
@given(st.dictionaries(st.sampled_from(FIELDS), ANYTHING, max_size=4) | ANYTHING, st.sampled_from(["auto", *PARSERS]))
def test_no_shape_escapes(row, row_format):
    try:
        parsed = parse_row(row, row_format)
    except RowError:
        return
    check_turns(parsed.messages, "messages")
    assert parsed.questions


@settings(max_examples=600, deadline=None)
@given(st.sampled_from(GOOD), st.randoms(use_true_random=False))
def test_no_damage_of_a_good_row_escapes(row, draw):
    outcome = as_conversation(damage(draw, damage(draw, row)), "f", 1)
    assert isinstance(outcome, Conversation | str)


@pytest.mark.parametrize("row", [BadRow("is not valid JSON"), None, 3, "text", ["a"], {}, {"text": "once upon a time"}])
def test_what_is_no_row_says_so(row):
    with pytest.raises(RowError, match=r"not valid JSON|not a map of fields|no known format|plain text without an answer"):
        parse_row(row)
