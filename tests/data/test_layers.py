"""A slice of a model is the model without its other layers, and nothing else."""

import json

import pytest

from pesc.data.config import SourceConfig
from pesc.data.download import build
from pesc.errors import SourceError
from tests.data.builders import run_stage, tree_bytes


@pytest.fixture(scope="module", params=["one file", "shards"])
def model(request, tmp_path_factory):
    """A random Llama of four layers."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1, initializer_range=0.3
    )  # fmt: skip
    size = "20KB" if request.param == "shards" else "1GB"
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder, max_shard_size=size)
    return folder


@pytest.mark.parametrize("layers", [(0,), (1, 3), (0, 1, 2), (0, 1, 2, 3)])
def test_the_slice_gives_the_logits_of_the_model_without_its_other_layers(tmp_path, model, layers):
    import torch
    from transformers import AutoModelForCausalLM

    out, built = run_stage(build, SourceConfig(uri=str(model), layers=layers), tmp_path)
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    whole.model.layers = torch.nn.ModuleList([whole.model.layers[number] for number in layers])
    cut, info = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    ids = torch.arange(12)[None]
    with torch.inference_mode():
        assert torch.equal(cut(ids, use_cache=False).logits, whole(ids, use_cache=False).logits)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert (built.provenance["layers"], built.provenance["layers_of"]) == (list(layers), 4)
    assert {name.split(".")[2] for name in _names(out) if ".layers." in name} == {str(number) for number in range(len(layers))}


def _names(folder):
    from safetensors import safe_open

    names = []
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="numpy") as file:
            names += list(file.keys())
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        assert sorted(json.loads(index.read_text())["weight_map"]) == sorted(names)
    return names


def test_settings_by_layer_are_cut_and_the_bytes_repeat(tmp_path, model):
    config = SourceConfig(uri=str(model), layers=(1, 2))
    out, _ = run_stage(build, config, tmp_path / "1")
    again, _ = run_stage(build, config, tmp_path / "2")
    assert tree_bytes(out) == tree_bytes(again)
    fields = json.loads((out / "config.json").read_text())
    assert fields["num_hidden_layers"] == 2
    assert all(len(value) == 2 for name, value in fields.items() if name == "layer_types" and value)


def test_more_layers_than_there_are_and_what_is_no_model_are_sentences(tmp_path, model):
    with pytest.raises(SourceError, match=r"`layers` names layer 4, but the model has 4, from 0 to 3\. Name others"):
        run_stage(build, SourceConfig(uri=str(model), layers=(0, 4)), tmp_path / "1")
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "rows.jsonl").write_text("{}\n")
    with pytest.raises(SourceError, match=r"`layers` cuts a model, but there is no config\.json"):
        run_stage(build, SourceConfig(uri=str(tmp_path / "rows"), layers=(0,)), tmp_path / "2")


def test_a_source_without_layers_keeps_its_key():
    assert "layers" not in SourceConfig(uri="file:x").model_dump(mode="json")
    assert SourceConfig(uri="file:x", layers=(0, 3)).model_dump(mode="json")["layers"] == [0, 3]
    with pytest.raises(ValueError, match="in rising order, not 3, 0"):
        SourceConfig(uri="file:x", layers=(3, 0))
