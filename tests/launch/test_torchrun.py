from __future__ import annotations

import socket
import subprocess
import sys

import pytest

from pesc.errors import RecipeError
from pesc.launch.network import Place, find_place, interface_environment
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


def test_several_nodes_meet_at_the_master_with_the_same_command():
    """The master's address is this machine's in one case and not in the other; nothing else differs."""
    execution = Execution(num_nodes=2, master="node0:1234", join_timeout=30)
    there, here = (build_argv("a.module", [], execution, 8, "a-run", Place(a, h)) for a, h in (("10.0.0.2", False), ("10.0.0.1", True)))
    assert {"--nnodes=2", "--rdzv-backend=c10d", "--rdzv-endpoint=node0:1234", "--rdzv-id=a-run", "--local-addr=10.0.0.2"} <= set(there)
    assert "--rdzv-conf=join_timeout=30,last_call_timeout=1,read_timeout=30,is_host=0" in there
    assert [argument for argument in here if argument not in there] == [
        "--rdzv-conf=join_timeout=30,last_call_timeout=1,read_timeout=30,is_host=1",
        "--local-addr=10.0.0.1",
    ]
    named = execution.model_copy(update={"address": "node1"})
    assert "--local-addr=node1" in build_argv("a.module", [], named, 8, "a-run", Place("10.0.0.2", False))
    unknown = build_argv("a.module", [], Execution(num_nodes=2, master="node0"), 8, "a-run", Place(None, None))
    assert "--rdzv-endpoint=node0:29500" in unknown
    assert not any("is_host" in argument or "--local-addr" in argument for argument in unknown)


def test_whoever_reaches_the_master_from_its_own_address_is_it():
    assert find_place("127.0.0.1", 1234) == Place("127.0.0.1", None)  # several on one machine: torchrun tries
    assert find_place("no-such-host.invalid", 1234) == Place(None, None)
    assert Place("127.0.0.1", None).interface is None


def test_a_machine_that_knows_itself_by_a_loopback_address_is_met_by_its_own(monkeypatch):
    """Debian writes `127.0.1.1 node0` into node0's /etc/hosts; the others would be told to come to 127.0.1.1."""
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_a, **_k: [(socket.AF_INET, socket.SOCK_DGRAM, 17, "", ("127.0.1.1", 29500))])
    place = find_place("node0", 29500)
    assert place.hosts is True
    assert place.address is None or not place.address.startswith("127.")


def test_the_users_choice_of_an_interface_stays():
    assert interface_environment("eth1", {"NCCL_SOCKET_IFNAME": "ib0"}) == {"GLOO_SOCKET_IFNAME": "eth1"}
    assert interface_environment(None, {}) == {}


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [({"num_nodes": 2}, "execution.master must say host:port"), ({"num_nodes": 2, "master": "a:port"}, "must be host:port")],
)
def test_settings_that_cannot_meet_are_refused(settings, sentence):
    with pytest.raises(RecipeError, match=sentence):
        build_argv("a.module", [], Execution(**settings), 1)


@pytest.mark.slow
def test_torchrun_takes_the_command_line(tmp_path):
    program = tmp_path / "said.py"
    one_write = "import os; os.write(1, f\"RANK {os.environ['RANK']} OF {os.environ['WORLD_SIZE']}\\n\".encode())"
    program.write_text(one_write)
    argv = build_argv("said", [], Execution(), 2)
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=True)
    assert sorted(line for line in done.stdout.splitlines() if line.startswith("RANK")) == ["RANK 0 OF 2", "RANK 1 OF 2"]
