"""Shared fixtures: no test touches the network, the user's store, or another test's files."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
if "PYTEST_XDIST_WORKER" in os.environ:  # the others have the other cores; set before torch is loaded, and for children
    os.environ.setdefault("OMP_NUM_THREADS", "1")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's `make test &`; every child would be deaf to the Ctrl-C that tests send
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """One thread for tiny tensors: two that wait for each other cost thirty times the work when something else runs on the machine."""
    if "torch" in sys.modules:
        import torch

        large = any(item.get_closest_marker(name) for name in ("slow", "benchmark", "gpu", "vllm"))
        torch.set_num_threads(_THREADS if large else 1)


_CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
_THREADS = 1 if "PYTEST_XDIST_WORKER" in os.environ else _CORES  # as many as OMP_NUM_THREADS gives to children


@pytest.fixture(autouse=True)
def _no_user_store(monkeypatch, tmp_path):
    monkeypatch.setenv("PESC_STORE", str(tmp_path / "store"))
    monkeypatch.delenv("PESC_REMOTE", raising=False)


@pytest.fixture
def store(tmp_path):
    from pesc.store import Store

    return Store(tmp_path / "store")


@pytest.fixture
def remote(tmp_path, monkeypatch):
    """A directory that is the remote of every store."""
    from pesc.store import remote as module

    monkeypatch.setattr(module, "_OPEN", {})
    (tmp_path / "remote").mkdir()
    monkeypatch.setenv("PESC_REMOTE", str(tmp_path / "remote"))
    return tmp_path / "remote"


@pytest.fixture
def fakes(monkeypatch):
    """The fake builders, installed."""
    from tests import fake_stages

    fake_stages.install(monkeypatch)
    return fake_stages


@pytest.fixture
def tiny_recipe(tmp_path):
    """A factory: `tiny_recipe(**changes)` makes a complete recipe over local files."""
    from pesc.recipe import _merge, recipe_from_dict
    from tests.fake_stages import tiny_recipe_dict

    def make(**changes):
        return recipe_from_dict(_merge(tiny_recipe_dict(tmp_path / "sources"), changes))

    return make


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real rows that are not part of the project; skips where they are absent."""
    root = Path(os.environ.get("PESC_SHARED_DATA") or Path(__file__).resolve().parents[2] / "shared")
    if not (root / "data").is_dir():
        pytest.skip(f"no shared data at {root}: set PESC_SHARED_DATA")
    return root


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory):
    """A Prefect server of this test session, with a home of its own."""
    pytest.importorskip("prefect")
    from prefect.settings import PREFECT_HOME, PREFECT_SERVER_ANALYTICS_ENABLED, temporary_settings
    from prefect.testing.utilities import prefect_test_harness

    updates = {PREFECT_HOME: tmp_path_factory.mktemp("prefect"), PREFECT_SERVER_ANALYTICS_ENABLED: False}
    with temporary_settings(updates), prefect_test_harness(server_startup_timeout=180):
        yield
