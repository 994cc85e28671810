"""Published checkpoints load, and compute what the reference code computed."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import pesc.models
from pesc.errors import ModelError
from pesc.models.config import UpcycleConfig
from pesc.models.factory import architecture
from pesc.models.published import import_published
from pesc.models.upcycle import upcycle_directory
from pesc.moe.balance import RouterRecorder
from pesc.moe.layer import set_dispatch
from tests.models.builders import save_published

pesc.models.register()
GOLDEN = UpcycleConfig(num_experts=8, top_k=2, adapter_dim=16, scaling=0.25)


@pytest.fixture
def golden(shared_data):
    return shared_data / "golden/camelidae-tiny"


@pytest.mark.parametrize("mode", ["reference", "dense", "grouped"])
def test_logits_and_routing_equal_the_reference_codes(golden, tmp_path, mode):
    upcycle_directory(golden, tmp_path, GOLDEN)
    model, loading = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not any(loading.values()), loading
    set_dispatch(model, mode)
    expected = load_file(golden / "expected.safetensors")
    with torch.no_grad(), RouterRecorder(model) as recorder:
        logits = model(expected["input_ids"]).logits
    assert (logits - expected["logits"]).abs().max() <= 5e-5
    for layer, found in enumerate(recorder.counted().values()):
        assert (found - expected[f"router_logits.{layer}"]).abs().max() <= 5e-5


def test_the_golden_logits_notice_a_wrong_scaling(golden, tmp_path):
    import_published(golden, tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert fields["pesc"]["scaling"] == 0.25
    fields["pesc"]["scaling"] = 1.0
    (tmp_path / "config.json").write_text(json.dumps(fields))
    expected = load_file(golden / "expected.safetensors")
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)(expected["input_ids"]).logits
    assert (logits - expected["logits"]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("model_type", "expert", "published_type", "fields"),
    [
        ("qwen2", "expert_{}", "qwen2idae", {"moe_scaling": 0.25}),
        ("mistral", "{}", "sparsetral", {}),
        ("llama", "expert_{}", "llama", {"moe_scaling": 0.5}),
    ],
    ids=["qwen2idae", "sparsetral", "re-saved camelidae"],
)
def test_every_published_layout_loads(tmp_path, model_type, expert, published_type, fields):
    model = save_published(tmp_path / "published", model_type, expert, published_type, **fields)
    (tmp_path / "out").mkdir()
    block = import_published(tmp_path / "published", tmp_path / "out")
    assert block["scaling"] == fields.get("moe_scaling", 1.0)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert type(again) is architecture(model_type).causal_lm
    ids = torch.arange(12)[None]
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert not list((tmp_path / "out").glob("*.py"))


def test_a_lost_expert_and_wrong_settings_are_refused(tmp_path):
    save_published(tmp_path / "published", "llama", "expert_{}", "camelidae", moe_scaling=0.5)
    (tmp_path / "out").mkdir()
    with pytest.raises(ModelError, match=r"set upcycle\.num_experts=4"):
        upcycle_directory(tmp_path / "published", tmp_path / "out", UpcycleConfig())
    tensors = load_file(tmp_path / "published/model.safetensors")
    del tensors["model.layers.1.mlp.moe_adapter.experts.expert_3.adapter_up.weight"]
    save_file(tensors, tmp_path / "published/model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"experts \[0, 1, 2\] in model\.layers\.1\.mlp\.adapters\.up"):
        import_published(tmp_path / "published", tmp_path / "out")


def test_a_pickle_that_wants_to_run_code_is_not_obeyed(golden, tmp_path):
    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "pwned"), "w"))

    shutil.copytree(golden, tmp_path / "copy", copy_function=shutil.copyfile)
    (tmp_path / "copy").chmod(0o755)
    torch.save({"x": Payload()}, tmp_path / "copy/pytorch_model-00001-of-00002.bin")
    (tmp_path / "out").mkdir()
    with pytest.raises(ModelError, match="not a plain file of tensors"):
        import_published(tmp_path / "copy", tmp_path / "out")
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(("model_type", "published_type", "scaling"), [("llama", "llama", 0.25), ("mistral", "sparsetral", 1.0)])
def test_what_a_config_leaves_out_is_what_its_class_says(tmp_path, model_type, published_type, scaling):
    save_published(tmp_path / "published", model_type, "{}", published_type)
    path = tmp_path / "published/config.json"
    fields = json.loads(path.read_text())
    assert "moe_scaling" not in fields
    fields.pop("rope_parameters")
    path.write_text(json.dumps(fields))
    (tmp_path / "out").mkdir()
    assert import_published(tmp_path / "published", tmp_path / "out")["scaling"] == scaling
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "out").config
    assert config.rope_parameters == {"rope_theta": 10_000.0, "rope_type": "default"}


def test_biases_of_qwen_and_rotary_buffers_are_accounted_for(tmp_path):
    save_published(tmp_path / "published", "qwen2", "expert_{}", "qwen2idae")
    path = tmp_path / "published/model.safetensors"
    tensors = load_file(path)
    assert "model.layers.0.self_attn.q_proj.bias" in tensors
    save_file(tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, path)
    (tmp_path / "out").mkdir()
    import_published(tmp_path / "published", tmp_path / "out")
    written = load_file(tmp_path / "out/model.safetensors")
    assert torch.equal(written["model.layers.0.self_attn.q_proj.bias"], tensors["model.layers.0.self_attn.q_proj.bias"])
    assert not [name for name in written if "inv_freq" in name]
    del tensors["model.layers.1.self_attn.v_proj.bias"]
    save_file(tensors, path)
    (tmp_path / "two").mkdir()
    with pytest.raises(ModelError, match=r"lacks the tensor model\.layers\.1\.self_attn\.v_proj\.bias"):
        import_published(tmp_path / "published", tmp_path / "two")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.layers.0.mlp.moe_adapter.experts.1.adapter_up.weight", "the same expert twice"),
        ("model.layers.0.mlp.moe_adapter.experts.experts_0_1.adapter_up.weight", "a layout of experts that is not known"),
        ("model.layers.0.self_attn.q_norm.weight", "which a pesc_llama of this config.json does not have"),
    ],
)
def test_tensors_that_have_no_place_are_refused(tmp_path, name, message):
    save_published(tmp_path / "published", "llama", "expert_{}", "camelidae")
    path = tmp_path / "published/model.safetensors"
    save_file(load_file(path) | {name: torch.ones(32, 8)}, path)
    (tmp_path / "out").mkdir()
    with pytest.raises(ModelError, match=message):
        import_published(tmp_path / "published", tmp_path / "out")
