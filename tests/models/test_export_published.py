"""The published layouts, written: others read in them what this package reads."""

import dataclasses
import json
import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import pesc.moe.config
from pesc.errors import ModelError
from pesc.models.export_published import export_published
from pesc.models.factory import architecture
from pesc.models.published import import_published
from pesc.models.tensor_files import TensorDirectory
from pesc.moe.config import PescConfig
from tests.models.builders import save_dense, save_published, save_sparse


def load_pickles(directory):
    tensors = {}
    for path in sorted(directory.glob("pytorch_model-*.bin")):
        tensors |= torch.load(path, weights_only=True)
    return tensors


def new(path):
    path.mkdir()
    return path


def assert_equal_tensors(one, two):
    assert set(one) == set(two)
    for name, tensor in one.items():
        assert two[name].dtype == tensor.dtype, name
        assert torch.equal(two[name], tensor), name


def test_the_golden_checkpoint_comes_back_tensor_for_tensor(shared_data, tmp_path):
    golden = shared_data / "golden/camelidae-tiny"
    import_published(golden, new(tmp_path / "ours"))
    export_published(tmp_path / "ours", new(tmp_path / "back"), "camelidae", max_shard_bytes=100_000)
    assert len(list((tmp_path / "back").glob("*.bin"))) > 3
    assert_equal_tensors(load_pickles(golden), load_pickles(tmp_path / "back"))
    index = json.loads((tmp_path / "back/pytorch_model.bin.index.json").read_text())
    assert index["metadata"] == json.loads((golden / "pytorch_model.bin.index.json").read_text())["metadata"]
    for name, file in index["weight_map"].items():
        assert name in torch.load(tmp_path / "back" / file, weights_only=True, mmap=True)
    before, after = (json.loads((path / "config.json").read_text()) for path in (golden, tmp_path / "back"))
    for name in ("adapter_dim", "num_experts", "topk", "moe_scaling", "moe_dtype", "output_router_logits", "model_type", "architectures"):
        assert after[name] == before[name], name
    import_published(tmp_path / "back", new(tmp_path / "again"))
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "ours" / name).read_bytes()


ROUNDS = {
    "camelidae": ("llama", "expert_{}", "camelidae", "camelidae", "modeling_camelidae.LlamaForCausalLM"),
    "qwen2idae": ("qwen2", "expert_{}", "qwen2idae", "camelidae", "Qwen2ForCausalLM"),
    "sparsetral": ("mistral", "{}", "sparsetral", "sparsetral", "modeling_sparsetral.MistralForCausalLM"),
}


@pytest.mark.parametrize("case", ROUNDS)
def test_there_and_back_is_the_same(tmp_path, case):
    """The layout was written by hand (`save_published`), so the export is not compared with itself."""
    model_type, expert, published_type, format_name, class_name = ROUNDS[case]
    save_published(tmp_path / "hand", model_type, expert, published_type, moe_scaling=0.25)
    import_published(tmp_path / "hand", new(tmp_path / "ours"))
    export_published(tmp_path / "ours", new(tmp_path / "theirs"), format_name)
    import_published(tmp_path / "theirs", new(tmp_path / "again"))
    pickled = format_name == "camelidae"
    found = load_pickles(tmp_path / "theirs") if pickled else load_file(tmp_path / "theirs/model.safetensors")
    assert_equal_tensors(load_file(tmp_path / "hand/model.safetensors"), found)
    assert not list((tmp_path / "theirs").glob("*.safetensors" if pickled else "*.bin"))
    assert_equal_tensors(load_file(tmp_path / "ours/model.safetensors"), load_file(tmp_path / "again/model.safetensors"))
    one, two = (architecture(model_type).config.from_pretrained(tmp_path / name).to_dict() for name in ("ours", "again"))
    assert one == two
    config = json.loads((tmp_path / "theirs/config.json").read_text())
    assert (config["model_type"], config["architectures"]) == (published_type, [class_name])
    assert (config["num_experts"], config["topk"], config["adapter_dim"], config["moe_scaling"]) == (4, 2, 8, 0.25)
    assert config["output_router_logits"] is False
    assert "pesc" not in config
    assert not [name for name in config if name.startswith("lora")]


@pytest.fixture(scope="module")
def sparse(tmp_path_factory):
    root = tmp_path_factory.mktemp("sparse")
    save_dense(root / "dense")
    return save_sparse(root / "dense", root / "sparse")


def with_config(sparse, directory, **fields):
    shutil.copytree(sparse, directory)
    path = directory / "config.json"
    path.unlink()
    path.write_text(json.dumps(json.loads((sparse / "config.json").read_text()) | fields))
    return directory


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.floats(1.0, 1e7),
    st.sampled_from([{}, {"rope_type": "linear", "factor": 2.0}, {"rope_type": "dynamic", "factor": 4.0}]),
    st.booleans(),
)
def test_rope_survives_the_trip(sparse, tmp_path_factory, theta, scaling, old_names):
    place = tmp_path_factory.mktemp("rope")
    new_form = {"rope_parameters": {"rope_theta": theta, "rope_type": "default", **scaling}}
    old_form = {"rope_parameters": None, "rope_theta": theta, "rope_scaling": scaling or None}
    model = with_config(sparse, place / "ours", **(old_form if old_names else new_form))
    export_published(model, new(place / "theirs"), "camelidae")
    assert json.loads((place / "theirs/config.json").read_text())["rope_theta"] == theta
    import_published(place / "theirs", new(place / "again"))
    before, after = (architecture("llama").config.from_pretrained(place / name).rope_parameters for name in ("ours", "again"))
    after.pop("type", None)
    assert after == before


def test_a_rope_base_that_their_code_ignores_is_said(sparse, tmp_path, caplog):
    model = with_config(sparse, tmp_path / "ours", rope_parameters={"rope_theta": 5e6, "rope_type": "default"})
    export_published(model, new(tmp_path / "out"), "camelidae")
    assert "computes with 10000" in caplog.text


REFUSED = {
    "biases": ({"attention_bias": True}, "attention_bias, which no published layout can express"),
    "wide heads": ({"head_dim": 16}, r"head_dim 16, but the published layouts compute it as 8"),
    "yarn": ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}}, "RoPE of the type 'yarn'"),
    "an option that is not known": ({"pesc": {"num_experts": 4, "colour": "red"}}, "unknown fields: colour"),
    "another width": ({"intermediate_size": 48}, r"config\.json says \[48, 32\]"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_layout_cannot_say_is_refused_by_name(sparse, tmp_path, case):
    fields, message = REFUSED[case]
    with pytest.raises(ModelError, match=message):
        export_published(with_config(sparse, tmp_path / "ours", **fields), new(tmp_path / "out"), "camelidae")


def test_a_sparse_option_of_tomorrow_is_refused_too(sparse, tmp_path, monkeypatch):
    """Whatever PescConfig gains, an export in a layout that has no word for it is refused, not silently wrong."""
    tomorrow = dataclasses.make_dataclass("PescConfig", [("gate", str, "softmax")], bases=(PescConfig,), frozen=True)
    monkeypatch.setattr(pesc.moe.config, "PescConfig", tomorrow)
    block = json.loads((sparse / "config.json").read_text())["pesc"]
    with pytest.raises(ModelError, match=r"pesc\.gate 'sigmoid', which no published layout can express .*'softmax'"):
        export_published(with_config(sparse, tmp_path / "ours", pesc=block | {"gate": "sigmoid"}), new(tmp_path / "out"), "camelidae")


def test_architectures_without_the_layout_hear_what_is_possible(sparse, tmp_path):
    with pytest.raises(ModelError, match=r"llama model, which has no sparsetral layout: possible are llama as camelidae"):
        export_published(sparse, new(tmp_path / "out"), "sparsetral")
    save_dense(tmp_path / "qwen3", "qwen3")
    save_sparse(tmp_path / "qwen3", tmp_path / "sparse")
    with pytest.raises(ModelError, match="qwen3 model, which has no camelidae layout"):
        export_published(tmp_path / "sparse", tmp_path / "out", "camelidae")
    with pytest.raises(ModelError, match="is a dense qwen3 model"):
        export_published(tmp_path / "qwen3", tmp_path / "out", "camelidae")


def test_seed_and_dispatch_change_no_trained_model(sparse, tmp_path):
    block = json.loads((sparse / "config.json").read_text())["pesc"]
    export_published(
        with_config(sparse, tmp_path / "ours", pesc=block | {"seed": 7, "dispatch": "dense"}), new(tmp_path / "out"), "camelidae"
    )
    assert (tmp_path / "out/tokenizer.json").is_file()


def test_an_extra_tensor_is_refused(tmp_path):
    save_published(tmp_path / "hand", "mistral", "{}", "sparsetral")
    import_published(tmp_path / "hand", new(tmp_path / "ours"))
    tensors = load_file(tmp_path / "ours/model.safetensors") | {"model.layers.0.mlp.extra.weight": torch.ones(2)}
    save_file(tensors, tmp_path / "ours/model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"model\.layers\.0\.mlp\.extra\.weight, which a pesc_mistral"):
        export_published(tmp_path / "ours", new(tmp_path / "out"), "sparsetral")


def test_rows_of_a_bank_are_read_alone(sparse):
    directory = TensorDirectory(sparse)
    name = "model.layers.1.mlp.adapters.down"
    assert torch.equal(directory.read_row(name, 2), directory.read(name)[2])
