"""train.sbatch under a stand-in for Slurm: `srun` runs one task a node here, `scontrol` knows the nodes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from tests.launch.test_supervise import wait_for

SCRIPT = Path(__file__).resolve().parents[2] / "deployments" / "slurm" / "train.sbatch"
SRUN = """
trap 'kill -TERM $children; wait; exit 143' TERM
while [[ $1 == --* ]]; do shift; done
for node in 0 1; do SLURM_NODEID=$node "$@" & children="$children $!"; done
wait
"""
SCONTROL = """
if [[ $1 == show ]]; then echo node7; echo node8; else echo "$@" >> "$SAID/asked"; fi
"""
PESC = """
echo "$PESC_STORE $@" > "$SAID/node-$SLURM_NODEID"
if [[ -n "$WAIT" ]]; then trap 'echo saved >> "$SAID/node-$SLURM_NODEID"; exit 143' TERM; touch "$SAID/up-$SLURM_NODEID"; sleep 60 & wait; fi
"""


@pytest.fixture
def slurm(tmp_path):
    """The environment of a batch step on two nodes; what was done is in files beside."""
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "pesc": PESC}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}")
        (tmp_path / name).chmod(0o755)
    told = {"SLURM_JOB_ID": "20123", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node[7-8]", "PESC_STORE_ROOT": "/disk"}
    return os.environ | told | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SAID": str(tmp_path), "WAIT": ""}


def test_every_node_runs_the_same_command_with_a_store_of_its_own(slurm, tmp_path):
    subprocess.run(["bash", str(SCRIPT), "demo", "train.seed=1"], env=slurm, check=True, timeout=30)
    settings = (
        "execution.num_nodes=2 execution.master=node7:20123 execution.restarts=2 execution.grace_seconds=100 train.seed=1 --until train"
    )
    said = [(tmp_path / f"node-{node}").read_text().strip() for node in (0, 1)]
    assert said == [f"/disk/node-{node} run demo {settings}" for node in (0, 1)]
    assert not (tmp_path / "asked").exists()


def test_the_warning_before_the_end_lets_the_ranks_save_and_queues_the_job_again(slurm, tmp_path):
    batch = subprocess.Popen(["bash", str(SCRIPT), "demo"], env=slurm | {"WAIT": "1"})
    wait_for(lambda: all((tmp_path / f"up-{node}").exists() for node in (0, 1)), 20, "both nodes")
    batch.send_signal(signal.SIGTERM)
    assert batch.wait(20) == 0
    assert [(tmp_path / f"node-{node}").read_text().splitlines()[-1] for node in (0, 1)] == ["saved", "saved"]
    assert (tmp_path / "asked").read_text() == "requeue 20123\n"


def test_a_failure_is_the_jobs_and_is_not_queued_again(slurm, tmp_path):
    (tmp_path / "srun").write_text("#!/bin/bash\nexit 5\n")
    assert subprocess.run(["bash", str(SCRIPT), "demo"], env=slurm, check=False, timeout=30).returncode == 5
    assert not (tmp_path / "asked").exists()


def test_shellcheck_has_nothing_to_say():
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
    if not shutil.which("shellcheck"):
        pytest.skip("no shellcheck here; the syntax alone was checked")
    subprocess.run(["shellcheck", str(SCRIPT)], check=True)
