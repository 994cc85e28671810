from __future__ import annotations

import json
import logging

import pytest
import torch

from pesc.errors import ModelError
from pesc.train.modeling import count_trainable, group_of, load_trainable, log_trainable, trainable_parameters
from tests.train.tiny import settings

NF4 = {"quantization": "nf4", "compute_dtype": "bfloat16"}


@pytest.mark.parametrize("changes", [{}, NF4])
def test_lora_bank_and_router_are_trained_and_nothing_else(sparse_dir, changes):
    model = load_trainable(sparse_dir, settings(**changes), "cpu", "none")
    groups = {group.group: (group.tensors, group.parameters) for group in count_trainable(model)}
    layers, rank = 2, 4
    lora = rank * layers * ((64 + 64) + (64 + 32) * 2 + (64 + 64) + (64 + 96) * 3)  # r (in + out) of q, k, v, o, gate, up, down
    assert groups == {"lora": (2 * 7 * layers, lora), "bank": (2 * layers, 2 * layers * 4 * 8 * 64), "router": (layers, layers * 4 * 64)}
    dtype = torch.bfloat16 if changes else torch.float32
    assert {parameter.dtype for _, parameter in trainable_parameters(model)} == {dtype}


def test_the_base_is_four_bit_and_the_bank_is_not(sparse_dir):
    from bitsandbytes.nn import Params4bit

    model = load_trainable(sparse_dir, settings(**NF4), "cpu", "none")
    kinds = {name: type(parameter) for name, parameter in model.named_parameters()}
    quantised = [name for name, kind in kinds.items() if kind is Params4bit]
    assert len(quantised) == 2 * 7
    assert not [name for name in quantised if "router" in name or "adapters" in name or "lora" in name]
    state = model.get_base_model().model.layers[0].mlp.gate_proj.base_layer.weight.quant_state
    assert (state.quant_type, state.nested) == ("nf4", True)


def test_the_bank_exists_once_in_memory(sparse_dir):
    """PEFT's modules_to_save would keep a frozen twin."""
    model = load_trainable(sparse_dir, settings(), "cpu", "none")
    banks = [name for name, _ in model.named_parameters() if "adapters.down" in name]
    assert len(banks) == 2


def test_the_trained_start_is_the_model_itself(sparse_dir):
    """lora_B is zero, so before the first step the logits are those of the untouched model."""
    from transformers import AutoModelForCausalLM

    import pesc.models

    pesc.models.register()
    plain = AutoModelForCausalLM.from_pretrained(sparse_dir, dtype=torch.float32).eval()
    trained = load_trainable(sparse_dir, settings(), "cpu", "none").eval()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(trained(input_ids=ids).logits, plain(input_ids=ids).logits, atol=0, rtol=0)


def test_equal_settings_give_equal_starts_and_seeds_matter(sparse_dir):
    def start(seed):
        return dict(trainable_parameters(load_trainable(sparse_dir, settings(seed=seed), "cpu", "none")))

    one, again, other = start(1), start(1), start(2)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("kind", "changes", "sentence"),
    [
        ("sparse", {"method": "lora"}, "method is lora, but .* is a sparse model"),
        ("dense", {}, "method is pesc, but .* has no bank: upcycle it first"),
        ("sparse", {"method": "qlora"}, "method is qlora, but .* is a sparse model"),
        ("sparse", {"lora": {"targets": ["q_proj", "qkv_proj"]}}, "lora.targets names 'qkv_proj', but .* there are: down_proj, gate_proj"),
    ],
)
def test_a_model_that_does_not_fit_is_refused(request, kind, changes, sentence):
    with pytest.raises(ModelError, match=sentence):
        load_trainable(request.getfixturevalue(f"{kind}_dir"), settings(**changes), "cpu", "none")


def test_a_folder_that_is_no_model_is_named(tmp_path):
    with pytest.raises(ModelError, match="cannot be loaded as a causal language model"):
        load_trainable(tmp_path, settings(), "cpu", "none")


def test_a_model_that_is_quantised_already_is_refused_before_its_weights_are_read(tmp_path):
    fields = {"model_type": "llama", "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ModelError, match=r"is quantised already \(bitsandbytes\)"):
        load_trainable(tmp_path, settings(), "cpu", "none")


@pytest.mark.parametrize(("policy", "recomputed"), [("selective", 1), ("full", 2)])
def test_checkpointing_changes_no_gradient_and_recomputes_the_layers_of_its_policy(sparse_dir, policy, recomputed):
    def gradients(checkpointing):
        model = load_trainable(sparse_dir, settings(lora={"rank": 4, "dropout": 0.0}), "cpu", checkpointing).train()
        runs = []
        for layer in model.get_base_model().model.layers:
            layer.self_attn.register_forward_hook(lambda *_: runs.append(1))
        for _, parameter in trainable_parameters(model):
            with torch.no_grad():
                parameter.add_(0.01)
        model(input_ids=torch.arange(30)[None]).logits.logsumexp(-1).sum().backward()
        return {name: parameter.grad for name, parameter in trainable_parameters(model)}, len(runs)

    (plain, once), (again, runs) = gradients("none"), gradients(policy)
    assert (once, runs) == (2, 2 + recomputed)
    assert all(gradient is not None and gradient.any() for gradient in plain.values())
    for name in plain:
        torch.testing.assert_close(again[name], plain[name], atol=1e-6, rtol=1e-5)


def test_only_known_tensors_may_be_trained():
    assert group_of("base_model.model.model.layers.0.mlp.up_proj.lora_A.default.weight") == "lora"
    with pytest.raises(ModelError, match=r"lm_head\.weight is trainable"):
        group_of("base_model.model.lm_head.weight")


@pytest.mark.parametrize("changes", [{}, NF4])
def test_the_table_is_logged_with_its_sum(sparse_dir, caplog, changes):
    caplog.set_level(logging.INFO, "pesc")
    model = load_trainable(sparse_dir, settings(**changes), "cpu", "none")
    log_trainable(model)
    assert [record.getMessage().split()[1] for record in caplog.records] == ["lora", "bank", "router", "all"]
    words = caplog.records[-1].getMessage().split()
    assert words[:6] == ["trainable", "all", "34", "tensors", "16,128", "parameters"]
    share = 100 * 16128 / (16128 + 97 * 64 + 64 * 5 + 2 * (64 * 64 * 2 + 64 * 32 * 2 + 64 * 96 * 3))
    assert float(words[6]) == pytest.approx(share, abs=1e-3)
    assert words[-1] == ("bfloat16" if changes else "float32")
    assert len({len(record.getMessage().partition("%")[0]) for record in caplog.records}) == 1
