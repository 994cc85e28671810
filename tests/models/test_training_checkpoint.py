"""A training checkpoint of the reference code becomes a model: LoRA folded into the base, experts stacked."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pesc.errors import ModelError
from pesc.models.config import UpcycleConfig
from pesc.models.training_checkpoint import import_training, is_training_checkpoint
from tests.models.builders import PROJECTIONS, save_dense, save_sparse, save_trained

SETTINGS = UpcycleConfig(num_experts=4, top_k=2, adapter_dim=8, scaling=0.5)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A dense base, what was trained on it, and the same as the reference code's callback leaves it, written by hand."""
    root = tmp_path_factory.mktemp("training")
    save_dense(root / "base", dtype=torch.float32, shard_size="40KB")
    save_sparse(root / "base", root / "sparse", SETTINGS)
    save_trained(root / "sparse", root / "trained")
    checkpoint = root / "checkpoint-6"
    checkpoint.mkdir()
    shutil.copytree(root / "trained/adapter", checkpoint / "adapter_model")
    experts = {}
    for name, tensor in load_file(root / "trained/bank.safetensors").items():
        prefix, part = f"base_model.model.{name}".split(".mlp.")
        if part == "router.weight":
            experts[f"{prefix}.mlp.moe_adapter.router.weight"] = tensor
        for index in range(4) if part != "router.weight" else ():
            key = f"{prefix}.mlp.moe_adapter.experts.expert_{index}.adapter_{part.removeprefix('adapters.')}.weight"
            experts[key] = (tensor[index].T if part.endswith("up") else tensor[index]).clone()
    torch.save(experts, checkpoint / "moe_model.bin")
    return root


def copy_of(world, tmp_path):
    return shutil.copytree(world / "checkpoint-6", tmp_path / "checkpoint-6")


def read(checkpoint, world, out, top_k=2, scaling=0.5):
    out.mkdir()
    return import_training(checkpoint, world / "base", out, top_k, scaling)


def test_it_computes_what_peft_and_the_trained_bank_compute(world, tmp_path):
    done = read(world / "checkpoint-6", world, tmp_path / "out")
    assert done == {"folded": 2 * len(PROJECTIONS), "copied": 2 * 2 + 3, "stacked": 2 * 3}
    again, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, output_loading_info=True)
    assert not any(loading.values()), loading
    expected = AutoModelForCausalLM.from_pretrained(world / "sparse", dtype=torch.float32)
    start = expected(torch.arange(20)[None]).logits
    expected = PeftModel.from_pretrained(expected, world / "trained/adapter").merge_and_unload()
    expected.load_state_dict(load_file(world / "trained/bank.safetensors"), strict=False)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert (again(ids).logits - expected(ids).logits).abs().max() < 1e-4
        assert (again(ids).logits - start).abs().max() > 0.1
    assert json.loads((tmp_path / "out/config.json").read_text())["pesc"]["scaling"] == 0.5
    assert (tmp_path / "out/tokenizer.json").is_file()


def test_the_fold_is_the_formula(world, tmp_path):
    """W + alpha / r · B · A, with alpha 8 and r 4, worked out here."""
    read(world / "checkpoint-6", world, tmp_path / "out")
    lora = load_file(world / "trained/adapter/adapter_model.safetensors")
    key = "base_model.model.model.layers.1.self_attn.q_proj.lora_{}.weight"
    name = "model.layers.1.self_attn.q_proj.weight"
    base = {k: t for path in (world / "base").glob("*.safetensors") for k, t in load_file(path).items()}
    expected = base[name] + 2 * lora[key.format("B")] @ lora[key.format("A")]
    assert torch.equal(load_file(tmp_path / "out/model.safetensors")[name], expected)


def test_the_pickled_adapters_of_older_peft_are_read(world, tmp_path):
    checkpoint = copy_of(world, tmp_path)
    adapter = checkpoint / "adapter_model/adapter_model.safetensors"
    torch.save(load_file(adapter), adapter.with_suffix(".bin"))
    adapter.unlink()
    read(world / "checkpoint-6", world, tmp_path / "one")
    read(checkpoint, world, tmp_path / "two")
    assert (tmp_path / "one/model.safetensors").read_bytes() == (tmp_path / "two/model.safetensors").read_bytes()


def change_experts(checkpoint, change):
    experts = torch.load(checkpoint / "moe_model.bin", weights_only=True)
    change(experts)
    torch.save(experts, checkpoint / "moe_model.bin")


def change_lora(checkpoint, change):
    path = checkpoint / "adapter_model/adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


EXPERT = "base_model.model.model.layers.1.mlp.moe_adapter.experts.expert_3.adapter_up.weight"
SPOILS = {
    "a lost expert": (lambda c: change_experts(c, lambda t: t.pop(EXPERT)), r"experts \[0, 1, 2\] in model\.layers\.1\.mlp\.adapters\.up"),
    "a lost layer": (
        lambda c: change_experts(c, lambda t: [t.pop(name) for name in list(t) if ".layers.1." in name]),
        r"lacks the tensor model\.layers\.1\.mlp\.router",
    ),
    "a wrong shape": (
        lambda c: change_experts(c, lambda t: t.update({EXPERT: torch.ones(32, 9)})),
        r"expert_3\.adapter_up\.weight as F32 \[32, 9\]",
    ),
    "a layer too many": (
        lambda c: change_experts(c, lambda t: t.update({n.replace(".layers.1.", ".layers.2."): x for n, x in list(t.items())})),
        r"model\.layers\.2\.mlp\.\S+, which a pesc_llama of this config\.json does not have",
    ),
    "a tensor that is no expert": (
        lambda c: change_experts(c, lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(2)})),
        r"base_model\.model\.lm_head\.weight, which is neither a router nor an expert",
    ),
    "not a number": (
        lambda c: change_experts(c, lambda t: t[EXPERT].fill_(float("nan"))),
        "not a number in model.layers.1.mlp.adapters.up",
    ),
    "no adapter": (lambda c: shutil.rmtree(c / "adapter_model"), "no adapter_config.json"),
    "half a LoRA": (
        lambda c: change_lora(c, lambda t: t.pop("base_model.model.model.layers.0.mlp.up_proj.lora_B.weight")),
        r"lost lora_B of model\.layers\.0\.mlp\.up_proj",
    ),
    "no expert": (lambda c: torch.save({}, c / "moe_model.bin"), "has no router"),
}


@pytest.mark.parametrize("case", SPOILS)
def test_every_tensor_is_accounted_for(world, tmp_path, case):
    spoil, message = SPOILS[case]
    checkpoint = copy_of(world, tmp_path)
    spoil(checkpoint)
    with pytest.raises(ModelError, match=message):
        read(checkpoint, world, tmp_path / "out")


def test_settings_and_bases_that_cannot_be_are_refused(world, tmp_path):
    assert is_training_checkpoint(world / "checkpoint-6")
    assert not is_training_checkpoint(world / "base")
    with pytest.raises(ModelError, match=r"has 4 experts of width 8, so --top-k or --scaling cannot be right: top_k \(5\)"):
        read(world / "checkpoint-6", world, tmp_path / "one", top_k=5)
    (tmp_path / "two").mkdir()
    with pytest.raises(ModelError, match="sparse model already"):
        import_training(world / "checkpoint-6", world / "sparse", tmp_path / "two", 2, 1.0)
