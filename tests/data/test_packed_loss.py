"""Packing changes nothing that is learned: the loss of packed rows is the loss of the same rows alone, on the real model."""

from __future__ import annotations

import numpy as np
import pytest

from pesc.data.config import TokenizeConfig
from pesc.data.encoding import IGNORED, RowEncoder, load_tokenizer
from pesc.data.tokenization import build
from tests.data.builders import run_stage, save_mixture
from tests.data.conftest import INSTRUCTIONS


@pytest.fixture(scope="module")
def rows(real_conversations, smollm2):
    """The shortest rows, to be quick: two of each source of the mix, and one of several turns, with tools."""
    encoder = RowEncoder(load_tokenizer(smollm2), TokenizeConfig(context_length=32768))

    def shortest(candidates, count):
        return sorted(candidates, key=lambda row: len(encoder.encode([row]).rows[0].ids))[:count]

    multi = [row for row in real_conversations("instructions_extra/glaive_toolcall_en_demo.json") if len(row) > 4]
    return [row for name in INSTRUCTIONS for row in shortest(real_conversations(f"instructions/{name}"), 2)] + shortest(multi, 1)


def real_model(smollm2):
    import torch
    from transformers import AutoModelForCausalLM

    from pesc.train.modeling import pick_attention

    return AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32, attn_implementation=pick_attention("cpu")).eval()


def loss_alone(model, smollm2, rows) -> tuple[float, int]:
    """Sum over the supervised tokens, one row at a time, by a log-softmax in float64.

    (Not by transformers' own loss: PyTorch's cross-entropy in float32 over 49,152 tokens is off by 1.1e-5 a token on the CPU.)
    """
    import torch

    total, tokens = 0.0, 0
    for row in RowEncoder(load_tokenizer(smollm2), TokenizeConfig()).encode(rows).rows:
        ids, labels = (torch.from_numpy(array.astype(np.int64)) for array in (row.ids, row.labels()))
        with torch.no_grad():
            logprobs = model(input_ids=ids[None], use_cache=False).logits[0, :-1].double().log_softmax(-1)
        chosen = labels[1:] != IGNORED
        total -= logprobs[chosen, labels[1:][chosen]].sum().item()
        tokens += row.supervised_tokens
    return total, tokens


def loss_packed(model, batch, **changes) -> tuple[float, int]:
    """The same sum as the trainer makes it: logits of a collated batch, its targets, its cross-entropy."""
    import torch

    from pesc.train.collator import NO_LOSS
    from pesc.train.loss import scaled_cross_entropy

    given = {name: batch[name] for name in ("input_ids", "position_ids")} | changes
    with torch.no_grad():
        logits = model(**given, use_cache=False).logits
        chosen = batch["targets"] != NO_LOSS
        return scaled_cross_entropy(logits[chosen], batch["targets"][chosen], torch.tensor(1.0)).double().item(), int(chosen.sum())


@pytest.mark.slow
def test_packed_and_unpacked_loss_are_equal_on_the_real_model(tmp_path, smollm2, rows):
    """To 1e-5 of the mean loss in fp32, through the stage's files and the trainer's reader and collator; not so when rows see one another."""
    import torch

    from pesc.train.blocks import PackedBlocks
    from pesc.train.collator import Collator

    mixture = save_mixture(tmp_path / "mix", rows, {"general": rows[:1]})
    out, result = run_stage(build, TokenizeConfig(context_length=512), tmp_path, {"mixture": mixture, "model": smollm2})
    blocks = PackedBlocks(out)
    assert result.metrics["rows"] == len(rows) == 9
    assert 2 <= len(blocks) < 7
    model = real_model(smollm2)
    alone, tokens = loss_alone(model, smollm2, rows)
    batches = [Collator(pad_id=2)([{**blocks[pair], "position": pair} for pair in pairs]) for pairs in _pairs(len(blocks))]
    packed = [loss_packed(model, batch) for batch in batches]
    assert sum(count for _, count in packed) == tokens == result.metrics["supervised_tokens"]
    assert sum(total for total, _ in packed) / tokens == pytest.approx(alone / tokens, abs=1e-5)
    unbroken = torch.arange(batches[0]["input_ids"].shape[1]).expand_as(batches[0]["input_ids"])
    leaking = loss_packed(model, batches[0], position_ids=unbroken)
    assert abs(leaking[0] - packed[0][0]) / packed[0][1] > 1e-3


def _pairs(count: int) -> list[list[int]]:
    """Two blocks a micro-batch, so that padding is in play."""
    return [list(range(start, min(start + 2, count))) for start in range(0, count, 2)]
