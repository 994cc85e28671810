"""Merged equals unmerged, every tensor is accounted for, and whatever would be lost in silence is refused by name."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from pesc.data.chat import TEMPLATES
from pesc.errors import ModelError
from pesc.models.config import MergeConfig
from pesc.models.lora import read_lora
from pesc.models.merge import build, read_parts
from pesc.models.nf4 import quantized_weights, through_nf4
from pesc.models.tensor_files import TensorDirectory
from pesc.stage import StageContext
from tests.models.builders import PROJECTIONS, save_blocks, save_dense, save_sparse, save_trained


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A dense and a sparse model, and what was trained on each."""
    root = tmp_path_factory.mktemp("world")
    save_dense(root / "dense", tie_word_embeddings=True, shard_size="40KB")
    save_sparse(root / "dense", root / "sparse")
    save_trained(root / "dense", root / "qlora")
    save_trained(root / "sparse", root / "pesc", quantization="nf4")
    save_blocks(root / "blocks")
    return root


@pytest.fixture
def spoiled(world, tmp_path):
    """A copy of the sparse arm's train object, to be spoiled."""
    shutil.copytree(world / "pesc", tmp_path / "pesc")
    return tmp_path / "pesc"


def merge(world, model, trained, out, **settings):
    out.mkdir()
    inputs = {"model": world / model, "adapter": trained, "blocks": world / "blocks"}
    return build(StageContext("merge[test]", MergeConfig(**settings), inputs, out, out.parent / "work"))


def edit_tensors(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"})


@pytest.mark.parametrize("arm", [("sparse", "pesc"), ("dense", "qlora")], ids=lambda arm: arm[1])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merged_equals_unmerged(world, tmp_path, arm, dtype):
    model, trained = arm
    merge(world, model, world / trained, tmp_path / "out", dtype=dtype, max_shard_bytes=30_000)
    proof = json.loads((tmp_path / "out/proof.json").read_text())
    assert proof["logits"]["relative_rms_difference"] < (1e-5 if dtype == "float32" else 2e-2)
    assert proof["logits"]["relative_rms_effect_of_training"] > 0.1  # a proof on an untrained model would prove nothing
    assert proof["prompts"] == 3
    if model == "sparse":
        assert set(proof["routing"]) == {"model.layers.0.mlp.router", "model.layers.1.mlp.router"}
        assert all(share == 1 for share in proof["routing"].values()) or dtype == "bfloat16"
    ledger = json.loads((tmp_path / "out/ledger.json").read_text())["tensors"]
    assert sum(entry["action"] == "merged" for entry in ledger) == 2 * len(PROJECTIONS)
    assert sum(entry["action"] == "trained" for entry in ledger) == (6 if model == "sparse" else 0)
    assert {entry["name"] for entry in ledger} == set(TensorDirectory(tmp_path / "out").files)
    assert all((entry["change"] > 0) == (entry["action"] not in ("copied", "linked")) for entry in ledger)


def test_a_merged_model_talks_in_the_template_that_it_was_trained_with(world, tmp_path):
    model, blocks = tmp_path / "sparse", tmp_path / "blocks"
    shutil.copytree(world / "sparse", model)
    (model / "chat_template.jinja").write_text("its own")
    shutil.copytree(world / "blocks", blocks)
    for name, template in (("own", "its own"), ("trained", TEMPLATES["pesc"])):
        (tmp_path / name).mkdir()
        inputs = {"model": model, "adapter": world / "pesc", "blocks": blocks}
        build(StageContext("merge[test]", MergeConfig(), inputs, tmp_path / name, tmp_path / "work"))
        assert AutoTokenizer.from_pretrained(tmp_path / name).chat_template == template
        (blocks / "chat_template.jinja").write_text(TEMPLATES["pesc"])  # what tokenize leaves where the template is not the model's
    assert (model / "chat_template.jinja").read_text() == "its own", "it was a link"


def test_the_merged_directory_is_complete_and_keeps_tied_embeddings(world, tmp_path):
    merge(world, "sparse", world / "pesc", tmp_path / "out", max_shard_bytes=30_000)
    model, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(loading.values()), loading
    assert type(model).__name__ == "PescLlamaForCausalLM"
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head.weight" not in TensorDirectory(tmp_path / "out").files
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert model.generation_config.eos_token_id == 257
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=3)


@pytest.mark.parametrize("model_type", ["qwen2", "gemma2", "qwen3_5_text", "youtu"])
def test_other_architectures_merge(world, tmp_path, model_type):
    """Biases on q, k, v; tied embeddings, soft caps and norms after the FFN."""
    save_sparse(save_dense(tmp_path / "dense", model_type), tmp_path / "sparse")
    save_trained(tmp_path / "sparse", tmp_path / "trained", steps=3)
    merge(world, tmp_path / "sparse", tmp_path / "trained", tmp_path / "out", dtype="float32")
    ledger = json.loads((tmp_path / "out/ledger.json").read_text())["tensors"]
    copied = [entry["name"] for entry in ledger if entry["action"] == "copied"]
    assert any(name.endswith("q_proj.bias") for name in copied) == (model_type == "qwen2")
    assert json.loads((tmp_path / "out/config.json").read_text())["model_type"] == f"pesc_{model_type}"


def test_the_dense_control_stays_what_it_was(world, tmp_path):
    merge(world, "dense", world / "qlora", tmp_path / "out")
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "out")) is LlamaForCausalLM
    assert (tmp_path / "out/model.safetensors").is_file()


def test_a_shard_in_which_nothing_changes_is_linked(world, tmp_path):
    """The embedding has a shard of its own, and no LoRA."""
    small = save_sparse(save_dense(tmp_path / "dense", tie_word_embeddings=True, shard_size="18KB"), tmp_path / "small")
    merge(world, small, world / "pesc", tmp_path / "out")
    ledger = json.loads((tmp_path / "out/ledger.json").read_text())["tensors"]
    linked = [entry["name"] for entry in ledger if entry["action"] == "linked"]
    start, merged = TensorDirectory(small), TensorDirectory(tmp_path / "out")
    assert "model.embed_tokens.weight" in linked
    for name in start.files:
        same = (small / start.files[name]).samefile(tmp_path / "out" / merged.files[name])
        assert same == (name in linked), name
    _model, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(loading.values()), loading


def test_nothing_is_linked_into_another_dtype(world, tmp_path):
    merge(world, "sparse", world / "pesc", tmp_path / "out", dtype="float32")
    assert not any(entry["action"] == "linked" for entry in json.loads((tmp_path / "out/ledger.json").read_text())["tensors"])


def test_merging_twice_gives_the_same_bytes(world, tmp_path):
    for name in ("one", "two"):
        merge(world, "sparse", world / "pesc", tmp_path / name, max_shard_bytes=30_000)
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "two").iterdir())
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_dequantized_base_is_what_the_4_bit_model_computed_with(world, tmp_path):
    from pesc.models.nf4 import quantization_config

    model = AutoModelForCausalLM.from_pretrained(
        world / "sparse", quantization_config=quantization_config("bfloat16"), dtype=torch.bfloat16
    )
    fields = json.loads((world / "sparse/config.json").read_text())
    names = quantized_weights(fields)
    assert names == {f"{name}.weight" for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"}
    weights = TensorDirectory(world / "sparse")
    x = torch.eye(32, dtype=torch.bfloat16)
    module = model.train().model.layers[1].mlp.gate_proj  # in training mode, as bitsandbytes has a coarser kernel for inference on CPUs
    expected = through_nf4(weights.read("model.layers.1.mlp.gate_proj.weight"), "bfloat16")
    assert torch.equal(module(x).T, expected)
    assert not torch.equal(expected, weights.read("model.layers.1.mlp.gate_proj.weight"))

    merge(world, "sparse", world / "pesc", tmp_path / "out", base="dequantized", dtype="float32")
    folded = TensorDirectory(tmp_path / "out").read("model.layers.1.mlp.gate_proj.weight")
    delta = read_lora(world / "pesc/adapter", weights.specs).delta("model.layers.1.mlp.gate_proj.weight")
    assert torch.allclose(folded, expected.float() + delta, atol=1e-6)


def test_dequantized_base_needs_a_quantised_training(world, tmp_path):
    with pytest.raises(ModelError, match=r"merge\.base to original"):
        merge(world, "dense", world / "qlora", tmp_path / "out", base="dequantized")


ADAPTER, BANK = "adapter/adapter_model.safetensors", "bank.safetensors"
Q_PROJ = "base_model.model.model.layers.1.self_attn.q_proj.lora_{}.weight"
UP = "model.layers.0.mlp.adapters.up"


def drop_pair(tensors):
    del tensors[Q_PROJ.format("A")], tensors[Q_PROJ.format("B")]


SPOILS = {
    "a dropped matrix": (ADAPTER, lambda t: t.pop(Q_PROJ.format("B")), r"lost lora_B of model\.layers\.1\.self_attn\.q_proj"),
    "a dropped pair": (ADAPTER, drop_pair, r"no LoRA for model\.layers\.1\.self_attn\.q_proj"),
    "a transposed matrix": (ADAPTER, lambda t: t.update({Q_PROJ.format("A"): t[Q_PROJ.format("A")].T}), "transposed"),
    "an untrained matrix": (ADAPTER, lambda t: t[Q_PROJ.format("B")].zero_(), "never trained"),
    "a diverged matrix": (ADAPTER, lambda t: t[Q_PROJ.format("B")].fill_(float("nan")), "not a number"),
    "a foreign module": (
        ADAPTER,
        lambda t: t.update({"base_model.model.model.layers.9.x.lora_A.weight": torch.ones(4, 4)}),
        r"lost lora_B of model\.layers\.9\.x",
    ),
    "a stray tensor": (ADAPTER, lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(2)}), "no LoRA matrix"),
    "a dropped bank tensor": (BANK, lambda t: t.pop(UP), rf"lost {UP}"),
    "an extra bank tensor": (BANK, lambda t: t.update({"model.layers.2.mlp.adapters.up": torch.ones(1)}), "another model"),
    "a bank of another shape": (BANK, lambda t: t.update({UP: t[UP].transpose(1, 2)}), "needs"),
    "an untrained bank": (BANK, lambda t: t[UP].zero_(), "all zero"),
    "a diverged bank": (BANK, lambda t: t[UP].fill_(float("inf")), "not a number"),
}


@pytest.mark.parametrize("case", SPOILS)
def test_a_spoiled_train_object_is_refused_by_name(world, spoiled, tmp_path, case):
    file, change, message = SPOILS[case]
    edit_tensors(spoiled / file, change)
    with pytest.raises(ModelError, match=message):
        merge(world, "sparse", spoiled, tmp_path / "out")


def test_a_missing_bank_is_refused(world, spoiled, tmp_path):
    (spoiled / BANK).unlink()
    with pytest.raises(ModelError, match="drop every trained adapter"):
        merge(world, "sparse", spoiled, tmp_path / "out")


def test_a_bank_for_a_dense_model_is_refused(world, spoiled, tmp_path):
    with pytest.raises(ModelError, match="was trained on another model"):
        merge(world, "dense", spoiled, tmp_path / "out")
    training = json.loads((spoiled / "training.json").read_text())
    (spoiled / "training.json").write_text(json.dumps({name: training[name] for name in ("config", "trainable")}))
    with pytest.raises(ModelError, match="the model does not have"):
        merge(world, "dense", spoiled, tmp_path / "again")


@pytest.mark.parametrize(("group", "field"), [("lora", "tensors"), ("bank", "parameters"), ("router", "tensors")])
def test_what_training_declared_must_have_been_saved(world, spoiled, group, field):
    """The whole of one layer's LoRA could be missing from both config and weights; only the table of the training knows."""
    path = spoiled / "training.json"
    training = json.loads(path.read_text())
    next(row for row in training["trainable"] if row["group"] == group)[field] += 1
    path.write_text(json.dumps(training))
    with pytest.raises(ModelError, match=f"of the group '{group}' as trained"):
        read_parts(world / "sparse", spoiled, MergeConfig())


@pytest.mark.parametrize("field", ["use_dora", "modules_to_save", "rank_pattern", "lora_bias"])
def test_an_adapter_that_cannot_be_folded_is_refused(world, spoiled, field):
    path = spoiled / "adapter/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: ["lm_head"] if field == "modules_to_save" else {"q_proj": 2}}))
    with pytest.raises(ModelError, match="cannot fold"):
        read_parts(world / "sparse", spoiled, MergeConfig())


def test_a_wrong_scaling_fails_the_proof(world, tmp_path, monkeypatch):
    """A defect that no check of names and shapes can see: the fold itself is wrong."""
    from pesc.models.lora import LoraAdapter

    matrices = LoraAdapter.matrices

    def spoilt(self, weight):
        a_RI, b_OR = matrices(self, weight)
        return a_RI, b_OR * (0.5 if "layers.1.mlp.up_proj" in weight else 1)

    monkeypatch.setattr(LoraAdapter, "matrices", spoilt)
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight is not the trained one"):
        merge(world, "sparse", world / "pesc", tmp_path / "out")


def test_rank_stabilised_scaling_is_honoured(world, tmp_path):
    save_trained(world / "dense", tmp_path / "rs", use_rslora=True, target_modules=["q_proj", "down_proj"])
    merge(world, "dense", tmp_path / "rs", tmp_path / "out", dtype="float32")
    assert json.loads((tmp_path / "out/ledger.json").read_text())["lora_scaling"] == 8 / 2  # alpha over the root of rank 4


def test_no_prompt_means_no_proof_means_no_merge(world, tmp_path):
    (tmp_path / "blocks").mkdir()
    (tmp_path / "out").mkdir()
    inputs = {"model": world / "dense", "adapter": world / "qlora", "blocks": tmp_path / "blocks"}
    with pytest.raises(ModelError, match="has no prompt"):
        build(StageContext("merge[qlora]", MergeConfig(), inputs, tmp_path / "out", tmp_path))


def test_an_expert_that_no_token_chose_is_in_the_ledger(world, spoiled, tmp_path, caplog):
    edit_tensors(spoiled / BANK, lambda t: t[UP][3].zero_())
    merge(world, "sparse", spoiled, tmp_path / "out")
    ledger = {entry["name"]: entry for entry in json.loads((tmp_path / "out/ledger.json").read_text())["tensors"]}
    assert ledger[UP]["idle_experts"] == [3]
    assert "no token chose" in caplog.text
