"""What from_pretrained and save_pretrained offer for a dense model holds for its sparse twin: shards, types, quantisation, placement."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, BitsAndBytesConfig

import pesc.models
from pesc.models.factory import architecture, sparse_config
from pesc.models.nf4 import quantization_config
from pesc.moe.layer import sparse_parameters
from tests.models.builders import PESC, PROJECTIONS, fill_bank, make_sparse, save_dense, save_sparse, tokens

pesc.models.register()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A dense directory, wide enough for blocks of 64, and its upcycled form."""
    root = tmp_path_factory.mktemp("saved")
    save_dense(root / "dense", hidden_size=64)
    save_sparse(root / "dense", root / "sparse")
    return root


@pytest.fixture(scope="module")
def trained(saved):
    """A sparse directory whose bank does something."""
    fill_bank(AutoModelForCausalLM.from_pretrained(saved / "sparse")).save_pretrained(saved / "trained")
    return saved / "trained"


def test_a_dense_checkpoint_loads_into_the_sparse_class_with_the_same_start_as_upcycling(saved):
    upcycled = AutoModelForCausalLM.from_pretrained(saved / "sparse")
    config = sparse_config(AutoConfig.from_pretrained(saved / "dense"), PESC)
    direct = architecture("llama").causal_lm.from_pretrained(saved / "dense", config=config)
    for (name, one), (other_name, other) in zip(upcycled.named_parameters(), direct.named_parameters(), strict=True):
        assert name == other_name
        assert torch.equal(one, other), name


def test_a_partly_missing_bank_keeps_what_the_checkpoint_has_and_names_what_was_drawn(tmp_path):
    model = make_sparse()
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith("adapters.down")}
    model.save_pretrained(tmp_path, state_dict=state)
    again, loading = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(loading["missing_keys"]) == {f"model.layers.{layer}.mlp.adapters.down" for layer in range(2)}
    name = "model.layers.0.mlp.adapters."
    assert torch.equal(again.get_parameter(name + "up"), model.get_parameter(name + "up"))
    assert torch.equal(again.get_parameter(name + "down"), model.get_parameter(name + "down"))  # drawn again from the seed


@pytest.mark.parametrize(
    "model_type",
    ["llama", "gemma3_text", "starcoder2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("cohere", "phi3", "qwen2"))],
)
def test_save_and_load_round_trip_in_shards(tmp_path, model_type):
    model = make_sparse(model_type)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    again, loading = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading.values()), loading
    assert torch.equal(model(tokens()).logits, again(tokens()).logits)
    assert again.config.pesc == PESC.to_dict()
    assert AutoConfig.from_pretrained(tmp_path).to_dict() == again.config.to_dict()
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base) is architecture(model_type).model
    assert torch.equal(base(tokens()).last_hidden_state, model.model(tokens()).last_hidden_state)


def test_the_sparse_settings_are_nested_in_config_json(tmp_path):
    """A top-level num_experts makes vLLM's Transformers backend treat the model as a fused MoE."""
    make_sparse().config.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert fields["pesc"]["num_experts"] == 4
    assert not {"num_experts", "num_local_experts", "top_k", "num_experts_per_tok", "adapter_dim"} & set(fields)


@pytest.mark.parametrize(("asked", "expected"), [("auto", torch.bfloat16), (torch.float16, torch.float16), ("float32", torch.float32)])
def test_the_type_asked_for_is_the_type_of_every_parameter(trained, asked, expected):
    model = AutoModelForCausalLM.from_pretrained(trained, dtype=asked)
    assert {parameter.dtype for parameter in model.parameters()} == {expected}
    assert model.dtype == model.config.dtype == expected
    assert model(tokens()).logits.dtype == expected


QUANTISED = {
    "nf4": (quantization_config("bfloat16"), "Linear4bit"),
    "int8": (BitsAndBytesConfig(load_in_8bit=True), "Linear8bitLt"),
}


@pytest.mark.parametrize("kind", QUANTISED)
def test_quantisation_takes_the_dense_projections_and_leaves_router_and_bank_alone(saved, trained, kind):
    config, layer_type = QUANTISED[kind]
    load = dict(dtype=torch.bfloat16, quantization_config=config)
    plain, packed = (AutoModelForCausalLM.from_pretrained(trained, **options) for options in (dict(dtype=torch.bfloat16), load))
    original, found = dict(sparse_parameters(plain)), dict(sparse_parameters(packed))
    assert set(found) == set(original)
    for name, parameter in found.items():
        assert type(parameter) is torch.nn.Parameter
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter, original[name]), name
    linears = {name.rpartition(".")[2] for name, module in packed.named_modules() if type(module).__name__ == layer_type}
    assert linears == set(PROJECTIONS)
    with torch.no_grad():
        difference = (packed(tokens()).logits - plain(tokens()).logits).abs().mean()
        assert 0 < difference < plain(tokens()).logits.std()

        dense, start = (AutoModelForCausalLM.from_pretrained(saved / name, **load) for name in ("dense", "sparse"))
        assert torch.equal(dense(tokens()).logits, start(tokens()).logits)


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}])
def test_a_device_map_of_one_device_changes_nothing(trained, device_map):
    expected = AutoModelForCausalLM.from_pretrained(trained, dtype=torch.float32)(tokens()).logits
    assert torch.equal(AutoModelForCausalLM.from_pretrained(trained, dtype=torch.float32, device_map=device_map)(tokens()).logits, expected)


@pytest.mark.parametrize("way", ["by hand", "by memory"])
def test_layers_offloaded_to_disk_compute_the_same_and_stay_whole(trained, tmp_path, way):
    model = AutoModelForCausalLM.from_pretrained(trained, dtype=torch.float32)
    memory = {"cpu": int(0.82 * sum(4 * parameter.numel() for parameter in model.parameters()))}
    by_hand = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "disk"}
    by_hand |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    options = dict(device_map=by_hand) if way == "by hand" else dict(device_map="auto", max_memory=memory)
    split = AutoModelForCausalLM.from_pretrained(trained, dtype=torch.float32, offload_folder=tmp_path, **options)
    placed = {name: device for name, device in split.hf_device_map.items() if name.startswith("model.layers")}
    assert placed == {"model.layers.0": "cpu", "model.layers.1": "disk"}  # whole layers: no bank apart from its MLP
    with torch.no_grad():
        assert torch.equal(split(tokens()).logits, model(tokens()).logits)


@pytest.mark.parametrize("model_type", ["llama", pytest.param("cohere", marks=pytest.mark.slow)])
def test_tied_embeddings_stay_tied(tmp_path, model_type):
    model = make_sparse(model_type, tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(model(tokens()).logits, again(tokens()).logits)

    again.resize_token_embeddings(300)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert again(tokens()).logits.shape[-1] == again.config.vocab_size == 300
    assert torch.allclose(again(tokens()).logits[..., :256], model(tokens()).logits[..., :256], atol=1e-5)
    again.save_pretrained(tmp_path / "wider")
    wider, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "wider", output_loading_info=True)
    assert not any(loading.values()), loading
    assert torch.equal(wider(tokens()).logits, again(tokens()).logits)
