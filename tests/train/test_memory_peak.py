"""The planner's peak against torch.cuda.max_memory_allocated of real steps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.train.tiny import settings

PROGRAM = Path(__file__).with_name("memory_peak.py")
CASES = [
    (shape, layers, width, micro, policy)
    for shape, layers, micro in (("7b", 4, 2), ("34b", 2, 1))
    for width in (0, 64, 512)
    for policy in ("none", "selective", "full")
]


def run(folder: Path, device: str, cases: list, sequence: int) -> list[dict]:
    """Found and planned bytes of each case."""
    task = folder / "task.json"
    written = []
    for shape, layers, width, micro, policy in cases:
        config = settings(
            method="pesc" if width else "qlora", quantization="nf4", compute_dtype="bfloat16", optimizer="adamw_torch_fused",
            global_batch_size=micro, micro_batch_size=micro, lora={"rank": 64},
        )  # fmt: skip
        written.append({
            "device": device, "shape": shape, "layers": layers, "adapter_dim": width, "micro_batch": micro, "sequence": sequence,
            "checkpointing": policy, "config": config.model_dump(mode="json"),
        })  # fmt: skip
    task.write_text(json.dumps(written))
    environment = {**os.environ, "PYTHONPATH": str(PROGRAM.parents[2])}
    if device == "cpu":
        environment |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    argv = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1", str(PROGRAM), str(task)]
    ran = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=550, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return json.loads(Path(f"{task}.out").read_text())


@pytest.fixture(scope="module")
def peaks(tmp_path_factory):
    return run(tmp_path_factory.mktemp("peaks"), "cuda", CASES, 2048)


@pytest.mark.gpu
@pytest.mark.parametrize("case", range(len(CASES)), ids=["-".join(map(str, case)) for case in CASES])
def test_the_peak_of_a_step_is_the_planned_one(peaks, case):
    """Weights, states and activations that torch allocates; not CUDA's context, nor what its allocator keeps in reserve."""
    assert peaks[case]["planned"] == pytest.approx(peaks[case]["found"], rel=0.1)


@pytest.mark.slow
def test_the_program_that_measures_runs(tmp_path):
    """On the CPU, where there is no peak to read: so that it is not first tried on a GPU."""
    found = run(tmp_path, "cpu", [("tiny", 2, 0, 1, "full"), ("tiny", 2, 16, 2, "selective")], 64)
    assert all(line["planned"] > 0 for line in found)
