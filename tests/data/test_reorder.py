"""Rows of a Parquet file in another order, through buckets on disk."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pesc.data import reorder
from pesc.data.reorder import write_reordered


def save(path, count, group_rows=5):
    texts = [f"row {n} " + "x" * (n % 11) for n in range(count)]
    table = pa.table({"n": pa.array(range(count), pa.int64()), "text": texts, "list": [[t, None] for t in texts]})
    pq.write_table(table.replace_schema_metadata({"origin": "somewhere"}), path, row_group_size=group_rows)
    return table


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 120), st.integers(1, 50), st.integers(1, 9), st.integers(1, 40), st.randoms(use_true_random=False))
def test_each_output_is_its_rows_in_its_order(tmp_path_factory, count, group_rows, bucket_rows, read_rows, random):
    folder = tmp_path_factory.mktemp("reorder")
    table = save(folder / "in.parquet", count, group_rows)
    order = list(range(count))
    random.shuffle(order)
    cut, end = sorted((random.randint(0, count), random.randint(0, count)))
    outputs = {folder / "a.parquet": np.array(order[:cut], dtype=np.int64), folder / "b.parquet": np.array(order[cut:end], dtype=np.int64)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reorder, "GROUP_ROWS", bucket_rows)
        patch.setattr(reorder, "_READ_ROWS", read_rows)
        write_reordered(folder / "in.parquet", outputs, folder / "work")
    for path, rows in outputs.items():
        assert pq.read_table(path).equals(table.take(pa.array(rows)))
        assert pq.read_metadata(path).num_row_groups == -(-len(rows) // bucket_rows)
    assert not (folder / "work").exists()


def test_bytes_do_not_depend_on_the_row_groups_or_metadata_of_the_input(tmp_path):
    for name, group_rows in (("one", 3), ("two", 100)):
        save(tmp_path / f"{name}-in.parquet", 100, group_rows)
        write_reordered(tmp_path / f"{name}-in.parquet", {tmp_path / f"{name}.parquet": np.arange(99, -1, -3)}, tmp_path / "work")
    assert (tmp_path / "one.parquet").read_bytes() == (tmp_path / "two.parquet").read_bytes()


def test_a_scratch_directory_left_by_a_crash_is_emptied(tmp_path):
    table = save(tmp_path / "in.parquet", 20)
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "0.arrow").write_bytes(b"half a bucket")
    write_reordered(tmp_path / "in.parquet", {tmp_path / "out.parquet": np.array([4, 2])}, tmp_path / "work")
    assert pq.read_table(tmp_path / "out.parquet").equals(table.take(pa.array([4, 2])))


def test_no_row_can_be_written_twice(tmp_path):
    save(tmp_path / "in.parquet", 20)
    outputs = {tmp_path / "a.parquet": np.array([1, 2]), tmp_path / "b.parquet": np.array([2])}
    with pytest.raises(ValueError, match="chosen twice"):
        write_reordered(tmp_path / "in.parquet", outputs, tmp_path / "work")


def test_progress_counts_the_rows_that_were_read(tmp_path):
    save(tmp_path / "in.parquet", 20)
    seen = []
    write_reordered(tmp_path / "in.parquet", {tmp_path / "a.parquet": np.array([3])}, tmp_path / "work", lambda *args: seen.append(args))
    assert seen[-1] == (20, 20)
