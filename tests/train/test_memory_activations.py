"""The formula for activations against the bytes that autograd really saves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from pesc.models.factory import architecture, sparse_config
from pesc.moe.config import PescConfig
from pesc.train.head import LossHead
from pesc.train.loss import chunk_rows
from pesc.train.memory.activations import CHUNK_ELEMENTS, LEAST_ROWS, Batch, activation_bytes, kept_bytes, logits_bytes, recomputed_bytes
from pesc.train.memory.shapes import KNOWN_BASES, shape_from_config
from pesc.train.modeling import load_trainable
from pesc.train.packed_rows import rows_told
from tests.train.tiny import settings

SIZES: Any = {
    "vocab_size": 301,
    "hidden_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
DENSE = LlamaConfig(**SIZES, intermediate_size=264)
BLOCKS = {
    "dense": PescConfig(num_experts=4, top_k=2, adapter_dim=16, dispatch="dense"),
    "grouped": PescConfig(num_experts=4, top_k=2, adapter_dim=64, dispatch="grouped"),
}
NUM_BLOCKS, SEQUENCE = 2, 96
ARMS = {
    "pesc": ("dense", {"method": "pesc", "quantization": "nf4", "lora": {"rank": 4, "dropout": 0.1}}),
    "pesc, grouped, fp32": ("grouped", {"method": "pesc", "compute_dtype": "float32", "lora": {"rank": 4, "dropout": 0.0}}),
    "qlora": ("base", {"method": "qlora", "quantization": "nf4", "lora": {"rank": 4, "dropout": 0.1}}),
    "lora": ("base", {"method": "lora", "lora": {"rank": 4, "dropout": 0.0, "targets": ["q_proj", "v_proj", "down_proj"]}}),
    "upcycle-full": ("mixtral", {"method": "upcycle-full"}),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("activations")
    made = {name: architecture("llama").causal_lm(sparse_config(DENSE, block)) for name, block in BLOCKS.items()}
    made["base"] = LlamaForCausalLM(DENSE)
    made["mixtral"] = MixtralForCausalLM(MixtralConfig(**SIZES, intermediate_size=264, num_local_experts=4, num_experts_per_tok=2))
    for name, model in made.items():
        model.to(torch.bfloat16).save_pretrained(folder / name)
    return folder


def saved_bytes(folder, config, policy: str) -> int:
    """Storages that a forward pass leaves for the backward pass, without parameters and buffers."""
    model = load_trainable(folder, config, "cpu", policy).train()
    base = model.get_base_model() if config.method != "upcycle-full" else model
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    held: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            held[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    batch = {
        "input_ids": torch.randint(SIZES["vocab_size"], (NUM_BLOCKS, SEQUENCE)),
        "position_ids": torch.arange(SEQUENCE // 3).repeat(3).expand(NUM_BLOCKS, -1),
        "use_cache": False,
    }
    head = LossHead.of(base)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), rows_told(True):
        if head is None:
            _ = model.model(**batch).last_hidden_state
        else:
            with head.scoring(None, torch.randint(SIZES["vocab_size"], (NUM_BLOCKS * SEQUENCE,)), torch.tensor(1.0)):
                head.loss_of(model(**batch))
    loss = (
        0 if head is None else batch["input_ids"].numel() * SIZES["hidden_size"] * base.dtype.itemsize
    )  # the gradient that it made already
    return sum(tensor.untyped_storage().nbytes() for tensor in held.values()) - loss


@pytest.mark.parametrize("policy", ["none", "selective", "full"])
@pytest.mark.parametrize("arm", ARMS)
def test_a_forward_pass_keeps_what_the_formula_says(models, arm, policy):
    name, changes = ARMS[arm]
    config = settings(**({"compute_dtype": "bfloat16"} | changes))
    block = PescConfig(num_experts=4, top_k=2) if name == "mixtral" else BLOCKS.get(name)
    batch, shape = Batch(NUM_BLOCKS, SEQUENCE, device="cpu"), shape_from_config(DENSE.to_dict(), "dense")
    found = saved_bytes(models / name, config, policy)
    assert kept_bytes(shape, block, config, batch, policy) == pytest.approx(found, rel=0.1)


def test_policies_trade_what_is_kept_for_one_layer_made_again():
    shape, block, config = KNOWN_BASES["llama-2-7b"], PescConfig(), settings(compute_dtype="bfloat16")
    kept = {policy: kept_bytes(shape, block, config, Batch(1, 2048), policy) for policy in ("none", "selective", "full")}
    assert kept["full"] < kept["selective"] < kept["none"]
    assert kept["selective"] == pytest.approx((kept["none"] + kept["full"]) / 2, rel=1e-6)
    again = recomputed_bytes(shape, block, config, Batch(1, 2048), "full")
    assert 32 * again == pytest.approx(kept["none"], rel=0.01)
    assert recomputed_bytes(shape, block, config, Batch(1, 2048), "none") == 0


def test_logits_never_exist_whole_where_the_loss_is_made_in_chunks():
    config = settings(compute_dtype="bfloat16")
    shape = KNOWN_BASES["llama-3-8b"]
    assert chunk_rows(shape.vocab) == max(LEAST_ROWS, CHUNK_ELEMENTS // shape.vocab)
    whole = 4 * 8192 * shape.vocab
    assert logits_bytes(shape, config, Batch(4, 2048)) < 0.1 * whole
    full = settings(method="upcycle-full", compute_dtype="bfloat16")
    assert logits_bytes(shape, full, Batch(4, 2048)) > whole


def test_activations_grow_with_the_micro_batch_and_dropout_keeps_more():
    shape, block, config = KNOWN_BASES["llama-2-7b"], PescConfig(), settings(compute_dtype="bfloat16")
    one, two = (activation_bytes(shape, block, config, Batch(blocks, 2048), "none").layers for blocks in (1, 2))
    assert two == 2 * one
    plain = settings(compute_dtype="bfloat16", lora={"dropout": 0.0})
    assert activation_bytes(shape, block, plain, Batch(1, 2048), "none").layers < 0.8 * one
