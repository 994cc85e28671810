"""A merge that went wrong in one place is refused, and the refusal names the place.

Each mutation spoils what a merge has written, or the merge itself; the proof reads the trained files anew and must find it.  Two trainings
are merged: a strong one, and a light one whose LoRA moves most weights by less than one rounding to bf16, where a proof that merely allows
a rounding sees nothing.
"""

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from pesc.errors import ModelError
from pesc.models.config import MergeConfig
from pesc.models.merge import read_parts
from pesc.models.merge_write import write_merged
from pesc.models.proof import prove, read_prompts
from pesc.models.tensor_files import TensorDirectory
from tests.models.builders import rewrite_weights, save_blocks, save_dense, save_sparse, save_trained, without

SQUARE = "model.layers.1.self_attn.q_proj.weight"
OTHER_SQUARE = "model.layers.1.self_attn.o_proj.weight"
FFN = "model.layers.{}.mlp.up_proj.weight"
UP, DOWN, ROUTER = (f"model.layers.1.mlp.{part}" for part in ("adapters.up", "adapters.down", "router.weight"))
LIGHT = 0.003
"""Factor on the trained B of the light training: its largest change of a weight is about a rounding to bf16."""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A sparse model, a strong and a light training of it, prompts."""
    root = tmp_path_factory.mktemp("mutations")
    save_sparse(save_dense(root / "dense", tie_word_embeddings=True), root / "sparse")
    save_trained(root / "sparse", root / "strong")
    shutil.copytree(root / "strong", root / "light")
    path = root / "light/adapter/adapter_model.safetensors"
    tensors = load_file(path)
    save_file({name: t * LIGHT if ".lora_B." in name else t for name, t in tensors.items()}, path, {"format": "pt"})
    save_blocks(root / "blocks")
    return root


def parts_of(world, training="light", **settings):
    config = MergeConfig(**settings)
    return read_parts(world / "sparse", world / training, config), config


def check(world, parts, out, config):
    return prove(parts, out, read_prompts(world / "blocks", 2), config)


def swap_rows(tensor, one, other):
    rows = list(range(len(tensor)))
    rows[one], rows[other] = other, one
    return tensor[rows]


def drop_expert(tensors):
    tensors[UP][2] = 0
    tensors[DOWN][2] = 0


SPOILT = {
    "one expert dropped": (drop_expert, DOWN),
    "one expert cut off": (lambda t: t.update({UP: t[UP][:-1]}), UP),
    "two experts swapped": (lambda t: t.update({UP: swap_rows(t[UP], 0, 3)}), UP),
    "two experts swapped in every tensor of a layer": (lambda t: t.update({n: swap_rows(t[n], 0, 3) for n in (UP, DOWN, ROUTER)}), DOWN),
    "a square matrix transposed": (lambda t: t.update({SQUARE: t[SQUARE].T}), SQUARE),
    "a router zeroed": (lambda t: t[ROUTER].zero_(), ROUTER),
    "a bank scaled": (lambda t: t[UP].mul_(0.25), UP),
    "a norm changed by one rounding": (lambda t: t["model.norm.weight"][3].mul_(1 + 2**-7), r"model\.norm\.weight"),
    "an embedding off in one place": (lambda t: t["model.embed_tokens.weight"][9, 9].mul_(1 + 2**-6), "embed_tokens"),
    "a tensor lost": (lambda t: t.pop("model.layers.0.input_layernorm.weight"), r"layers\.0\.input_layernorm"),
    "a head beside tied embeddings": (lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] * 2}), r"lm_head\.weight"),
}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("case", SPOILT)
def test_a_spoilt_result_is_refused_by_name(world, tmp_path, case, dtype):
    change, name = SPOILT[case]
    parts, config = parts_of(world, dtype=dtype)
    write_merged(parts, tmp_path, config)
    check(world, parts, tmp_path, config)
    rewrite_weights(tmp_path, change)
    with pytest.raises(ModelError, match=name):
        check(world, parts, tmp_path, config)


def swapped(pairs, one, other):
    return {**pairs, one: pairs[other], other: pairs[one]}


WRONG_FOLDS = {
    "one LoRA skipped": (lambda lora: {"pairs": without(lora.pairs, FFN.format(1))}, FFN.format(1)),
    "LoRA of two square projections swapped": (lambda lora: {"pairs": swapped(lora.pairs, SQUARE, OTHER_SQUARE)}, OTHER_SQUARE),
    "LoRA of two layers swapped": (lambda lora: {"pairs": swapped(lora.pairs, FFN.format(0), FFN.format(1))}, FFN.format(0)),
    "the factor taken twice": (lambda lora: {"scaling": lora.scaling**2}, r"model\.layers\.0"),
    "a factor of 0.25 as well": (lambda lora: {"scaling": lora.scaling * 0.25}, r"model\.layers\.0"),
    "the factor of another rank": (lambda lora: {"scaling": lora.scaling / 2}, r"model\.layers\.0"),
}


@pytest.mark.parametrize("training", ["strong", "light"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("case", WRONG_FOLDS)
def test_a_wrong_fold_is_refused_by_name(world, tmp_path, case, dtype, training):
    mutate, name = WRONG_FOLDS[case]
    parts, config = parts_of(world, training, dtype=dtype)
    wrong = dataclasses.replace(parts, lora=dataclasses.replace(parts.lora, **mutate(parts.lora)))
    write_merged(wrong, tmp_path, config)
    with pytest.raises(ModelError, match=name):
        check(world, parts, tmp_path, config)


@pytest.mark.parametrize(("field", "value"), [("scaling", 0.25), ("top_k", 1), ("adapter_input", "ffn_input")])
def test_another_setting_of_the_experts_is_refused_by_name(world, tmp_path, field, value):
    """The reference's merge assumes scaling 0.25 where its training had 1: no tensor is wrong, and the model is."""
    parts, config = parts_of(world)
    write_merged(parts, tmp_path, config)
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text())
    fields["pesc"][field] = value
    path.write_text(json.dumps(fields))
    with pytest.raises(ModelError, match=field):
        check(world, parts, tmp_path, config)


def test_a_changed_rope_base_is_refused(world, tmp_path):
    parts, config = parts_of(world)
    write_merged(parts, tmp_path, config)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 1e-3}))
    with pytest.raises(ModelError, match="rms_norm_eps"):
        check(world, parts, tmp_path, config)


@pytest.mark.parametrize("training", ["strong", "light"])
def test_the_disagreement_in_bf16_is_that_of_rounding_alone(world, tmp_path, training):
    parts, config = parts_of(world, training)
    write_merged(parts, tmp_path, config)
    logits = check(world, parts, tmp_path, config)["logits"]
    assert logits["relative_rms_of_rounding"] > 0
    assert logits["relative_rms_difference"] == pytest.approx(logits["relative_rms_of_rounding"], rel=0.05)


def test_in_fp32_merged_equals_unmerged(world, tmp_path):
    parts, config = parts_of(world, "strong", dtype="float32")
    write_merged(parts, tmp_path, config)
    proof = check(world, parts, tmp_path, config)
    assert proof["logits"]["max_difference"] <= 1e-4
    assert set(proof["routing"].values()) == {1.0}


@pytest.mark.parametrize(("name", "start"), [(ROUTER, "router.weight"), (DOWN, "adapters.down")])
def test_what_was_declared_trained_and_did_not_move_is_refused(world, tmp_path, name, start):
    shutil.copytree(world / "light", tmp_path / "frozen")
    bank = load_file(tmp_path / "frozen/bank.safetensors")
    bank[name] = TensorDirectory(world / "sparse").read(name)
    save_file(bank, tmp_path / "frozen/bank.safetensors", {"format": "pt"})
    parts = read_parts(world / "sparse", tmp_path / "frozen", MergeConfig())
    (tmp_path / "out").mkdir()
    with pytest.raises(ModelError, match=rf"{start}.* is what it was before the training"):
        write_merged(parts, tmp_path / "out", MergeConfig())


def test_a_lora_that_rounding_swallows_whole_is_refused(world, tmp_path):
    shutil.copytree(world / "light", tmp_path / "faint")
    path = tmp_path / "faint/adapter/adapter_model.safetensors"
    save_file({name: t * 1e-9 if "q_proj.lora_B" in name else t for name, t in load_file(path).items()}, path, {"format": "pt"})
    parts = read_parts(world / "sparse", tmp_path / "faint", MergeConfig())
    (tmp_path / "out").mkdir()
    with pytest.raises(ModelError, match=r"q_proj\.weight .*set merge\.dtype to float32"):
        write_merged(parts, tmp_path / "out", MergeConfig())


def test_shapes_and_types_are_in_the_ledger(world, tmp_path):
    parts, config = parts_of(world)
    ledger = {entry["name"]: entry for entry in write_merged(parts, tmp_path, config)}
    specs = TensorDirectory(tmp_path).specs
    assert {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in ledger.items()} == {
        name: (spec.dtype, spec.shape) for name, spec in specs.items()
    }
    start = TensorDirectory(world / "sparse")
    for name in (SQUARE, UP, "model.norm.weight"):
        moved = (TensorDirectory(tmp_path).read(name).float() - start.read(name).float()).norm()
        assert ledger[name]["change"] == pytest.approx(moved.item(), rel=1e-3)
    assert torch.equal(TensorDirectory(tmp_path).read(ROUTER), load_file(world / "light/bank.safetensors")[ROUTER])
