"""Rows out of every kind of file, and functions out of Python sources."""

from __future__ import annotations

import ast
import csv
import gzip
import heapq
import json
import statistics
import textwrap
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pesc.data.conversation import BadRow
from pesc.data.functions import is_test_file
from pesc.data.rows import ROW_SUFFIXES, find_row_files, read_rows
from pesc.errors import DataError

ROWS = [{"query": "1+1 =\n?", "response": "2"}, {"query": "ü", "response": "„ja“"}]


def write(path: Path, kind: str) -> Path:
    lines = "\n".join(json.dumps(row) for row in ROWS) + "\n"
    if kind == "jsonl":
        path.write_text(lines, encoding="utf-8-sig")
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress(lines.encode()))
    elif kind == "json":
        path.write_text(json.dumps(ROWS, indent=2))
    elif kind == "lines.json":
        path.write_text(lines)
    elif kind == "csv":
        with path.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, ["query", "response"])
            writer.writeheader()
            writer.writerows(ROWS)
    else:
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "json", "lines.json", "csv", "parquet"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path, kind):
    assert list(read_rows(write(tmp_path / f"rows.{kind}", kind))) == [(1, ROWS[0]), (2, ROWS[1])]


def test_a_broken_line_is_one_bad_row_with_its_line_number(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n\n{"a": \n{"a": 2}\n')
    rows = dict(read_rows(path))
    assert list(rows) == [1, 3, 4]
    assert isinstance(rows[3], BadRow)
    assert "not valid JSON" in rows[3].reason


def test_a_short_csv_row_is_bad(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("query,response\na,b\nc\n")
    assert isinstance(dict(read_rows(path))[2], BadRow)


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.json", b"[1, 2"), ("a.json", b'"text"'), ("a.parquet", b"PAR?"), ("a.jsonl.gz", b"no gzip"), ("a.jsonl", b"\xff\xfe\x00{")],
)
def test_a_file_broken_as_a_whole_names_itself(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=name):
        list(read_rows(tmp_path / name))


def test_files_of_other_kinds_are_passed_over_but_an_empty_choice_is_an_error(tmp_path):
    for name in ("README.md", "data/a.jsonl", "data/b.parquet"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    assert find_row_files(tmp_path, ("**",), ROW_SUFFIXES, "Data set 'x'") == ["data/a.jsonl", "data/b.parquet"]
    with pytest.raises(DataError, match=r"'\*\.md' selects no row files"):
        find_row_files(tmp_path, ("*.md",), ROW_SUFFIXES, "Data set 'x'")
    with pytest.raises(DataError, match=r"no file that matches"):
        find_row_files(tmp_path, ("*.csv",), ROW_SUFFIXES, "Data set 'x'")


SOURCE = '''
import os

@decorate
def area(width: float, height: float = 1.0) -> float:
    """Area of a rectangle, in the square of the unit of its sides.

    Examples
    --------
    >>> area(2, 3)
    6
    """

    # a comment stays
    return width * height

def short():
    """Too short."""
    return 1

def _private():
    """A docstring that is certainly long enough to be taken as an instruction."""
    return 1

def abstract(x):
    """A docstring that is certainly long enough to be taken as an instruction."""
    raise NotImplementedError("later")

class Shape:
    def area(self):
        """A docstring that is certainly long enough to be taken as an instruction."""
        return 1
'''


def test_a_documented_function_becomes_an_instruction_and_its_source(tmp_path):
    (tmp_path / "m.py").write_text(SOURCE)
    ((line, row),) = read_rows(tmp_path / "m.py")
    assert line == 5
    assert row["instruction"] == (
        "Write the Python function `def area(width: float, height: float=1.0) -> float`.\n\n"
        "Area of a rectangle, in the square of the unit of its sides."
    )
    assert row["response"] == (
        "```python\n@decorate\ndef area(width: float, height: float = 1.0) -> float:\n    # a comment stays\n    return width * height\n```"
    )


@pytest.mark.parametrize("module", [textwrap, heapq, statistics])
def test_functions_of_the_standard_library_stay_what_they_are(module):
    """Each answer parses, and is the original function but for its docstring."""
    originals = {node.name: node for node in ast.parse(Path(module.__file__).read_text()).body if isinstance(node, ast.FunctionDef)}
    rows = [row for _, row in read_rows(Path(module.__file__))]
    assert len(rows) >= 2
    for row in rows:
        (answer,) = ast.parse(row["response"].removeprefix("```python\n").removesuffix("\n```")).body
        original = originals[row["name"]]
        original.body = original.body[1:]
        assert ast.dump(answer) == ast.dump(original)


def test_a_source_that_does_not_parse_is_one_bad_row(tmp_path):
    (tmp_path / "old.py").write_text("print 'python 2'\n")
    ((_, row),) = read_rows(tmp_path / "old.py")
    assert isinstance(row, BadRow)


@pytest.mark.parametrize(("path", "expected"), [("a/tests/x.py", True), ("test_x.py", True), ("a/contest.py", False), ("a/x.py", False)])
def test_test_files_are_recognised(path, expected):
    assert is_test_file(path) is expected
