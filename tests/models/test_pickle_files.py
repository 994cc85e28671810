"""Pickled weights: read without obeying them, written as others read them."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pesc.errors import ModelError
from pesc.models.pickle_files import PickleDirectory, read_pickle, write_pickle

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=3)), max_size=5), st.randoms(use_true_random=False))
def test_what_is_written_is_what_torch_reads(tmp_path, layout, random):
    torch.manual_seed(random.randrange(1 << 30))
    tensors = {f"t{index}": torch.randn(shape).to(dtype) for index, (dtype, shape) in enumerate(layout)}
    write_pickle(tmp_path / "x.bin", tensors)
    for again in (torch.load(tmp_path / "x.bin", weights_only=True), read_pickle(tmp_path / "x.bin")):
        assert list(again) == list(tensors)
        for name, tensor in tensors.items():
            assert again[name].dtype == tensor.dtype
            assert torch.equal(again[name], tensor)


def test_a_slice_is_written_without_the_rest(tmp_path):
    bank = torch.randn(64, 32, 16)
    write_pickle(tmp_path / "x.bin", {"one": bank[3], "turned": bank[4].T, "again": bank[3]})
    assert (tmp_path / "x.bin").stat().st_size < 4 * 32 * 16 * 4
    again = torch.load(tmp_path / "x.bin", weights_only=True)
    assert torch.equal(again["turned"], bank[4].T)
    assert len({tensor.untyped_storage().data_ptr() for tensor in again.values()}) == 3


def test_the_format_before_torch_1_6_is_read(tmp_path):
    torch.save({"w": torch.arange(6.0)}, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    assert torch.equal(read_pickle(tmp_path / "old.bin")["w"], torch.arange(6.0))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-200])


BAD = {
    "truncated": (lambda p: (torch.save({"w": torch.ones(999)}, p), truncate(p)), "not a plain file of tensors"),
    "empty": (lambda p: p.write_bytes(b""), "not a plain file of tensors"),
    "a text": (lambda p: p.write_text("version https://git-lfs.github.com/spec/v1"), "not a plain file of tensors"),
    "a module": (lambda p: torch.save(torch.nn.Linear(2, 2), p), "not a plain file of tensors"),
    "a list": (lambda p: torch.save([torch.ones(2)], p), "holds a list"),
    "an optimizer": (lambda p: torch.save({"state": {}, "param_groups": []}, p), "'state', which is not a tensor but a dict"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_file_that_is_not_weights_is_named(tmp_path, case):
    spoil, message = BAD[case]
    spoil(tmp_path / "x.bin")
    with pytest.raises(ModelError, match=message) as caught:
        read_pickle(tmp_path / "x.bin")
    assert str(tmp_path / "x.bin") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_tensor_in_two_shards_is_named(tmp_path):
    for number in (1, 2):
        write_pickle(tmp_path / f"pytorch_model-0000{number}-of-00002.bin", {"w": torch.ones(2)})
    (tmp_path / "pytorch_model.bin.index.json").write_text(
        '{"weight_map": {"w": "pytorch_model-00001-of-00002.bin", "v": "pytorch_model-00002-of-00002.bin"}}'
    )
    with pytest.raises(ModelError, match="has w, which another shard has too"):
        PickleDirectory(tmp_path).specs


def test_a_full_disk_is_an_error_of_the_system(tmp_path):
    (tmp_path / "x.bin").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        write_pickle(tmp_path / "x.bin", {"w": torch.ones(100_000)})
