"""A view of the UI is not waited for; everything else is."""

import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import httpx
import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from pesc.build import make_job
from pesc.pipeline import build_graph
from tasks.execution import run_job
from tasks.patience import VIEW_RETRIES, impatient
from tasks.table import TASKS


def test_a_server_that_has_gone_is_given_up_within_seconds():
    class Once(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'"3.8.8"')

    server = HTTPServer(("127.0.0.1", 0), Once)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with (
        temporary_settings({PREFECT_API_URL: f"http://127.0.0.1:{server.server_port}/api"}),
        get_client(sync_client=True) as client,
    ):
        assert client.api_version() == "3.8.8"
        server.shutdown()
        server.server_close()
        started = time.monotonic()
        with impatient(), pytest.raises(httpx.TransportError):
            client.api_version()
        assert time.monotonic() - started < 15


def test_a_run_s_own_states_are_waited_for_longer():
    before = PREFECT_CLIENT_MAX_RETRIES.value()
    with impatient():
        assert PREFECT_CLIENT_MAX_RETRIES.value() == VIEW_RETRIES
    assert PREFECT_CLIENT_MAX_RETRIES.value() == before > VIEW_RETRIES


def test_it_costs_nothing_in_every_step_of_a_training():
    with impatient():
        pass
    started = time.monotonic()
    for _ in range(100):
        with impatient():
            pass
    assert time.monotonic() - started < 0.5


@pytest.mark.usefixtures("prefect_server")
def test_progress_and_results_are_shown_impatiently(fakes, store, tiny_recipe, monkeypatch):
    seen = []

    def note(*_):
        seen.append(PREFECT_CLIENT_MAX_RETRIES.value())

    monkeypatch.setattr("tasks.execution.ProgressReport.__call__", note)
    monkeypatch.setattr("tasks.execution.publish_result", note)
    recipe = tiny_recipe()
    job = make_job(build_graph(recipe).by_address["download[base]"], recipe, {})

    @flow
    def alone():
        return run_job(TASKS["download"], job, store)

    assert alone().how == "built"
    assert seen == [VIEW_RETRIES] * 2


def test_settings_of_the_project_make_a_client_patient_from_its_root(tmp_path):
    """A worker's flow process starts in the checkout, where Prefect finds [tool.prefect.client]."""
    code = "from prefect.settings import PREFECT_CLIENT_MAX_RETRIES as m; print(m.value())"
    root = Path(__file__).resolve().parents[2]
    found = [
        subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=True).stdout.strip()
        for cwd in (root, tmp_path)
    ]
    assert [int(number) for number in found] == [8, 5]
    assert sum(2**n for n in range(1, 9)) > 480, "eight minutes"
