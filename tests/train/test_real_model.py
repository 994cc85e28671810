"""A slice of the real model in 4 bit on real rows: sharded as ZeRO 1, 2 and 3 over two real ranks, it learns what one rank learns."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from pesc.data.config import TokenizeConfig
from pesc.data.tokenization import build as tokenize
from pesc.models.config import UpcycleConfig
from pesc.models.upcycle import upcycle_directory
from pesc.train.stage import build
from tests.data.builders import run_stage, save_mixture
from tests.data.conftest import real_conversations, smollm2  # noqa: F401  (fixtures)
from tests.train import tiny

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(900)]

LAYERS, STEPS, EXPERTS = 6, 6, 8
CONTEXT = 64  # short: bf16 matrices take seconds on a CPU without instructions for them
UPCYCLED = UpcycleConfig(num_experts=EXPERTS, top_k=2, adapter_dim=64, dispatch="dense")
QLORA = {
    "quantization": "nf4", "compute_dtype": "bfloat16", "optimizer": "paged_adamw_8bit", "lora": {"rank": 8, "alpha": 16.0, "dropout": 0.1},
    "learning_rate": 5e-4, "max_steps": STEPS, "global_batch_size": 2, "micro_batch_size": 1, "max_grad_norm": 0.3,
}  # fmt: skip


@pytest.fixture(scope="module")
def sparse_slice(tmp_path_factory, smollm2) -> Path:  # noqa: F811
    """The first six layers of SmolLM2-135M-Instruct, with eight adapters of width 64 on each FFN."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    root = tmp_path_factory.mktemp("slice")
    AutoModelForCausalLM.from_pretrained(smollm2, num_hidden_layers=LAYERS, dtype=torch.bfloat16).save_pretrained(root / "dense")
    AutoTokenizer.from_pretrained(smollm2).save_pretrained(root / "dense")
    (root / "sparse").mkdir()
    upcycle_directory(root / "dense", root / "sparse", UPCYCLED)
    return root / "sparse"


@pytest.fixture(scope="module")
def real_blocks(tmp_path_factory, smollm2, real_conversations) -> Path:  # noqa: F811
    """Packed blocks of MetaMathQA and Magicoder rows."""
    root = tmp_path_factory.mktemp("rows")
    rows = [row for name in ("metamathqa", "magicoder_oss_instruct") for row in real_conversations(f"instructions/{name}.jsonl")[:60]]
    mixture = save_mixture(root / "mix", rows, {"general": rows[:1]})
    return run_stage(tokenize, TokenizeConfig(context_length=CONTEXT), root, {"mixture": mixture, "model": smollm2})[0]


def train(root: Path, model: Path, blocks: Path, execution: dict):
    started = time.monotonic()

    def tell(progress):
        print(f"{time.monotonic() - started:.0f} s", progress.message, int(progress.done), flush=True)

    ctx = tiny.make_context(root, model, blocks, tiny.settings(**QLORA), execution, tell)
    build(ctx)
    lines = [json.loads(line) for line in (ctx.out / "history.jsonl").read_text().splitlines()]
    print(execution, [round(line["loss"], 4) for line in lines], f"{time.monotonic() - started:.0f} s")
    return ctx, lines


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory, sparse_slice, real_blocks):
    return train(tmp_path_factory.mktemp("one"), sparse_slice, real_blocks, {"num_processes": 1, "zero_stage": 2})


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_sharded_nf4_learns_what_one_rank_learns_and_trains_every_expert(tmp_path, one_rank, sparse_slice, real_blocks, zero_stage):
    ctx, lines = train(tmp_path, sparse_slice, real_blocks, {"num_processes": 2, "zero_stage": zero_stage})
    assert len(lines) == STEPS
    for line, expected in zip(lines, one_rank[1], strict=True):
        assert line["tokens"] == expected["tokens"]
        assert line["loss"] == pytest.approx(expected["loss"], rel=2**-8)  # bf16's rounding
    for before, after in trained_experts(sparse_slice, ctx.out):
        assert (after != before).flatten(1).any(dim=1).tolist() == [True] * EXPERTS


def trained_experts(model: Path, out: Path):
    """The bank before and after, layer by layer: pairs of [E, ...]."""
    from safetensors.torch import load_file

    before, after = load_file(model / "bank.safetensors"), load_file(out / "bank.safetensors")
    names = [name for name in after if ".adapters." in name or name.endswith("router.weight")]
    assert len(names) == 3 * LAYERS
    return [(before[name].to(after[name].dtype), after[name]) for name in names]
