"""Packed and padded training learn the same; packed reads the real tokens several times as fast."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pesc.bench import packing
from pesc.bench.packing import (
    LENGTHS,
    LONGEST,
    MAX_LENGTH,
    PACKED,
    SUPERVISED_SHARE,
    PackingSettings,
    choose_rows,
    make_batches,
    measure_packing,
    random_rows,
    read_token_rows,
    render,
)
from pesc.bench.step import StepSettings
from pesc.data.config import TokenizeConfig
from pesc.data.encoding import RowEncoder, TokenRow, load_tokenizer
from pesc.errors import DataError
from tests.data.conftest import INSTRUCTIONS

TINY = PackingSettings(StepSettings(shape="tiny", layers=2, adapter_dims=(8,), experts=4, sequence=1024, rounds=1), blocks=3)


def real_rows(smollm2, real_conversations, context_length: int) -> list[TokenRow]:
    encoder = RowEncoder(load_tokenizer(smollm2), TokenizeConfig(context_length=context_length))
    return encoder.encode(real_conversations()).rows


def assert_one_loss(times):
    packed = times.arm(PACKED).loss
    assert packed > 0.5
    assert {arm.name: arm.loss for arm in times.arms} == pytest.approx(dict.fromkeys((PACKED, LONGEST, MAX_LENGTH), packed), rel=1e-5)


@pytest.fixture(scope="module")
def tiny_times():
    return measure_packing(TINY)


@pytest.mark.slow
def test_the_loss_by_supervised_token_is_one_number(tiny_times):
    assert_one_loss(tiny_times)


@pytest.mark.slow
def test_rows_that_saw_one_another_would_have_another_loss(tiny_times, monkeypatch):
    block = packing._block
    monkeypatch.setattr(packing, "_block", lambda rows: block(rows) | {"position_ids": np.arange(sum(len(row.ids) for row in rows))})
    leaking = measure_packing(TINY)
    assert abs(leaking.arm(PACKED).loss / tiny_times.arm(PACKED).loss - 1) > 1e-4
    assert leaking.arm(MAX_LENGTH).loss == pytest.approx(tiny_times.arm(MAX_LENGTH).loss)


@pytest.mark.slow
def test_the_arms_read_the_same_tokens_with_more_or_less_padding(tiny_times):
    assert tiny_times.arm(PACKED).positions == tiny_times.tokens
    assert tiny_times.tokens < tiny_times.arm(LONGEST).positions < tiny_times.arm(MAX_LENGTH).positions == 1024 * tiny_times.rows
    assert [arm.tokens_per_second * arm.seconds for arm in tiny_times.arms] == pytest.approx([tiny_times.tokens] * 3)
    assert tiny_times.arm(PACKED).ratio == 1.0


def test_every_arm_supervises_the_same_tokens_and_masks_its_padding():
    rows = choose_rows(random_rows(97), TINY.blocks, 1024)
    known = sorted(token for row in rows for token in row.ids[row.loss()].tolist())
    for name, batches in make_batches(rows, TINY).items():
        assert sorted(token for batch in batches for token in batch["targets_N"].tolist()) == known, name
        assert sum(batch["tokens"] for batch in batches) == sum(len(row.ids) for row in rows), name
        assert sum(int(batch["valid"].sum()) for batch in batches) == sum(len(row.ids) for row in rows), name
        for batch in batches:
            assert not batch["valid"].logical_not()[batch["targets"] != -100].any(), name
            assert name == PACKED or torch.equal(batch["attention_mask"].bool(), batch["valid"]), name


def test_a_handful_of_rows_has_the_lengths_of_them_all():
    rows = random_rows(97)
    lengths = [len(row.ids) for row in rows]
    assert np.quantile(lengths, np.linspace(0, 1, len(LENGTHS))[1:-1]) == pytest.approx(LENGTHS[1:-1], rel=0.02)
    assert sum(row.supervised_tokens for row in rows) / sum(lengths) == pytest.approx(SUPERVISED_SHARE, abs=0.01)
    for blocks, tolerance in ((2, 0.12), (16, 0.03)):
        chosen = choose_rows(rows, blocks, 2048)
        assert np.mean([len(row.ids) for row in chosen]) == pytest.approx(np.mean(np.minimum(lengths, 2048)), rel=tolerance)
        assert sum(len(row.ids) for row in chosen) > 0.8 * blocks * 2048


def test_too_few_rows_are_a_sentence():
    with pytest.raises(DataError, match="too few to choose 2 blocks of 2048 from"):
        measure_packing(PackingSettings(StepSettings(shape="tiny", layers=1)), random_rows(97, count=3))


@pytest.mark.slow
@pytest.mark.long
def test_real_rows_have_the_stated_lengths_and_one_loss_on_the_real_model(smollm2, real_conversations, shared_data):
    rows = real_rows(smollm2, real_conversations, 65536)
    lengths = [len(row.ids) for row in rows]
    assert np.quantile(lengths, np.linspace(0, 1, len(LENGTHS))).astype(int).tolist() == list(LENGTHS)
    assert sum(row.supervised_tokens for row in rows) / sum(lengths) == pytest.approx(SUPERVISED_SHARE, abs=0.005)
    read = read_token_rows([shared_data / "data" / "instructions" / name for name in INSTRUCTIONS], smollm2, 65536)
    assert [row.ids.tolist() for row in read] == [row.ids.tolist() for row in rows]
    step = StepSettings(model=smollm2, layers=2, adapter_dims=(64,), sequence=512, rounds=1)
    assert_one_loss(measure_packing(PackingSettings(step, blocks=1), rows))


@pytest.mark.benchmark
def test_packed_training_reads_real_rows_three_times_as_fast_as_rows_padded_to_2048(smollm2, real_conversations):
    rows = real_rows(smollm2, real_conversations, 2048)
    times = measure_packing(PackingSettings(StepSettings(model=smollm2, layers=6, adapter_dims=(64,), rounds=2)), rows)
    print("\n" + render(times))
    assert_one_loss(times)
    assert times.arm(MAX_LENGTH).ratio >= 3, render(times)
    assert times.arm(LONGEST).ratio >= 1, render(times)
