"""The systemd units: what systemd itself says of them, how they stop, and that nothing takes the GPUs away."""

from __future__ import annotations

import configparser
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from deployments.fleet import load_fleet
from deployments.worker import GRACE_SECONDS

FOLDER = Path(__file__).resolve().parents[2] / "deployments" / "systemd"
SERVER, WORKER = FOLDER / "pesc-server.service", FOLDER / "pesc-worker@.service"


class _Repeated(dict):
    """A setting that is given twice has both values, in lines."""

    def __setitem__(self, name, value):
        super().__setitem__(name, [*self[name], *value] if isinstance(value, list) and name in self else value)


def service(path: Path) -> dict[str, str]:
    """The unit's [Service]."""
    parser = configparser.ConfigParser(dict_type=_Repeated, strict=False, interpolation=None, comment_prefixes=("#",), delimiters=("=",))
    parser.optionxform = str
    parser.read(path)
    return dict(parser["Service"])


@pytest.mark.parametrize("path", [SERVER, WORKER], ids=lambda path: path.stem)
def test_systemd_accepts_it(path, tmp_path):
    if not shutil.which("systemd-analyze"):
        pytest.skip("no systemd-analyze here: apt-get install systemd")
    text = re.sub(r"/opt/pesc/\.venv/bin/\w+", sys.executable, path.read_text())
    assert verify(tmp_path / path.name, text) == ""
    assert "'KilMode'" in verify(tmp_path / path.name, text.replace("KillMode", "KilMode"))
    assert "soon" in verify(tmp_path / path.name, re.sub(r"TimeoutStopSec=\d+", "TimeoutStopSec=soon", text))


def verify(path: Path, text: str) -> str:
    """What systemd has to say of the unit."""
    path.write_text(text)
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", str(path)], capture_output=True, text=True, timeout=60, check=False)
    own = [line for line in done.stderr.splitlines() if "pesc" in line]
    assert own or done.returncode == 0, done.stderr
    return "\n".join(own)


def test_a_worker_that_is_stopped_tells_its_runs_alone_and_has_time_for_it():
    worker = service(WORKER)
    assert "-m deployments.worker" in worker["ExecStart"]
    assert worker["KillSignal"] == "SIGTERM"
    assert worker["KillMode"] == "mixed"  # SIGTERM to ours, which waits for the runs; SIGKILL to what is left
    environment = dict(word.split("=", 1) for word in worker["Environment"].split())
    grace = float(environment["PESC_WORKER_GRACE"])
    assert grace >= GRACE_SECONDS
    assert float(worker["TimeoutStopSec"]) >= grace + 30
    assert worker["SendSIGKILL"] == "yes"


def test_nothing_takes_the_gpus_or_the_compiler_away():
    hidden = {
        "PrivateDevices", "DevicePolicy", "DeviceAllow", "ProtectClock", "MemoryDenyWriteExecute",
        "RestrictAddressFamilies", "SystemCallFilter", "PrivateNetwork", "PrivateIPC", "MemoryMax",
    }  # fmt: skip
    assert not hidden & set(service(WORKER))
    assert service(WORKER)["LimitMEMLOCK"] == "infinity"


@pytest.mark.parametrize("path", [SERVER, WORKER], ids=lambda path: path.stem)
def test_secrets_come_from_a_file_that_only_root_reads_and_nothing_runs_as_root(path):
    unit = service(path)
    assert unit["User"] == "pesc"
    assert unit["NoNewPrivileges"] == "yes"
    assert unit["CapabilityBoundingSet"] == ""
    assert unit["EnvironmentFile"].split()[0].startswith("/etc/pesc/")
    assert not re.search(r"(AUTH_STRING|TOKEN|PASSWORD|asyncpg)", re.sub(r"(?m)^#.*$", "", path.read_text()))


def test_the_queues_that_the_comments_name_exist():
    queues = re.findall(r"--work-queue (\w+)", WORKER.read_text())
    assert set(queues) == set(load_fleet().pools["cpu"].queues)


def test_the_server_listens_on_this_machine_alone():
    assert "--host 127.0.0.1" in service(SERVER)["ExecStart"]
    assert service(SERVER)["KillMode"] == "mixed"
