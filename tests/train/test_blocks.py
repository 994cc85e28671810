from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from pesc.errors import DataError
from pesc.train.blocks import COLUMNS, HELD_OUT, PackedBlocks
from tests.train import tiny


def write(path, columns, rows_a_batch=2):
    table = pa.table({name: pa.array(values, type=pa.list_(pa.int32())) for name, values in columns.items()})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=rows_a_batch)


def test_blocks_of_all_files_are_those_that_datasets_reads(tmp_path):
    """Against a reader that we did not write."""
    datasets = pytest.importorskip("datasets")
    folder = tiny.write_blocks(tmp_path / "blocks", 13, batch_rows=5)
    paths = sorted(folder.glob("*.arrow"))
    assert len(paths) == 2
    ours = PackedBlocks(folder)
    theirs = [block for path in paths for block in datasets.Dataset.from_file(str(path))]
    assert len(ours) == len(theirs) == 13
    for index in range(13):
        for name, array in ours[index].items():
            assert array.tolist() == theirs[index][name]
            assert array.dtype == np.int64


def test_held_out_blocks_are_found_by_domain(tmp_path):
    columns = {name: [[1, 2], [3, 4], [5, 6]] for name in ("input_ids", "labels", "position_ids")}
    table = pa.table(
        {**{name: pa.array(values, pa.list_(pa.int32())) for name, values in columns.items()}, "domain": ["code", "code", "math"]}
    )
    for number in range(2):
        with pa.OSFile(str(tmp_path / f"heldout-{number:05d}.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    blocks = PackedBlocks(tmp_path, HELD_OUT)
    assert len(blocks) == 6
    assert blocks.domains == {"code": [0, 1, 3, 4], "math": [2, 5]}
    assert blocks[5]["input_ids"].tolist() == [5, 6]
    assert PackedBlocks(tiny.write_blocks(tmp_path, 4)).domains == {}


def test_files_that_are_missing_or_of_an_earlier_version_are_a_sentence(tmp_path):
    with pytest.raises(DataError, match=r"lacks the packed blocks blocks-00000\.arrow; run tokenize again"):
        PackedBlocks(tmp_path)
    write(tmp_path / "blocks.arrow", {name: [[1]] for name in ("input_ids", "labels", "position_ids", "seq_lens")})
    with pytest.raises(DataError, match=r"holds blocks\.arrow, the one file of an earlier version; run tokenize again"):
        PackedBlocks(tmp_path)
    write(tmp_path / "blocks-00000.arrow", {name: [[1]] for name in COLUMNS})
    write(tmp_path / "blocks-00002.arrow", {name: [[1]] for name in COLUMNS})
    with pytest.raises(DataError, match=r"lacks the packed blocks blocks-00001\.arrow"):
        PackedBlocks(tmp_path)


def test_errors_name_the_file_and_the_block(tmp_path):
    path = tmp_path / "blocks-00000.arrow"
    path.write_bytes(b"not arrow at all")
    with pytest.raises(DataError, match=r"blocks-00000\.arrow cannot be read"):
        PackedBlocks(tmp_path)
    write(path, {"input_ids": [[1, 2]], "labels": [[1, 2]]})
    with pytest.raises(DataError, match="position_ids"):
        PackedBlocks(tmp_path)
    write(path, {"input_ids": [], "labels": [], "position_ids": []})
    with pytest.raises(DataError, match="holds no block"):
        PackedBlocks(tmp_path)
    write(path, {name: [[1]] * 3 for name in COLUMNS})
    path = tmp_path / "blocks-00001.arrow"
    write(path, {"input_ids": [[1], [1, 2], [3, 4]], "labels": [[1], [1, 2], [3]], "position_ids": [[0], [0, 1], [0, 1]]})
    blocks = PackedBlocks(tmp_path)
    assert blocks[4]["labels"].tolist() == [1, 2]
    with pytest.raises(DataError, match=r"blocks-00001\.arrow, block 2: the columns"):
        blocks[5]
