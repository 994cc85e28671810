"""Two hosts, each with a network and a disk of its own, train together; one loses its power, comes back, and nothing was lost."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from pesc.train import checkpoints
from tests.launch.test_supervise import wait_for
from tests.train.hosts import Host, two_hosts
from tests.train.test_distributed import EXACT, files

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

STEPS = 6
PROGRAM = """
import logging, sys
from pathlib import Path
from pesc.errors import PescError
from pesc.train.stage import build
from tests.train import tiny
root, model, blocks, steps, restarts, kill_at = *map(Path, sys.argv[1:4]), *map(int, sys.argv[4:])
logging.basicConfig(level=logging.INFO, format="%(message)s")
def tell(progress):
    if progress.message == "training":
        print("step", int(progress.done), flush=True)
        if progress.done == kill_at:
            (root.parent / "now").touch()
where = {"num_processes": 1, "num_nodes": 2, "master": "10.213.77.1:29517", "restarts": restarts, "save_every_steps": 2,
         "join_timeout": 60, "peer_timeout": 60}
try:
    build(tiny.make_context(root, model, blocks, tiny.settings(max_steps=steps, **CHANGES), where, tell))
except PescError as error:
    print(type(error).__name__, error, flush=True)
    sys.exit(1)
""".replace("CHANGES", repr(EXACT))


def start(host: Host, root: Path, model: Path, blocks: Path, steps: int = STEPS, restarts: int = 0, kill_at: int = 0):
    folder = root / host.address
    folder.mkdir(parents=True, exist_ok=True)
    argv = [sys.executable, "-c", PROGRAM, str(folder), str(model), str(blocks), *map(str, (steps, restarts, kill_at))]
    return host.popen(argv, root / f"{host.address}.txt", {"PYTHONPATH": str(Path(__file__).parents[2])})


def said(root: Path, host: Host) -> str:
    return (root / f"{host.address}.txt").read_text()


def result(root: Path, host: Host) -> dict[str, bytes]:
    out = root / host.address / "out"
    return {name: (out / name).read_bytes() for name in files(out)}


@pytest.fixture(scope="module")
def hosts():
    with two_hosts() as made:
        yield made


@pytest.fixture(scope="module")
def undisturbed(hosts, tmp_path_factory, sparse_dir, blocks_dir):
    root = tmp_path_factory.mktemp("undisturbed")
    running = [start(host, root, sparse_dir, blocks_dir) for host in hosts]
    assert [process.wait(240) for process in running] == [0, 0], said(root, hosts[0]) + said(root, hosts[1])
    return result(root, hosts[0])


@pytest.mark.parametrize("lost", [1, pytest.param(0, marks=pytest.mark.long)], ids=["a host", "the host where they meet"])
def test_a_host_that_is_killed_and_comes_back_goes_on_from_the_checkpoint(undisturbed, hosts, tmp_path, sparse_dir, blocks_dir, lost):
    """The survivor waits by itself (restarts=1); the other is started again with the command that it was started with."""
    assert len(undisturbed) > 2
    running = [start(host, tmp_path, sparse_dir, blocks_dir, restarts=1, kill_at=5) for host in hosts]
    wait_for((tmp_path / "now").exists, 240, "step 5")
    hosts[lost].kill()
    running[lost].wait(20)
    wait_for(lambda: "Restart 1 of 1" in said(tmp_path, hosts[1 - lost]), 120, "the survivor notices")
    running[lost] = start(hosts[lost], tmp_path, sparse_dir, blocks_dir)
    assert [process.wait(240) for process in running] == [0, 0], said(tmp_path, hosts[0]) + said(tmp_path, hosts[1])
    assert "another machine of the run was lost" in said(tmp_path, hosts[1 - lost])
    assert "continues from the checkpoint at step 4" in said(tmp_path, hosts[1 - lost])
    for host in hosts:
        assert result(tmp_path, host) == undisturbed
        assert [c.step for c in checkpoints.find_complete(tmp_path / host.address / "work" / "checkpoints")] == [4, 6]


def test_a_host_that_nobody_joins_says_so_and_ends(hosts, tmp_path, sparse_dir, blocks_dir):
    program = PROGRAM.replace('"join_timeout": 60', '"join_timeout": 4')
    argv = [sys.executable, "-c", program, str(tmp_path / "alone"), str(sparse_dir), str(blocks_dir), "2", "0", "0"]
    alone = hosts[0].popen(argv, tmp_path / "alone.txt", {"PYTHONPATH": str(Path(__file__).parents[2])})
    assert alone.wait(90) == 1
    assert "PeerLostError train[tiny]: the 2 machines did not meet at 10.213.77.1:29517" in (tmp_path / "alone.txt").read_text()
