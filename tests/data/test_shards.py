"""Shards: read in order they are the file, whatever its kind and however small they are."""

from __future__ import annotations

import gzip
import json
import pickle
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pesc.data import streams
from pesc.data.conversation import BadRow
from pesc.data.rows import read_rows
from pesc.data.shards import plan_shards, read_shard

TEXT = st.text(st.characters(codec="utf-8"), max_size=12) | st.sampled_from(
    ['"', "\\", '\\"', "\\\\", "],[", "}{", "\n", "\r\n", "{", "ü,"]
)
VALUE = st.recursive(TEXT | st.integers() | st.none() | st.booleans(), lambda inner: st.lists(inner, max_size=3), max_leaves=5)
ROW = st.dictionaries(TEXT, VALUE, max_size=3) | VALUE
JUNK = st.sampled_from(['{"a": ', "nonsense", '{"a": NaN}', "", "   ", "[1, 2", '"\\ud800"', "\ufeff{}", "\0"])
JSON_KINDS = ("jsonl", "array", "pretty", "objects", "bom.jsonl", "bom.array", "jsonl.gz", "utf16.jsonl", "cr.jsonl")


def write_json(folder: Path, kind: str, texts: list[str]) -> str:
    name = f"rows.{kind.rpartition('.')[2] if 'jsonl' in kind else 'json'}"
    if kind == "array" or kind == "bom.array":
        content = "[" + ",".join(texts) + "]"
    elif kind == "pretty":
        content = "[\n  " + ",\n  ".join(texts) + "\n]\n"
    elif kind == "objects":
        content = '{\n"first": 1}' + " ".join(texts)
    else:
        content = ("\r\n" if kind == "cr.jsonl" else "\n").join(texts)
    data = content.encode("utf-16" if kind == "utf16.jsonl" else "utf-8-sig" if kind.startswith("bom") else "utf-8", "surrogatepass")
    name = name if kind != "jsonl.gz" else "rows.jsonl.gz"
    (folder / name).write_bytes(gzip.compress(data) if kind == "jsonl.gz" else data)
    return name


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(JSON_KINDS), st.lists(ROW.map(json.dumps) | JUNK, max_size=12), st.integers(1, 80), st.integers(4, 40))
def test_shards_of_any_text_are_the_file_in_order(tmp_path, kind, texts, target, block):
    """Also with blocks of some bytes, so that every mark and escape falls on a border of blocks somewhere."""
    name = write_json(tmp_path, kind, texts)
    whole = list(read_rows(tmp_path / name))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams, "BLOCK_BYTES", block)
        small_blocks = list(read_rows(tmp_path / name))
        shards = plan_shards(tmp_path, [name], target)
        parts = [row for shard in shards for row in read_shard(shard)]
    assert repr(small_blocks) == repr(whole)
    assert repr(parts) == repr(whole)
    assert plan_shards(tmp_path, [name], target) == shards, "the plan does not depend on how the file is read"


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(["array", "pretty", "jsonl", "objects"]), st.lists(st.dictionaries(TEXT, VALUE, max_size=3), min_size=1, max_size=8))
def test_rows_are_what_was_written(tmp_path, kind, rows):
    name = write_json(tmp_path, kind, [json.dumps(row, ensure_ascii=False) for row in rows])
    first = [{"first": 1}] if kind == "objects" else []
    assert [row for _, row in read_rows(tmp_path / name)] == first + rows


@pytest.fixture
def table():
    words = random.Random(5)
    return pa.Table.from_pylist([{"query": f"q{i}" * words.randrange(9), "response": [{"role": "user", "n": i}]} for i in range(100)])


@pytest.mark.parametrize("kind", ["parquet", "arrow", "feather", "stream.arrow", "zstd.arrow"])
def test_shards_of_a_table_are_its_row_groups_and_batches(tmp_path, table, kind):
    path = tmp_path / f"rows.{kind}"
    if kind == "parquet":
        pq.write_table(table, path, row_group_size=7)
    else:
        options = pa.ipc.IpcWriteOptions(compression="zstd" if kind == "zstd.arrow" else None)
        opener = pa.ipc.new_stream if kind == "stream.arrow" else pa.ipc.new_file
        with opener(path, table.schema, options=options) as writer:
            writer.write_table(table, max_chunksize=7)
    assert [row for _, row in read_rows(path)] == table.to_pylist()
    for target, expected in ((1, 15), (1 << 30, 1)):
        shards = plan_shards(tmp_path, [path.name], target)
        assert len(shards) == expected
        assert [row for shard in shards for row in read_shard(shard)] == list(read_rows(path))


def test_shards_depend_on_the_files_alone(tmp_path):
    for name in ("b.jsonl", "a/c.jsonl", "a/d.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"a": 1}\n' * 100)
    one = plan_shards(tmp_path, ["b.jsonl", "a/d.csv", "a/c.jsonl"], 100)
    assert one == plan_shards(tmp_path, ["a/c.jsonl", "b.jsonl", "a/d.csv", "b.jsonl"], 100)
    assert [(shard.file, shard.part) for shard in one] == sorted((shard.file, shard.part) for shard in one)
    assert pickle.loads(pickle.dumps(one)) == one
    assert [shard.first for shard in one if shard.file == "b.jsonl"] == [1, 13, 25, 37, 49, 61, 73, 85, 97]
    assert sum(shard.file == "a/d.csv" for shard in one) == 1


def test_a_shard_ends_with_the_first_row_that_fills_it(tmp_path):
    (tmp_path / "a.jsonl").write_text("1\n" * 3 + f'"{"x" * 500}"\n' + "2\n" * 3)
    shards = plan_shards(tmp_path, ["a.jsonl"], 10)
    assert [(shard.start, shard.stop, shard.first) for shard in shards] == [(0, 509, 1), (509, None, 5)]


def test_a_file_that_breaks_off_does_so_in_its_last_shard(tmp_path):
    (tmp_path / "a.json").write_text("[" + ",".join(['{"q": "ab"}'] * 20) + ', {"q": "cut')
    shards = plan_shards(tmp_path, ["a.json"], 50)
    rows = [list(read_shard(shard)) for shard in shards]
    assert not any(isinstance(row, BadRow) for part in rows[:-1] for _, row in part)
    number, bad = rows[-1][-1]
    assert (number, type(bad)) == (21, BadRow)
    assert "breaks off" in bad.reason
