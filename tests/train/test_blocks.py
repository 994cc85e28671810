from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from pesc.errors import DataError
from pesc.train.blocks import PackedBlocks
from tests.train import tiny


def write(path, columns, rows_a_batch=2):
    table = pa.table({name: pa.array(values, type=pa.list_(pa.int32())) for name, values in columns.items()})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=rows_a_batch)


def test_blocks_are_those_that_datasets_reads(tmp_path):
    """Against a reader that we did not write."""
    datasets = pytest.importorskip("datasets")
    path = tiny.write_blocks(tmp_path / "blocks", 13, batch_rows=5) / "blocks.arrow"
    ours, theirs = PackedBlocks(path), datasets.Dataset.from_file(str(path))
    assert len(ours) == len(theirs) == 13
    for index in range(13):
        for name, array in ours[index].items():
            assert array.tolist() == theirs[index][name]
            assert array.dtype == np.int64


def test_errors_name_the_file_and_the_block(tmp_path):
    path = tmp_path / "blocks.arrow"
    with pytest.raises(DataError, match=r"blocks\.arrow cannot be read"):
        PackedBlocks(path)
    path.write_bytes(b"not arrow at all")
    with pytest.raises(DataError, match=r"blocks\.arrow cannot be read"):
        PackedBlocks(path)
    write(path, {"input_ids": [[1, 2]], "labels": [[1, 2]]})
    with pytest.raises(DataError, match="position_ids"):
        PackedBlocks(path)
    write(path, {"input_ids": [], "labels": [], "position_ids": []})
    with pytest.raises(DataError, match="holds no block"):
        PackedBlocks(path)
    write(path, {"input_ids": [[1], [1, 2], [3, 4]], "labels": [[1], [1, 2], [3]], "position_ids": [[0], [0, 1], [0, 1]]})
    blocks = PackedBlocks(path)
    assert blocks[1]["labels"].tolist() == [1, 2]
    with pytest.raises(DataError, match="block 2: the columns"):
        blocks[2]
