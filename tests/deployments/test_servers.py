"""The servers that the other tests stand on: they are what they say, ask for their password, and end with the tests."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tests.deployments.servers import ROOT, PrefectServer, postgres, postgres_prefect, postgres_programs, wait_for

__all__ = ["postgres", "postgres_prefect"]
pytestmark = pytest.mark.slow


def test_the_server_keeps_its_objects_in_postgresql_and_finds_them_again_after_it_was_killed(postgres_prefect):
    server = postgres_prefect
    server.post("work_pools/", {"name": "kept", "type": "process"})
    database = server._own["PREFECT_API_DATABASE_CONNECTION_URL"].replace("+asyncpg", "")
    psql = [str(postgres_programs() / "psql"), "--tuples-only", "--no-align", "--command", "select name from work_pool", database]
    assert subprocess.run(psql, capture_output=True, text=True, check=True).stdout.split() == ["kept"]
    server.kill()
    with pytest.raises(OSError, match="refused"):
        server.get("health")
    server.serve()
    assert [pool["name"] for pool in server.post("work_pools/filter", {})] == ["kept"]


def test_a_server_with_a_password_answers_nobody_else(tmp_path):
    with PrefectServer(tmp_path, auth="admin:secret") as server:
        assert server.post("work_pools/filter", {}) == []
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"{server.url}/admin/version", timeout=10)
        assert "admin:secret" not in server.prefect("config", "view")


PROGRAM = """
import sys, time
from pathlib import Path
from tests.deployments.servers import Postgres, PrefectServer, postgres_programs
cluster = Postgres(postgres_programs())
cluster.start()
server = PrefectServer(Path(sys.argv[1]), database=cluster.database())
server.serve()
print(cluster._process.pid, server._server.pid, flush=True)
time.sleep(600)
"""


def test_servers_end_with_the_tests_that_are_killed(tmp_path):
    if postgres_programs() is None:
        pytest.skip("no PostgreSQL here: apt-get install postgresql")
    tests = subprocess.Popen([sys.executable, "-c", PROGRAM, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    pids = [int(word) for word in tests.stdout.readline().split()]
    groups = {os.getpgid(pid) for pid in pids}
    assert len(groups) == 2
    tests.send_signal(signal.SIGKILL)
    tests.wait()
    wait_for(lambda: not any(map(group_lives, groups)), 60, "both servers to end")


def group_lives(group: int) -> bool:
    """Whether a process of the group runs (a zombie does not)."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _parent, its_group = path.read_text().rpartition(")")[2].split()[:3]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(its_group) == group and state not in "ZX":
            return True
    return False
