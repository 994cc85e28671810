"""Training refuses what cannot fit before any rank starts, and says what would."""

from __future__ import annotations

import logging
import stat

import pytest

from pesc.errors import TrainingOutOfMemoryError
from pesc.moe.config import PescConfig
from pesc.stage import Execution
from pesc.train.config import TrainConfig
from pesc.train.memory import check
from pesc.train.memory.check import check_fits, gpu_memory, read_run
from pesc.train.memory.need import Layout, Run, need_of, usable_bytes
from pesc.train.memory.shapes import KNOWN_BASES
from pesc.train.stage import build
from tests.train import tiny

CUDA = {"device": "cuda", "num_processes": 1}


@pytest.fixture
def gpus(tmp_path, monkeypatch):
    """A machine whose nvidia-smi shows GPUs of so many MiB."""

    def show(*sizes: int) -> None:
        program = tmp_path / "bin" / "nvidia-smi"
        program.parent.mkdir()
        listing = "\n".join(f"GPU {number}: NVIDIA (UUID: x)" for number in range(len(sizes)))
        lines = "\n".join(map(str, sizes))
        program.write_text(f'#!/bin/sh\nif [ "$1" = -L ]; then echo "{listing}"; else echo "{lines}"; fi\n')
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    return show


def run_of(base: str, block: PescConfig | None = None, **config) -> Run:
    return Run(KNOWN_BASES[base], block, TrainConfig.model_validate({"method": "pesc" if block else "qlora"} | config), 2048)


def test_the_smallest_gpu_counts(gpus):
    gpus(81559, 40960)
    assert gpu_memory() == 40960 << 20


def test_a_run_that_cannot_fit_is_refused_with_settings_that_do(gpus):
    gpus(40960)
    run = run_of("llama-2-7b", micro_batch_size=16)
    execution = Execution.model_validate(CUDA | {"gradient_checkpointing": "none"})
    with pytest.raises(
        TrainingOutOfMemoryError, match=r"^train\[x\] needs about \d+\.\d GB of each GPU, and the smallest here has 42\.9 GB: set "
    ):
        check_fits("train[x]", run, execution, 1, 1)


@pytest.mark.parametrize(("ranks", "micro", "policy"), [(1, 16, "none"), (1, 64, "full"), (4, 8, "selective")])
def test_what_is_advised_really_fits(gpus, ranks, micro, policy):
    run, memory = run_of("llama-2-13b", PescConfig(adapter_dim=64), micro_batch_size=micro), 40960 << 20
    layout = Layout(ranks, 2, policy, micro)
    assert need_of(run, layout).total > memory
    advice = check.what_would_fit(run, layout, memory)
    found = dict(part.split(" (now")[0].removeprefix("set ").split("=") for part in advice.split(" and "))
    then = Layout(
        ranks,
        int(found.get("execution.zero_stage", 2)),
        found.get("execution.gradient_checkpointing", policy),
        int(found.get("train.micro_batch_size", micro)),
    )
    assert need_of(run, then).total <= usable_bytes(memory)
    assert run.config.global_batch_size % (ranks * then.micro_batch) == 0


def test_a_model_that_no_setting_makes_fit(gpus):
    gpus(24564)
    run = run_of("yi-34b", PescConfig(adapter_dim=512), optimizer="adamw_torch_fused")
    with pytest.raises(TrainingOutOfMemoryError, match=r"no setting makes it fit .* use larger or more GPUs"):
        check_fits("train[pesc]", run, Execution.model_validate(CUDA), 1, 1)


def test_in_doubt_it_warns_and_trains(gpus, caplog):
    """Paged optimizer states can leave the GPU, so that 28 GB may do with 25."""
    gpus(24564)
    run = run_of("llama-2-7b", PescConfig(adapter_dim=512), optimizer="paged_adamw_32bit")
    with caplog.at_level(logging.WARNING):
        check_fits("train[pesc]", run, Execution.model_validate(CUDA), 1, 1)
    assert "may run out of memory" in caplog.text


def test_what_fits_is_not_spoken_of(gpus, caplog):
    gpus(81559)
    check_fits("train[pesc]", run_of("llama-2-7b", PescConfig()), Execution.model_validate(CUDA), 1, 1)
    assert caplog.text == ""


def test_on_the_cpu_it_is_a_warning(monkeypatch, caplog):
    monkeypatch.setattr(check, "available_ram", lambda: 2_000_000_000)
    run = Run(KNOWN_BASES["llama-2-7b"], None, TrainConfig(method="qlora"), 2048, "cpu")
    check_fits("train[qlora]", run, Execution(device="cpu"), 2, 2)
    assert "this machine has 2.0 GB free" in caplog.text


def test_the_stage_refuses_before_it_starts_a_rank(gpus, tmp_path, sparse_dir, blocks_dir):
    gpus(512)
    ctx = tiny.make_context(tmp_path, sparse_dir, blocks_dir, tiny.settings(), CUDA)
    with pytest.raises(TrainingOutOfMemoryError, match="no setting makes it fit"):
        build(ctx)
    assert not list((tmp_path / "work").iterdir())


def test_the_run_of_a_model_directory(sparse_dir, dense_dir, tmp_path):
    run = read_run(sparse_dir, tiny.settings(), 48, "cuda")
    assert run is not None
    assert run.block == PescConfig(num_experts=4, top_k=2, adapter_dim=8, dispatch="dense")
    assert run.shape.hidden == 64
    assert read_run(dense_dir, tiny.settings(method="qlora"), 48, "cuda").block is None
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    assert read_run(tmp_path, tiny.settings(), 48, "cuda") is None
    assert read_run(tmp_path / "nowhere", tiny.settings(), 48, "cuda") is None
