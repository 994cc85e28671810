"""Upcycling links the dense shards, adds the bank, and is the same bytes every time."""

import hashlib
import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from pesc.errors import ModelError
from pesc.models.config import UpcycleConfig
from pesc.models.tensor_files import TensorDirectory, TensorSpec, plan_shards, read_header, write_tensors
from pesc.models.upcycle import build, upcycle_directory
from pesc.stage import StageContext
from tests.models.builders import UPCYCLE, save_dense, save_sparse


def test_dense_shards_are_hard_links_and_companions_come_along(tmp_path):
    save_dense(tmp_path / "dense", shard_size="40KB")
    save_sparse(tmp_path / "dense", tmp_path / "sparse")
    shards = [path.name for path in (tmp_path / "dense").glob("model-*.safetensors")]
    assert len(shards) > 1
    for name in (*shards, "tokenizer.json", "generation_config.json", "chat_template.jinja"):
        assert os.path.samefile(tmp_path / "dense" / name, tmp_path / "sparse" / name)
    assert not os.path.samefile(tmp_path / "dense/config.json", tmp_path / "sparse/config.json")


def test_a_single_dense_file_does_not_hide_the_bank(tmp_path):
    """transformers reads `model.safetensors` alone when there is one, whatever an index says."""
    save_dense(tmp_path / "dense")
    save_sparse(tmp_path / "dense", tmp_path / "sparse")
    assert not (tmp_path / "sparse/model.safetensors").exists()
    index = json.loads((tmp_path / "sparse/model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {"model-00001-of-00001.safetensors", "bank.safetensors"}
    assert set(index["weight_map"]) == set(TensorDirectory(tmp_path / "sparse").specs)
    assert index["metadata"]["total_size"] == sum(spec.num_bytes for spec in TensorDirectory(tmp_path / "sparse").specs.values())


def test_equal_settings_are_equal_bytes_and_a_seed_changes_the_bank_alone(tmp_path):
    save_dense(tmp_path / "dense")
    for name, seed in (("one", 42), ("two", 42), ("three", 43)):
        save_sparse(tmp_path / "dense", tmp_path / name, UPCYCLE.model_copy(update={"seed": seed}))
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    different = {
        name: [(tmp_path / "one" / name).read_bytes() != (tmp_path / other / name).read_bytes() for other in ("two", "three")]
        for name in names
    }
    assert {name: flags for name, flags in different.items() if any(flags)} == {
        "bank.safetensors": [False, True],
        "config.json": [False, True],
    }


@pytest.mark.parametrize(
    ("dtype", "digest"),
    [
        ("bfloat16", "ef56940c1836ecd312c64b90c0b8ed364ad5d7f51076b6217650dc5b09f9bcf9"),
        ("float32", "876006a10654fbebcd568616daa147c6010d095f9b8898f96b742bae2a10da7a"),
    ],
)
def test_the_bank_is_the_same_bytes_as_ever(tmp_path, dtype, digest):
    save_dense(tmp_path / "dense")
    save_sparse(tmp_path / "dense", tmp_path / "sparse", UPCYCLE.model_copy(update={"dtype": dtype}))
    assert hashlib.sha256((tmp_path / "sparse/bank.safetensors").read_bytes()).hexdigest() == digest


def test_a_dense_shard_is_never_written_over(tmp_path):
    """A shard of the bank's name would be a hard link that the bank is then written into."""
    save_dense(tmp_path / "dense", shard_size="40KB")
    index = tmp_path / "dense/model.safetensors.index.json"
    shard = sorted((tmp_path / "dense").glob("model-*.safetensors"))[0]
    index.write_text(index.read_text().replace(shard.name, "bank.safetensors"))
    shard.rename(tmp_path / "dense/bank.safetensors")
    before = (tmp_path / "dense/bank.safetensors").read_bytes()
    with pytest.raises(ModelError, match=r"a shard named bank\.safetensors"):
        save_sparse(tmp_path / "dense", tmp_path / "sparse")
    assert (tmp_path / "dense/bank.safetensors").read_bytes() == before


def test_nothing_of_the_machine_is_in_the_config(tmp_path):
    save_dense(tmp_path / "dense")
    path = tmp_path / "dense/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_name_or_path": str(tmp_path), "auto_map": {"AutoConfig": "x.Y"}}))
    save_sparse(tmp_path / "dense", tmp_path / "sparse")
    text = (tmp_path / "sparse/config.json").read_text()
    assert str(tmp_path) not in text
    assert "auto_map" not in text
    assert json.loads(text)["rope_parameters"] == json.loads(path.read_text())["rope_parameters"]


def test_the_stage_reports_parameters(tmp_path):
    save_dense(tmp_path / "dense", tie_word_embeddings=True)
    (tmp_path / "out").mkdir()
    seen = []
    context = StageContext("upcycle[pesc]", UPCYCLE, {"model": tmp_path / "dense"}, tmp_path / "out", tmp_path, on_progress=seen.append)
    metrics = build(context).metrics
    bank = load_file(tmp_path / "out/bank.safetensors")
    assert metrics["added_parameters"] == sum(tensor.numel() for tensor in bank.values()) == 2 * (2 * 4 * 8 * 32 + 4 * 32)
    assert metrics["active_parameters"] == metrics["total_parameters"] - 2 * 2 * 2 * 8 * 32  # two idle experts in two layers
    assert metrics["dense_parameters"] == sum(t.numel() for t in load_file(tmp_path / "dense/model.safetensors").values())
    assert seen[-1].done == seen[-1].total == 6
    assert all(not tensor.any() for name, tensor in bank.items() if name.endswith(".up"))
    assert all(tensor.dtype == torch.bfloat16 for tensor in bank.values())


def spoil(directory, change):
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def set_config(directory, **fields):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


SPOILS = {
    "a lost tensor": (
        lambda d: spoil(d, lambda t: t.pop("model.layers.1.mlp.up_proj.weight")),
        r"lacks the tensor model\.layers\.1\.mlp\.up_proj",
    ),
    "another width": (lambda d: set_config(d, intermediate_size=48), r"config\.json says \[48, 32\]"),
    "a truncated file": (lambda d: os.truncate(d / "model.safetensors", 5000), "not a whole safetensors file"),
    "pickles alone": (lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"), r"the pickle pytorch_model\.bin"),
    "no config": (lambda d: (d / "config.json").unlink(), "no config.json"),
    "a quantised model": (lambda d: set_config(d, quantization_config={"quant_method": "gptq"}), r"quantised \(gptq\)"),
    "a sparse model": (lambda d: set_config(d, model_type="pesc_llama"), "sparse model already"),
    "an encoder": (lambda d: set_config(d, model_type="bert"), "no sparse form of model_type 'bert'"),
}


@pytest.mark.parametrize("case", SPOILS)
def test_a_model_that_cannot_be_upcycled_is_refused(tmp_path, case):
    change, message = SPOILS[case]
    save_dense(tmp_path / "dense")
    change(tmp_path / "dense")
    with pytest.raises(ModelError, match=message):
        save_sparse(tmp_path / "dense", tmp_path / "sparse")


def test_a_lost_shard_is_named(tmp_path):
    save_dense(tmp_path / "dense", shard_size="40KB")
    shard = sorted((tmp_path / "dense").glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ModelError, match=shard.name):
        save_sparse(tmp_path / "dense", tmp_path / "sparse")


def test_links_fall_back_to_copies(tmp_path, monkeypatch):
    def refuse(*_arguments):
        raise OSError("another file system")

    save_dense(tmp_path / "dense")
    monkeypatch.setattr(os, "link", refuse)
    save_sparse(tmp_path / "dense", tmp_path / "sparse")
    assert (tmp_path / "sparse/tokenizer.json").read_bytes() == (tmp_path / "dense/tokenizer.json").read_bytes()
    assert not os.path.samefile(tmp_path / "sparse/tokenizer.json", tmp_path / "dense/tokenizer.json")


def test_streamed_files_are_what_safetensors_reads(tmp_path):
    tensors = {
        "b": torch.randn(3, 5).bfloat16(),
        "a": torch.randn(2, 1, 7),
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(3.5),
        "count": torch.arange(4),
    }
    codes = {torch.bfloat16: "BF16", torch.float32: "F32", torch.int64: "I64"}
    specs = {name: TensorSpec(codes[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}
    write_tensors(tmp_path / "x.safetensors", specs, tensors.__getitem__)
    read = load_file(tmp_path / "x.safetensors")
    assert read_header(tmp_path / "x.safetensors") == specs
    for name, tensor in tensors.items():
        assert torch.equal(read[name], tensor), name
    with pytest.raises(ValueError, match="announced"):
        write_tensors(tmp_path / "y.safetensors", {"a": TensorSpec("F32", (2, 7))}, tensors.__getitem__)


def test_shards_are_cut_at_the_limit():
    specs = {name: TensorSpec("U8", (size,)) for name, size in {"a": 4, "b": 4, "c": 9, "d": 1, "e": 8}.items()}
    assert [list(shard) for shard in plan_shards(specs, 8)] == [["a", "b"], ["c"], ["d"], ["e"]]


def test_defaults_are_the_papers():
    config = UpcycleConfig()
    assert (config.num_experts, config.top_k, config.adapter_dim, config.scaling) == (8, 2, 512, 1.0)
    with pytest.raises(ValueError, match="cannot use more experts"):
        UpcycleConfig(num_experts=2, top_k=3)


@pytest.mark.parametrize("model_type", ["mistral", "qwen2"])
def test_plain_function_needs_no_stage(tmp_path, model_type):
    save_dense(tmp_path / "dense", model_type)
    (tmp_path / "sparse").mkdir()
    upcycle_directory(tmp_path / "dense", tmp_path / "sparse", UPCYCLE)
    assert json.loads((tmp_path / "sparse/config.json").read_text())["model_type"] == f"pesc_{model_type}"
