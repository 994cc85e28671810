"""Rows out of every kind of file, and functions out of Python sources."""

from __future__ import annotations

import ast
import bz2
import csv
import gzip
import heapq
import io
import json
import lzma
import random
import statistics
import struct
import textwrap
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import feather

from pesc.data import streams
from pesc.data.conversation import BadRow
from pesc.data.functions import is_test_file
from pesc.data.rows import ROW_SUFFIXES, find_row_files, read_rows
from pesc.errors import DataError

ROWS = [{"query": "1+1 =\n?", "response": "2"}, {"query": "ü", "response": "„ja“"}]


PLAIN_KINDS = ("jsonl", "ndjson", "json", "lines.json", "objects.json", "csv", "tsv")
PACKED = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lambda data: lzma.compress(data, preset=0),
    ".zst": lambda data: pa.compress(data, "zstd", asbytes=True),
}


def plain_bytes(kind: str, rows: list[dict[str, str]]) -> bytes:
    lines = "\n".join(json.dumps(row) for row in rows) + "\n"
    if kind in ("jsonl", "ndjson", "lines.json"):
        return lines.encode("utf-8-sig")
    if kind == "json":
        return json.dumps(rows, indent=2).encode()
    if kind == "objects.json":
        return "".join(json.dumps(row, indent=1) for row in rows).encode()
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, list(rows[0]), delimiter="\t" if kind == "tsv" else ",")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue().encode()


@pytest.mark.parametrize("packed", ["", *PACKED])
@pytest.mark.parametrize("kind", PLAIN_KINDS)
def test_every_kind_of_text_gives_the_same_rows(tmp_path, kind, packed):
    path = tmp_path / f"rows.{kind}{packed}"
    path.write_bytes(PACKED.get(packed, bytes)(plain_bytes(kind, ROWS)))
    assert path.name.endswith(ROW_SUFFIXES)
    assert list(read_rows(path)) == [(1, ROWS[0]), (2, ROWS[1])]


@pytest.mark.parametrize("kind", ["parquet", "arrow", "feather"])
def test_every_kind_of_table_gives_the_same_rows(tmp_path, kind):
    path, table = tmp_path / f"rows.{kind}", pa.Table.from_pylist(ROWS)
    if kind == "parquet":
        pq.write_table(table, path)
    elif kind == "feather":
        feather.write_feather(table, path)
    else:
        with pa.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table)
    assert list(read_rows(path)) == [(1, ROWS[0]), (2, ROWS[1])]


def test_a_data_set_saved_by_datasets_is_read_without_its_bookkeeping(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    (file,) = find_row_files(tmp_path, ("**",), ROW_SUFFIXES, "Data set 'x'")
    assert [row for _, row in read_rows(tmp_path / file)] == ROWS


def test_a_broken_line_is_one_bad_row_with_its_line_number(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n\n{"a": \n{"a": 2}\n')
    rows = dict(read_rows(path))
    assert list(rows) == [1, 3, 4]
    assert isinstance(rows[3], BadRow)
    assert "not valid JSON" in rows[3].reason


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (b'{"a": "\xe4\xf6"}', "is not valid UTF-8 (byte 0xe4 at position 7)"),
        (b'{"a": "\0"}', "is not valid JSON"),
        (b"[" * 100_000 + b"]" * 100_000, "is nested more than 200 deep"),
        (b'{"a":' * 201 + b"1" + b"}" * 201, "is nested more than 200 deep"),
        (b"1" * 5000, "is not valid JSON"),
        (b'{"a": 1}{"a": 2}', "is not valid JSON (Extra data"),
        (b'{"a": 01}', "is not valid JSON"),
    ],
)
@pytest.mark.parametrize("layout", ["lines", "array"])
def test_one_broken_row_hides_no_other(tmp_path, bad, says, layout):
    rows = [b'{"a": 1}', bad, b'{"a": "\\\\"}', b'{"a": NaN, "b": [1e999, -0.0]}']
    path = tmp_path / ("rows.jsonl" if layout == "lines" else "rows.json")
    path.write_bytes(b"\n".join(rows) if layout == "lines" else b"[" + b",\n".join(rows) + b"]")
    (_, first), (number, broken), (_, third), (_, fourth) = read_rows(path)
    assert (first, number, third) == ({"a": 1}, 2, {"a": "\\"})
    assert fourth["b"] == [float("inf"), 0.0]
    assert isinstance(broken, BadRow)
    assert says in broken.reason


def test_brackets_inside_of_texts_are_no_nesting(tmp_path):
    row = {"a": "[{" * 5000 + '"', "b": [[1]] * 500}
    (tmp_path / "a.json").write_text(json.dumps([row]))
    assert [row for _, row in read_rows(tmp_path / "a.json")] == [row]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_a_row_without_an_end_does_not_fill_the_memory(tmp_path, name, monkeypatch):
    """A limit of 1 MiB stands for the real one: the row is refused, the memory stays, the rows around it are read."""
    monkeypatch.setattr(streams, "MAX_ROW_BYTES", 1 << 20)
    rows = [{"query": "a", "response": "b"}, {"query": "a", "response": "x" * (40 << 20)}, {"query": "c", "response": "d"}]
    (tmp_path / name).write_bytes(plain_bytes(name[2:], rows))
    tracemalloc.start()
    (_, first), (number, long), (_, last) = read_rows(tmp_path / name)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (first, number, last) == (rows[0], 2, rows[2])
    assert isinstance(long, BadRow)
    assert "longer than" in long.reason
    assert peak < 16 << 20


def test_ten_megabytes_in_one_text_are_a_row(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"query": "q", "response": "r" * 10_000_000}) + "\n")
    ((_, row),) = read_rows(tmp_path / "a.jsonl")
    assert len(row["response"]) == 10_000_000


def test_a_large_array_is_read_as_a_stream(tmp_path):
    """40 MB of rows need the memory of some blocks, not of the rows."""
    (tmp_path / "a.json").write_text("[" + ",".join([json.dumps({"query": "q" * 400, "response": "r" * 600})] * 40_000) + "]")
    tracemalloc.start()
    assert sum(1 for _ in read_rows(tmp_path / "a.json")) == 40_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 << 20


@pytest.mark.parametrize("packed", list(PACKED))
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_a_truncated_archive_keeps_the_rows_before_the_break(tmp_path, kind, packed):
    draw = random.Random(3)
    rows = [{"query": str(i), "response": f"{draw.getrandbits(4000):x}"} for i in range(3000)]
    data = PACKED[packed](plain_bytes(kind, rows))
    path = tmp_path / f"a.{kind}{packed}"
    path.write_bytes(data[: len(data) * 3 // 4])
    *good, (number, bad) = read_rows(path)
    assert [row for _, row in good] == rows[: len(good)]
    assert len(good) > (0 if packed == ".bz2" else 1000), "a block of bzip2 holds 900 kB, and is lost as a whole"
    assert number == len(good) + 1
    assert isinstance(bad, BadRow)
    assert "breaks off: the compressed data is damaged or cut off" in bad.reason


@pytest.mark.parametrize(
    "content", [b'[{"a": 1}, {"a": 2}', b'[{"a": 1}, {"a": 2},', b'[{"a": 1}, {"a"', b'[{"a": 1}, {"a": 2}] {}', b"[1, 2"]
)
def test_an_array_that_does_not_end_right_is_one_bad_row_at_its_end(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    rows = [row for _, row in read_rows(tmp_path / "a.json")]
    assert [isinstance(row, BadRow) for row in rows] == [False] * (len(rows) - 1) + [True]
    assert len(rows) in (2, 3)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32", "utf-8-sig"])
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_byte_order_marks_are_understood(tmp_path, encoding, kind):
    mark = "\ufeff" if encoding == "utf-16-be" else ""
    (tmp_path / f"a.{kind}").write_bytes((mark + plain_bytes(kind, ROWS).decode("utf-8-sig")).encode(encoding))
    assert [row for _, row in read_rows(tmp_path / f"a.{kind}")] == ROWS


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b"c", "has 1 cells, but the header has 2 columns"),
        (b"c,d,e", "has 3 cells"),
        (b"c,\xff", "is not valid UTF-8"),
        (b'"c"x,d', "is not valid CSV"),
    ],
)
def test_a_broken_csv_row_hides_no_other(tmp_path, line, says):
    (tmp_path / "a.csv").write_bytes(b'query,response\r\na,"b\nb"\r\n' + line + b"\r\n\r\ne,f")
    (_, first), (number, bad), (_, last) = read_rows(tmp_path / "a.csv")
    assert (first, number, last) == ({"query": "a", "response": "b\nb"}, 2, {"query": "e", "response": "f"})
    assert isinstance(bad, BadRow)
    assert says in bad.reason


def test_csv_with_the_line_ends_of_old_macs(tmp_path):
    (tmp_path / "a.csv").write_bytes(b'query,response\ra,"b\rb"\rc,d\r')
    assert [row["response"] for _, row in read_rows(tmp_path / "a.csv")] == ["b\rb", "d"]


def test_the_rows_of_a_damaged_row_group_are_all_accounted_for(tmp_path):
    table = pa.Table.from_pylist([{"query": str(i), "response": "x" * i} for i in range(300)])
    path = tmp_path / "a.parquet"
    pq.write_table(table, path, row_group_size=100, compression="gzip", use_dictionary=False)
    column = pq.ParquetFile(path).metadata.row_group(1).column(1)
    data = bytearray(path.read_bytes())
    middle = column.data_page_offset + column.total_compressed_size // 2
    data[middle : middle + 40] = bytes(40)
    path.write_bytes(data)
    rows = dict(read_rows(path))
    assert list(rows) == list(range(1, 301))
    assert {number for number, row in rows.items() if isinstance(row, BadRow)} == set(range(101, 201))
    assert "row group 2 is damaged" in rows[150].reason


def test_a_value_of_a_table_that_is_no_python_value_is_one_bad_row(tmp_path):
    texts = _unchecked_texts()
    path = tmp_path / "a.arrow"
    with pa.ipc.new_file(path, pa.schema([("query", pa.string())])) as writer:
        writer.write_batch(pa.record_batch([texts], names=["query"]))
    rows = [row for _, row in read_rows(path)]
    assert [isinstance(row, BadRow) for row in rows] == [False, True, False]


def _unchecked_texts() -> pa.Array:
    """Three texts, of which the second is not UTF-8."""
    offsets = pa.py_buffer(struct.pack("<4i", 0, 4, 5, 9))
    return pa.StringArray.from_buffers(3, offsets, pa.py_buffer(b"fine\xfffine"))


def test_a_stream_of_batches_that_is_cut_off_keeps_the_batches_before(tmp_path):
    table, path = pa.table({"query": [str(i) for i in range(100)]}), tmp_path / "a.arrow"
    with pa.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=10)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    *good, (number, bad) = read_rows(path)
    assert 20 < len(good) < 60
    assert [row["query"] for _, row in good] == [str(i) for i in range(len(good))]
    assert number == len(good) + 1
    assert "breaks off" in bad.reason


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", b'"text"'),
        ("a.json", b"  \n"),
        ("a.parquet", b"PAR?"),
        ("a.jsonl.gz", b"no gzip"),
        ("a.csv.zst", b"no zstd"),
        ("a.arrow", b"no arrow"),
        ("a.feather", b"FEA1 of old"),
        ("a.csv", b"query,query\n1,2\n"),
    ],
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
