from __future__ import annotations

import errno

import pytest

from pesc.errors import TrainingFailedError
from pesc.train.checkpoints import (
    MARKER,
    Layout,
    checkpoint_path,
    clean,
    find_complete,
    is_full_disk,
    mark_complete,
    require_rank,
    require_same_layout,
    save_dispatch,
    set_aside,
)

LAYOUT = Layout(world_size=2, zero_stage=2)


def make(root, step, complete=True):
    path = checkpoint_path(root, step)
    path.mkdir(parents=True)
    (path / "weights").write_text("w")
    if complete:
        mark_complete(path, LAYOUT)
    return path


def test_only_complete_checkpoints_count_in_order_of_steps(tmp_path):
    for step in (100, 20, 3):
        make(tmp_path, step)
    make(tmp_path, 200, complete=False)
    (make(tmp_path, 300, complete=False) / MARKER).write_text("")  # torn by a power cut
    (tmp_path / "checkpoint-x").mkdir()
    (tmp_path / "checkpoint-4").touch()
    assert [(c.step, c.layout) for c in find_complete(tmp_path)] == [(3, LAYOUT), (20, LAYOUT), (100, LAYOUT)]
    assert find_complete(tmp_path / "nowhere") == []


def test_cleaning_keeps_the_newest_and_removes_halves(tmp_path):
    for step in (1, 2, 3):
        make(tmp_path, step)
    make(tmp_path, 4, complete=False)
    clean(tmp_path)
    assert [c.step for c in find_complete(tmp_path)] == [1, 2, 3]
    assert not checkpoint_path(tmp_path, 4).exists()
    clean(tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-3"]


def test_another_layout_is_refused_with_both_ways_out(tmp_path):
    make(tmp_path, 40)
    (checkpoint,) = find_complete(tmp_path)
    require_same_layout(checkpoint, LAYOUT, "train[pesc]")
    with pytest.raises(TrainingFailedError) as caught:
        require_same_layout(checkpoint, Layout(1, 3), "train[pesc]")
    sentence = str(caught.value)
    assert "train[pesc] has a checkpoint at step 40 written with 2 ranks and ZeRO 2, which 1 rank and ZeRO 3 cannot continue" in sentence
    assert "execution.zero_stage=2" in sentence
    assert f"delete {tmp_path}" in sentence


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (OSError(errno.EACCES, "Permission denied"), False),
        (RuntimeError("[enforce fail at inline_container.cc:863] . PytorchStreamWriter failed writing file data/7"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"), False),
        (ValueError("PytorchStreamWriter"), False),
    ],
)
def test_a_full_disk_is_told_from_other_trouble(error, full):
    assert is_full_disk(error) is full


def test_a_part_of_other_ranks_is_a_sentence(tmp_path):
    path = checkpoint_path(tmp_path, 4)
    path.mkdir()
    for rank in (8, 9):
        save_dispatch(path, rank, [])
    mark_complete(path, LAYOUT)
    (checkpoint,) = find_complete(tmp_path)
    require_rank(checkpoint, 9, "train[pesc]")
    with pytest.raises(TrainingFailedError, match=r"checkpoint-4 has the parts of ranks 8, 9, but this machine now runs rank 1: give each"):
        require_rank(checkpoint, 1, "train[pesc]")


def test_what_is_set_aside_counts_no_more(tmp_path):
    for step in (2, 4):
        make(tmp_path, step)
    aside = set_aside(find_complete(tmp_path)[-1], "unmatched")
    assert aside.name == "unmatched-checkpoint-4"
    assert [checkpoint.step for checkpoint in find_complete(tmp_path)] == [2]
    clean(tmp_path, 1)
    assert aside.is_dir()
