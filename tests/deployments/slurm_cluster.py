"""A real Slurm of one node with two GPUs that are files, from Debian's packages slurmctld, slurmd and slurm-client.

from tests.deployments.slurm_cluster import slurm        # a fixture; `slurm` is the environment in which srun finds it
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deployments.servers import free_port, wait_for

CONFIGURATION = """
ClusterName=pesc-tests
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
CredType=cred/none
SlurmctldPort={controller_port}
SlurmdPort={daemon_port}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
GresTypes=gpu
KillWait=20
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} Gres=gpu:2 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
PartitionName=gpu Nodes={host} MaxTime=INFINITE State=UP
"""


def write(folder: Path) -> None:
    """The cluster's files."""
    host = socket.gethostname().partition(".")[0]
    for name in ("state", "spool"):
        (folder / name).mkdir()
    gpus = [folder / f"gpu{number}" for number in range(2)]
    for gpu in gpus:
        gpu.touch()
    (folder / "gres.conf").write_text("".join(f"NodeName={host} Name=gpu File={gpu}\n" for gpu in gpus))
    settings = {"host": host, "folder": folder, "cpus": os.cpu_count(), "controller_port": free_port(), "daemon_port": free_port()}
    (folder / "slurm.conf").write_text(CONFIGURATION.format(**settings))


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment in which Slurm's programs find the cluster; skips where there is no Slurm, or for another user than root."""
    if os.getuid() != 0 or not all(map(shutil.which, ("slurmctld", "slurmd", "srun", "scancel"))):
        pytest.skip("no Slurm here, or not root: apt-get install slurmctld slurmd slurm-client")
    folder = tmp_path_factory.mktemp("slurm")
    write(folder)
    environment = {"SLURM_CONF": str(folder / "slurm.conf")}
    daemons: list[subprocess.Popen[bytes]] = []
    try:
        for program in ("slurmctld", "slurmd"):
            with (folder / f"{program}.log").open("wb") as log:
                command = [program, "-D", *(["-c"] if program == "slurmctld" else [])]
                daemons.append(subprocess.Popen(command, env={**os.environ, **environment}, stdout=log, stderr=subprocess.STDOUT))

        def ready() -> bool:
            said = subprocess.run(
                ["sinfo", "-h", "-o", "%T"], env={**os.environ, **environment}, capture_output=True, text=True, check=False
            )
            return "idle" in said.stdout

        wait_for(ready, 60, "Slurm's node")
        yield environment
    finally:
        for daemon in reversed(daemons):
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
