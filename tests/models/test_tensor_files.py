"""Safetensors, linked and written in pieces."""

import errno
import fcntl
import json
import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from pesc.errors import ModelError
from pesc.models.tensor_files import TensorDirectory, TensorSpec, link_file, write_chunks, write_hollow, write_tensors


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, 40), max_size=6), st.integers(1, 7), st.randoms(use_true_random=False))
def test_pieces_and_whole_tensors_are_the_same_bytes(tmp_path, sizes, piece, random):
    torch.manual_seed(random.randrange(1 << 30))
    tensors = {f"t{index}": torch.randn(size, 3).bfloat16() for index, size in enumerate(sizes)}
    specs = {name: TensorSpec("BF16", tuple(tensor.shape)) for name, tensor in tensors.items()}
    done = []
    write_tensors(tmp_path / "whole", specs, tensors.__getitem__)
    write_chunks(tmp_path / "pieces", specs, lambda name: tensors[name].view(-1).split(piece), done.append)
    assert (tmp_path / "pieces").read_bytes() == (tmp_path / "whole").read_bytes()
    assert sorted(done) == sorted(specs)


def test_a_failing_piece_ends_the_write(tmp_path):
    def chunks(name):
        yield torch.zeros(2)
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_chunks(tmp_path / "x", {name: TensorSpec("F32", (4,)) for name in "abcdefgh"}, chunks, lambda _name: None)


@pytest.mark.parametrize("size", [1, 3])
def test_too_few_and_too_many_pieces_are_a_defect(tmp_path, size):
    with pytest.raises(ValueError, match="announced with 8 bytes"):
        write_chunks(tmp_path / "x", {"a": TensorSpec("F32", (2,))}, lambda _name: [torch.zeros(size)], lambda _name: None)


def test_a_hollow_file_is_zeros_without_room(tmp_path):
    write_hollow(tmp_path / "model.safetensors", {"a": TensorSpec("BF16", (1000, 5000)), "b": TensorSpec("F32", (3,))})
    assert not load_file(tmp_path / "model.safetensors")["a"].any()
    assert TensorDirectory(tmp_path).specs["a"] == TensorSpec("BF16", (1000, 5000))
    assert (tmp_path / "model.safetensors").stat().st_blocks * 512 < 1_000_000


@pytest.mark.parametrize("can_clone", [True, False])
def test_where_links_are_refused_the_blocks_are_shared_or_copied(tmp_path, monkeypatch, can_clone):
    """A disk with reflinks is played: the ioctl writes what a real one would share."""
    calls = []

    def refuse(*_arguments):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    def clone(target, request, source):
        calls.append(request)
        if not can_clone:
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")
        os.write(target, os.pread(source, 100, 0) + b" shared")

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(fcntl, "ioctl", clone)
    (tmp_path / "source").write_bytes(b"weights")
    link_file(tmp_path / "source", tmp_path / "target")
    assert calls == [0x40049409]
    assert (tmp_path / "target").read_bytes() == (b"weights shared" if can_clone else b"weights")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not an index of shards"),
        ("{}", "not an index of shards"),
        (json.dumps({"weight_map": {"w": "../../outside.safetensors"}}), "not a plain file name"),
        (json.dumps({"weight_map": {"w": "lost.safetensors"}}), "names the shard lost.safetensors, but it is not there"),
    ],
)
def test_an_index_that_cannot_be_is_named(tmp_path, text, message):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ModelError, match=message):
        TensorDirectory(tmp_path)


def test_zeros_are_a_hole(tmp_path):
    specs = {"a": TensorSpec("F32", (2,)), "zeros": TensorSpec("BF16", (1000, 5000)), "b": TensorSpec("F32", (3,))}
    write_chunks(tmp_path / "x", specs, lambda name: None if name == "zeros" else [torch.ones(specs[name].shape)], lambda _name: None)
    write_tensors(
        tmp_path / "whole", specs, lambda n: torch.zeros(1000, 5000, dtype=torch.bfloat16) if n == "zeros" else torch.ones(specs[n].shape)
    )
    assert (tmp_path / "x").read_bytes() == (tmp_path / "whole").read_bytes()
    assert (tmp_path / "x").stat().st_blocks * 512 < 1_000_000
