"""Real faults of real runs: a stopped rank, memory refused by the kernel, a full disk, a damaged checkpoint, a block that gives NaN."""

from __future__ import annotations

import filecmp
import json
import os
import shutil
import signal
import subprocess

import pyarrow as pa
import pytest

from pesc.errors import CheckpointSpaceError, TrainingFailedError, TrainingHungError, TrainingOutOfMemoryError
from pesc.train import checkpoints, stage
from tests.launch.test_supervise import alive
from tests.train import tiny

pytestmark = pytest.mark.slow
SAVING = {"save_every_steps": 2}
POISON = tiny.VOCABULARY - 1


def context(folder, model, blocks, execution=None, on_progress=lambda _p: None, **changes):
    return tiny.make_context(folder, model, blocks, tiny.settings(**{"max_steps": 6, **changes}), execution, on_progress)


def rank_pids(ctx) -> list[int]:
    return [int(path.name) for path in (ctx.work / "pids").iterdir()]


def test_a_stopped_rank_is_found_and_named_and_nothing_is_left(tmp_path, sparse_dir, blocks_dir):
    seen = []

    def freeze(progress):
        if progress.message == "training" and progress.done == 3:
            seen.extend(rank_pids(ctx))
            os.kill(next(pid for pid in seen if heartbeat_of(ctx, 1).startswith(f"{pid} ")), signal.SIGSTOP)

    def heartbeat_of(ctx, rank):
        return (ctx.work / "heartbeat" / f"rank_{rank}").read_text()

    ctx = context(tmp_path, sparse_dir, blocks_dir, {**SAVING, "hang_seconds": 15}, freeze, max_steps=10_000, epochs=10_000)
    with pytest.raises(TrainingHungError) as caught:
        stage.build(ctx)
    sentence = str(caught.value)
    assert "train[tiny] hung: rank 1 (process" in sentence
    assert "which somebody stopped (SIGSTOP)) gave no sign of life for" in sentence
    assert "execution.hang_seconds allows 15" in sentence
    assert "The checkpoint at step 2 is kept" in sentence
    assert len(seen) == 2
    assert not any(map(alive, seen))
    assert "all_reduce" in (ctx.work / "log.txt").read_text(), "the stack of the rank that waits"


def test_memory_that_the_kernel_refuses_is_a_typed_error_with_advice(tmp_path, sparse_dir, monkeypatch):
    """RLIMIT_DATA on torchrun and its ranks; blocks so long that the attention's scores do not fit below it."""
    blocks = tiny.write_blocks(tmp_path / "long", 4, context=12_000)
    plain = stage.build_argv
    monkeypatch.setattr(stage, "build_argv", lambda *arguments: ["prlimit", "--data=3000000000", *plain(*arguments)])
    ctx = context(tmp_path, sparse_dir, blocks, {"num_processes": 1})
    with pytest.raises(TrainingOutOfMemoryError, match=r"ran out of memory on rank 0 .*set execution\.gradient_checkpointing=full"):
        stage.build(ctx)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, sparse_dir, blocks_dir):
    """A run that nothing disturbed, with all its checkpoints."""
    ctx = context(tmp_path_factory.mktemp("whole"), sparse_dir, blocks_dir, {**SAVING, "keep_checkpoints": 3})
    stage.build(ctx)
    return ctx


@pytest.fixture
def small_disk(tmp_path):
    """A function that mounts a tmpfs of so many bytes and returns its root."""
    mounted = []

    def mount(size: int):
        root = tmp_path / f"disk{len(mounted)}"
        root.mkdir()
        answer = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", root], capture_output=True, text=True, check=False)
        if answer.returncode:
            pytest.skip(f"a tmpfs cannot be mounted here: {answer.stderr.strip()}")
        mounted.append(root)
        return root

    yield mount
    for root in mounted:
        subprocess.run(["umount", root], check=True)


def test_a_disk_that_is_full_during_a_checkpoint(tmp_path, small_disk, sparse_dir, blocks_dir, whole):
    """The first does not fit at all; then the second does not; then there is room, and the run ends as one never disturbed."""
    tiny_disk = small_disk(150_000)
    with pytest.raises(
        CheckpointSpaceError, match=rf"no room for the checkpoint at step 2: the disk of {tiny_disk}\S* has .* MB free"
    ) as first:
        stage.build(context(tiny_disk, sparse_dir, blocks_dir, SAVING))
    assert "is kept" not in str(first.value)
    assert list((tiny_disk / "work" / "checkpoints").glob("checkpoint-*")) == []

    size = checkpoints.find_complete(whole.work / "checkpoints")[-1].bytes
    disk = small_disk(int(1.6 * size) + 100_000)
    with pytest.raises(
        CheckpointSpaceError, match=r"no room for the checkpoint at step 4: .* MB free, and a checkpoint needs .* MB"
    ) as second:
        stage.build(context(disk, sparse_dir, blocks_dir, SAVING))
    assert "The checkpoint at step 2 is kept" in str(second.value)
    assert [c.step for c in checkpoints.find_complete(disk / "work" / "checkpoints")] == [2]
    subprocess.run(["mount", "-o", f"remount,size={20 * size}", disk], check=True)
    again = context(disk, sparse_dir, blocks_dir, SAVING)
    stage.build(again)
    assert_same_bytes(again, whole)


def assert_same_bytes(ctx, other):
    names = sorted(str(path.relative_to(other.out)) for path in other.out.rglob("*") if path.is_file())
    assert sorted(str(path.relative_to(ctx.out)) for path in ctx.out.rglob("*") if path.is_file()) == names
    assert [name for name in names if not filecmp.cmp(ctx.out / name, other.out / name, shallow=False)] == []


def test_a_damaged_newest_checkpoint_is_set_aside_and_the_one_before_is_used(tmp_path, sparse_dir, blocks_dir, whole, caplog):
    root = tmp_path / "broken"
    shutil.copytree(whole.work, root / "work")
    newest = checkpoints.find_complete(root / "work" / "checkpoints")
    assert [c.step for c in newest] == [2, 4, 6]
    cut = max(newest[-1].path.rglob("*optim_states.pt"))
    os.truncate(cut, cut.stat().st_size // 2)
    flipped = max(newest[-2].path.rglob("*model_states.pt"))
    data = bytearray(flipped.read_bytes())
    data[len(data) // 2] ^= 1
    flipped.write_bytes(data)
    resumed = []
    ctx = context(root, sparse_dir, blocks_dir, SAVING, lambda p: resumed.append(p.done) if p.message == "training" else None)
    stage.build(ctx)
    assert resumed[0] == 3
    assert f"{cut.name} has" in caplog.text
    assert f"{flipped.name} has other bytes than were written" in caplog.text
    assert "the one at step 2 is tried instead" in caplog.text
    assert sorted(p.name for p in (root / "work" / "checkpoints").glob("corrupt-*")) == ["corrupt-checkpoint-4", "corrupt-checkpoint-6"]
    assert_same_bytes(ctx, whole)


# ---- a block that gives NaN


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory):
    """A model whose embedding of one token is infinite, and blocks of which one has that token."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("poisoned")
    model = tiny.save_sparse(folder / "model")
    settings = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**settings, "tie_word_embeddings": False}))
    tensors = load_file(model / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = embedding.clone()
    embedding[POISON] = float("inf")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    blocks = tiny.write_blocks(folder / "blocks", 23)
    for path in sorted(blocks.iterdir()):
        with pa.OSFile(str(path)) as source:
            table = pa.ipc.open_stream(source).read_all()
        rows = table.column("input_ids").to_pylist()
        for number, row in enumerate(rows):
            rows[number] = [0 if token == POISON else token for token in row]
        if path.name.startswith("blocks-00000"):
            rows[3][10] = POISON
        table = table.set_column(0, "input_ids", pa.array(rows, type=pa.list_(pa.int32())))
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=5)
    return model, blocks


def lines_of(ctx):
    return [json.loads(line) for line in (ctx.out / "history.jsonl").read_text().splitlines()]


def weights_of(ctx):
    from safetensors.torch import load_file

    return {**load_file(ctx.out / "bank.safetensors"), **load_file(ctx.out / "adapter" / "adapter_model.safetensors")}


def test_a_step_with_nan_ends_the_run_unless_it_may_be_left_out(tmp_path, poisoned):
    model, blocks = poisoned
    with pytest.raises(TrainingFailedError, match=r"the loss is nan at step \d.*train\.bad_loss\.policy=skip.*not applied"):
        stage.build(context(tmp_path, model, blocks, {"num_processes": 1}))


@pytest.mark.parametrize(
    ("zero_stage", "dtype"),
    [(0, "bfloat16"), *(pytest.param(*case, marks=pytest.mark.long) for case in ((0, "float32"), (3, "float32"), (2, "bfloat16")))],
)
def test_a_step_with_nan_is_left_out_under_any_sharding(tmp_path, poisoned, zero_stage, dtype):
    model, blocks = poisoned
    ctx = context(tmp_path, model, blocks, {"zero_stage": zero_stage}, bad_loss={"policy": "skip"}, compute_dtype=dtype)
    stage.build(ctx)
    lines = lines_of(ctx)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    (bad,) = [line for line in lines if "skipped" in line]
    assert bad["loss"] is None
    assert bad["skipped"] == "the loss is nan"
    assert all(line["loss"] > 0 for line in lines if line is not bad)
    assert all(tensor.isfinite().all() and tensor.any() for tensor in weights_of(ctx).values())
    record = json.loads((ctx.out / "training.json").read_text())
    assert record["facts"]["loss_last"] == lines[-1]["loss"]


def test_a_run_whose_every_step_is_bad_ends(tmp_path, poisoned, sparse_dir):
    from safetensors.torch import load_file, save_file

    model = shutil.copytree(poisoned[0], tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"][0] = float("inf")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    ctx = context(tmp_path, model, poisoned[1], {"num_processes": 1}, bad_loss={"policy": "skip", "max_skips": 2})
    with pytest.raises(
        TrainingFailedError, match=r"at step 3, and the 2 steps before were left out already \(train\.bad_loss\.max_skips is 2\)"
    ):
        stage.build(ctx)
