from __future__ import annotations

import os
import signal
import subprocess
import sys

from pesc.launch.supervise import child_environment
from pesc.train.stop import StopRequest


def test_a_stop_is_a_file_or_a_signal(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    try:
        stop = StopRequest(tmp_path / "STOP")
        stop.defer()
        assert stop.code == 0.0
        (tmp_path / "STOP").touch()
        assert StopRequest.reason(stop.code) == "stop file"
        os.kill(os.getpid(), signal.SIGTERM)
        assert StopRequest.reason(stop.code) == "signal"
    finally:
        signal.signal(signal.SIGTERM, before)


def test_before_training_a_signal_ends_the_process(tmp_path):
    code = f"""
import os, signal, sys, time; from pathlib import Path; from pesc.train.stop import StopRequest
StopRequest(Path({str(tmp_path)!r}) / "STOP"); os.kill(os.getpid(), signal.SIGTERM); time.sleep(30)
"""
    assert subprocess.run([sys.executable, "-c", code], env=child_environment(), check=False).returncode == 143
