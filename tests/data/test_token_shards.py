"""Shards on disk hold what the encoder gives, however they are cut."""

from __future__ import annotations

import os
from collections import Counter
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pesc.data import token_shards
from pesc.data.block_files import write_blocks
from pesc.data.chat import CHATML
from pesc.data.config import TokenizeConfig
from pesc.data.encoding import IGNORED, RowEncoder, load_tokenizer
from pesc.data.token_shards import TokenShards, cut_rows, encode_shard, read_conversations
from tests.data.builders import save_mixture, tiny_tokenizer

CONFIG = TokenizeConfig(context_length=48)
ROWS = [[("user", f"q{n} " + "x " * (n * 7 % 50)), ("assistant", f"a{n}")] for n in range(41)]
ROWS[17] = [("user", "<|im_end|>"), ("assistant", "refused")]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_tokenizer(CHATML).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def expected(model):
    encoded = RowEncoder(load_tokenizer(model), CONFIG).encode(ROWS)
    assert 0 < len(encoded.rows) < len(ROWS)
    return encoded


def encode(folder, model, skip=0, shard_rows=8, row_group=None):
    mixture = save_mixture(folder / "mix", ROWS) / "mixture.parquet"
    if row_group:
        pq.write_table(pq.read_table(mixture), mixture, row_group_size=row_group)
    shards = cut_rows(mixture, folder, skip, shard_rows)
    counts = sum((encode_shard(shard, model=model, config=CONFIG, stage_process=os.getpid()) for shard in shards), Counter())
    return TokenShards([shard.tokens for shard in shards]), counts, shards


@pytest.mark.parametrize(("skip", "shard_rows", "row_group"), [(0, 8, None), (0, 1, 3), (5, 8, 3), (9, 100, 4), (0, 41, 41), (3, 38, 1)])
def test_rows_of_all_shards_are_the_encoders_rows(tmp_path, model, expected, skip, shard_rows, row_group):
    """Dropped rows are missing, places count from the start of the mixture, row groups of the file do not matter."""
    shards, counts, made = encode(tmp_path, model, skip, shard_rows, row_group)
    wanted = [(place, row) for place, row in zip(expected.places, expected.rows, strict=True) if place >= skip]
    assert len(made) == -(-(len(ROWS) - skip) // shard_rows)
    assert shards.source_rows.tolist() == [place for place, _ in wanted]
    assert shards.lengths.tolist() == [len(row.ids) for _, row in wanted]
    for number, (_, row) in enumerate(wanted):
        ids, loss = shards.gather([number])
        assert ids.tolist() == row.ids.tolist()
        assert loss.tolist() == row.loss().tolist()
    assert counts["rows"] == len(wanted)
    assert counts["tokens"] == sum(len(row.ids) for _, row in wanted)
    assert counts["supervised_tokens"] == sum(row.supervised_tokens for _, row in wanted)
    assert counts["rows"] + counts["template"] + counts["no_answer_left"] == len(ROWS) - skip


@pytest.mark.parametrize(("process", "setting"), [("the stage's", "true"), ("a worker's", "false")])
def test_the_tokenizer_has_threads_in_the_stage_and_one_in_a_worker(tmp_path, model, monkeypatch, process, setting):
    seen = []
    encoder = token_shards._encoder(model, CONFIG)
    whole = RowEncoder.encode
    monkeypatch.setattr(RowEncoder, "encode", lambda *given: seen.append(os.environ["TOKENIZERS_PARALLELISM"]) or whole(*given))
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "as it was")
    (shard,) = cut_rows(save_mixture(tmp_path / "mix", ROWS) / "mixture.parquet", tmp_path)
    encode_shard(shard, model=model, config=CONFIG, stage_process=os.getpid() + (process != "the stage's"))
    assert seen == [setting]
    assert os.environ["TOKENIZERS_PARALLELISM"] == "as it was"
    assert token_shards._encoder(model, CONFIG) is encoder


def test_messages_are_read_from_slices_too():
    messages = [[{"role": role, "content": content} for role, content in row] for row in ROWS[:9]]
    column = pa.array(messages, pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())])))
    assert read_conversations(column.slice(2, 4)) == ROWS[2:6]
    assert read_conversations(column.slice(0, 0)) == []


@settings(deadline=None, max_examples=60)
@given(st.data(), st.integers(1, 5))
def test_blocks_hold_their_rows_one_behind_the_other(data, file_blocks):
    """Against plain Python lists, for any blocks and any number of files."""
    lengths = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=20))
    ids = [data.draw(st.lists(st.integers(0, 99), min_size=length, max_size=length)) for length in lengths]
    loss = [data.draw(st.lists(st.booleans(), min_size=length, max_size=length)) for length in lengths]
    order = data.draw(st.permutations(range(len(lengths))))
    edges = sorted({0, len(order), *data.draw(st.lists(st.integers(0, len(order)), max_size=5))})
    blocks = [list(order[start:end]) for start, end in pairwise(edges)]
    names = data.draw(st.lists(st.sampled_from(["code", "math"]), min_size=len(blocks), max_size=len(blocks)))
    with TemporaryDirectory() as name_of_folder:
        folder, half = Path(name_of_folder), len(lengths) // 2
        shards = TokenShards([save_shard(folder / "0", ids[:half], loss[:half]), save_shard(folder / "1", ids[half:], loss[half:])])
        paths = write_blocks(folder, "heldout", shards, blocks, names, file_blocks)
        assert [path.name for path in paths] == [f"heldout-{number:05d}.arrow" for number in range(-(-len(blocks) // file_blocks))]
        written = [block for path in paths for block in pa.ipc.open_stream(path.read_bytes()).read_all().to_pylist()]
    for block, name, found in zip(blocks, names, written, strict=True):
        assert found["input_ids"] == [token for row in block for token in ids[row]]
        assert found["labels"] == [token if kept else IGNORED for row in block for token, kept in zip(ids[row], loss[row], strict=True)]
        assert found["position_ids"] == [place for row in block for place in range(lengths[row])]
        assert found["cu_seqlens"] == np.cumsum([0, *(lengths[row] for row in block)]).tolist()
        assert found["domain"] == name


def save_shard(folder, ids, loss):
    folder.mkdir()
    np.save(folder / "ids.npy", np.array([token for row in ids for token in row], dtype=np.int32))
    np.save(folder / "loss.npy", np.array([kept for row in loss for kept in row], dtype=np.bool_))
    np.save(folder / "lengths.npy", np.array([len(row) for row in ids], dtype=np.int32))
    np.save(folder / "rows.npy", np.arange(len(ids), dtype=np.int64))
    return folder
