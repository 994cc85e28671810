from __future__ import annotations

import subprocess
import sys

import pytest

from pesc.errors import RecipeError
from pesc.launch.torchrun import build_argv
from pesc.stage import Execution


def test_one_node_meets_on_a_free_port():
    argv = build_argv("a.module", ["job.json"], Execution(), 2)
    assert argv == [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        "--max-restarts=0",
        "--standalone",
        "-m",
        "a.module",
        "job.json",
    ]


def test_several_nodes_meet_at_the_master():
    argv = build_argv("a.module", [], Execution(num_nodes=2, node_rank=1, master="node0:1234"), 8)
    assert {"--nnodes=2", "--node-rank=1", "--master-addr=node0", "--master-port=1234"} <= set(argv)
    assert "--master-port=29500" in build_argv("a.module", [], Execution(num_nodes=2, master="node0"), 8)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"num_nodes": 2}, "execution.master must say host:port"),
        ({"num_nodes": 2, "node_rank": 2, "master": "a:1"}, "must be below execution.num_nodes"),
        ({"num_nodes": 2, "master": "a:port"}, "must be host:port"),
    ],
)
def test_settings_that_cannot_meet_are_refused(settings, sentence):
    with pytest.raises(RecipeError, match=sentence):
        build_argv("a.module", [], Execution(**settings), 1)


@pytest.mark.slow
def test_torchrun_takes_the_command_line(tmp_path):
    program = tmp_path / "said.py"
    program.write_text("import os; print('RANK', os.environ['RANK'], 'OF', os.environ['WORLD_SIZE'])")
    argv = build_argv("said", [], Execution(), 2)
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=True)
    assert sorted(line for line in done.stdout.splitlines() if line.startswith("RANK")) == ["RANK 0 OF 2", "RANK 1 OF 2"]
