"""Models with options beyond the paper: they start as the dense model, load from disk, and are counted right."""

import json

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

import pesc.models
from pesc.errors import ModelError
from pesc.models.config import UpcycleConfig
from pesc.models.upcycle import upcycle_directory
from pesc.moe.layer import SparseMLP
from tests.models.builders import save_dense, save_sparse

pesc.models.register()
SHAPE = {"num_experts": 4, "top_k": 2, "adapter_dim": 8}
OPTIONS = {
    "ffn_input": {"adapter_input": "ffn_input"},
    "layer_experts": {"layer_experts": (4, 0)},
    "shared": {"shared_adapter_dim": 6},
    "all": {"adapter_input": "ffn_input", "layer_experts": (3, 6), "shared_adapter_dim": 6, "dispatch": "dense"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_it_starts_as_the_dense_model_and_loads_whole(tmp_path, options):
    dense = save_dense(tmp_path / "dense")
    sparse = save_sparse(dense, tmp_path / "sparse", UpcycleConfig(**SHAPE, **options))
    model, loading = AutoModelForCausalLM.from_pretrained(sparse, dtype=torch.float32, output_loading_info=True)
    assert not any(loading.values()), loading
    ids = torch.arange(20)[None]
    assert torch.equal(model(ids).logits, AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)(ids).logits)
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert again.config.pesc == model.config.pesc
    assert [type(layer.mlp) for layer in again.model.layers] == [type(layer.mlp) for layer in model.model.layers]


def test_parameters_are_those_of_the_built_model_and_idle_experts_are_counted_by_layer(tmp_path):
    (tmp_path / "sparse").mkdir()
    config = UpcycleConfig(**SHAPE, layer_experts=(4, 6), shared_adapter_dim=5)
    counts = upcycle_directory(save_dense(tmp_path / "dense"), tmp_path / "sparse", config)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    adapter, shared = 2 * 8 * 32, 2 * 5 * 32
    assert counts["added_parameters"] == (4 + 6) * (adapter + 32) + 2 * shared
    assert counts["total_parameters"] == sum(p.numel() for p in model.parameters())
    assert counts["active_parameters"] == counts["total_parameters"] - (2 + 4) * adapter
    assert json.loads((tmp_path / "sparse/config.json").read_text())["pesc"]["layer_experts"] == [4, 6]
    assert all(isinstance(layer.mlp, SparseMLP) for layer in model.model.layers)


def test_one_number_a_layer_is_asked_for(tmp_path):
    (tmp_path / "sparse").mkdir()
    with pytest.raises(ModelError, match=r"layer_experts names 3 layers, but .*dense has 2"):
        upcycle_directory(save_dense(tmp_path / "dense"), tmp_path / "sparse", UpcycleConfig(**SHAPE, layer_experts=(4, 4, 4)))
    assert not list((tmp_path / "sparse").iterdir())


@pytest.mark.parametrize("fields", [{"layer_experts": (4, 1)}, {"layer_experts": (0, 0)}, {"dispatch": "fast"}, {"adapter_input": "x"}])
def test_settings_that_cannot_be_are_refused_before_anything_is_read(fields):
    with pytest.raises(ValidationError, match=next(iter(fields)) if fields != {"layer_experts": (4, 1)} else "nothing to choose"):
        UpcycleConfig(**SHAPE, **fields)


def test_one_expert_is_refused_since_its_router_could_never_learn():
    with pytest.raises(ValidationError, match="one expert leaves the router nothing to choose"):
        UpcycleConfig(num_experts=1, top_k=1)
    with pytest.raises(ValidationError, match="one expert leaves the router nothing to choose"):
        UpcycleConfig(num_experts=4, top_k=1, layer_experts=(4, 1))


def test_a_model_with_another_number_of_layers_is_refused_when_it_is_built():
    from pesc.models.factory import architecture, sparse_config
    from pesc.moe.config import PescConfig
    from tests.models.builders import dense_config

    with pytest.raises(ModelError, match="layer_experts names 3 layers, but the model has 2"):
        architecture("llama").causal_lm(sparse_config(dense_config(), PescConfig(4, 2, 8, layer_experts=(4, 4, 4))))


def test_a_sparse_directory_whose_block_lies_is_not_exported(tmp_path):
    from pesc.models.export import export_remote_code

    sparse = save_sparse(save_dense(tmp_path / "dense"), tmp_path / "sparse")
    (tmp_path / "out").mkdir()
    fields = json.loads((sparse / "config.json").read_text())
    for block, message in (
        ({"num_experts": 5}, r"router\.weight as \[4, 32\], but config\.json says \[5, 32\]"),
        ({"colour": "red"}, "unknown fields: colour"),
    ):
        (sparse / "config.json").write_text(json.dumps(fields | {"pesc": fields["pesc"] | block}))
        with pytest.raises(ModelError, match=message):
            export_remote_code(sparse, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
