"""What cannot be merged is refused in one sentence that names it, and nothing of it stays on the disk."""

import json
import os
import pickle
import shutil
import subprocess

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from pesc.errors import PescError
from pesc.models.config import MergeConfig, UpcycleConfig
from pesc.models.identity import model_digest
from pesc.models.merge import build
from pesc.models.tensor_files import TensorDirectory
from pesc.stage import StageContext
from tests.models.builders import save_blocks, save_dense, save_sparse, save_trained

ADAPTER, BANK = "adapter/adapter_model.safetensors", "bank.safetensors"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("bad")
    save_sparse(save_dense(root / "dense", tie_word_embeddings=True, shard_size="40KB"), root / "model")
    save_trained(root / "model", root / "trained")
    save_blocks(root / "blocks")
    return root


@pytest.fixture
def copies(world, tmp_path):
    """Copies of a model and of its training, to be spoilt."""
    for name in ("model", "trained"):
        shutil.copytree(world / name, tmp_path / name)
    return tmp_path


def refused(world, copies, out=None):
    """The sentence with which a merge of the copies is refused; nothing was written."""
    out = out or copies / "out"
    out.mkdir(parents=True)
    inputs = {"model": copies / "model", "adapter": copies / "trained", "blocks": world / "blocks"}
    with pytest.raises(PescError) as error:
        build(StageContext("merge[test]", MergeConfig(max_shard_bytes=30_000), inputs, out, out.parent))
    assert list(out.iterdir()) == []
    sentence = str(error.value)
    assert "\n" not in sentence
    assert sentence.endswith(".")
    return sentence


def edit_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_tensor(path, name, change):
    tensors = load_file(path)
    tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, path, {"format": "pt"})


def shard_of(model, name):
    return model / TensorDirectory(model).files[name]


def test_an_adapter_of_another_base(world, copies):
    """The same architecture, the same shapes, another model: only the digest knows."""
    name = "model.layers.1.mlp.up_proj.weight"
    edit_tensor(shard_of(copies / "model", name), name, lambda tensor: tensor + 0.01)
    sentence = refused(world, copies)
    assert "was trained on another model" in sentence
    assert model_digest(copies / "model")[:12] in sentence


def test_the_same_model_in_other_shards_is_the_same_model(world, tmp_path):
    save_sparse(save_dense(tmp_path / "dense", tie_word_embeddings=True, shard_size="18KB"), tmp_path / "model")
    assert len(set(TensorDirectory(tmp_path / "model").files.values())) > len(set(TensorDirectory(world / "model").files.values()))
    assert model_digest(tmp_path / "model") == model_digest(world / "model")


@pytest.mark.parametrize("shape", [{"adapter_dim": 16}, {"num_experts": 8}], ids=str)
def test_a_bank_of_other_dimensions(world, copies, shape):
    shutil.rmtree(copies / "model")
    save_sparse(world / "dense", copies / "model", UpcycleConfig(**{"num_experts": 4, "top_k": 2, "adapter_dim": 8} | shape))
    edit_json(copies / "trained/training.json", lambda t: t.pop("facts"))  # as an earlier version wrote it
    assert "model.layers.0.mlp.adapters.down as [4, 8, 32], but the model needs" in refused(world, copies)


def test_a_wrong_rank(world, copies):
    edit_json(copies / "trained/adapter/adapter_config.json", lambda config: config.update(r=8))
    assert "belongs to another model or rank" in refused(world, copies)


def test_a_missing_shard(world, copies):
    shard = shard_of(copies / "model", "model.norm.weight")
    shard.unlink()
    assert f"names the shard {shard.name}, but it is not there" in refused(world, copies)


@pytest.mark.parametrize("file", [f"trained/{ADAPTER}", f"trained/{BANK}", "model/shard"])
@pytest.mark.parametrize("kept", [0, 5, 0.5, -1], ids=["nothing", "five bytes", "half", "all but a byte"])
def test_a_truncated_file(world, copies, file, kept):
    path = shard_of(copies / "model", "model.norm.weight") if file == "model/shard" else copies / file
    size = path.stat().st_size
    os.truncate(path, int(kept * size) if isinstance(kept, float) else kept % size if kept < 0 else kept)
    sentence = refused(world, copies)
    assert f"{path} is not a whole safetensors file" in sentence


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("protocol", ["torch", "plain"])
def test_an_adapter_that_is_a_pickle_with_code_in_it(world, copies, protocol):
    (copies / "trained" / ADAPTER).unlink()
    bomb, path = {"base_model.model.x.lora_A.weight": Bomb(copies / "executed")}, copies / "trained/adapter/adapter_model.bin"
    torch.save(bomb, path) if protocol == "torch" else path.write_bytes(pickle.dumps(bomb))
    assert f"{path} is not a plain file of tensors, so it is not opened" in refused(world, copies)
    assert not (copies / "executed").exists()


def test_a_model_that_is_a_pickle_with_code_in_it(world, copies):
    for path in (copies / "model").glob("*.safetensors*"):
        path.unlink()
    torch.save({"model.norm.weight": Bomb(copies / "executed")}, copies / "model/pytorch_model.bin")
    assert "holds the pickle pytorch_model.bin, which this project does not execute" in refused(world, copies)
    assert not (copies / "executed").exists()


def test_a_tokenizer_that_does_not_fit_the_embedding(world, copies):
    tokenizer = AutoTokenizer.from_pretrained(copies / "model")
    tokenizer.add_tokens(["<one>", "<two>"])
    for path in (copies / "model").glob("token*"):
        path.unlink()  # a link to the dense model's
    tokenizer.save_pretrained(copies / "model")
    assert "has the token '<two>' with the number 260, but the embedding has 259 rows" in refused(world, copies)


def test_a_training_record_that_is_not_json(world, copies):
    (copies / "trained/training.json").write_text('{"config": ')
    assert "training.json is not JSON" in refused(world, copies)


@pytest.fixture
def small_disk(tmp_path):
    """A function that mounts a tmpfs of so many bytes and returns its root."""
    root = tmp_path / "disk"
    root.mkdir()

    def mount(size):
        answer = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", root], capture_output=True, text=True, check=False)
        if answer.returncode:
            pytest.skip(f"a tmpfs cannot be mounted here: {answer.stderr.strip()}")
        return root

    yield mount
    if root.is_mount():
        subprocess.run(["umount", root], check=True)


def test_no_room_on_the_disk(world, copies, small_disk):
    """Half of the model fits; what was written of it is gone, so that the room is free again."""
    size = sum(spec.num_bytes for spec in TensorDirectory(copies / "model").specs.values())
    disk = small_disk(size // 2)
    free = os.statvfs(disk).f_bavail
    assert f"The disk of {disk} is full" in refused(world, copies, disk / "out")
    (disk / "out").rmdir()
    assert os.statvfs(disk).f_bavail == free
