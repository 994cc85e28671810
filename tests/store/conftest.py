"""Fixtures of the store's tests."""

from __future__ import annotations

import pytest

from tests.store.bucket import new_bucket, start_server


@pytest.fixture(scope="session")
def bucket_server(tmp_path_factory):
    pytest.importorskip("moto", reason="needs the extra dev: moto[server]")
    pytest.importorskip("s3fs", reason="needs the extra s3")
    server = start_server(tmp_path_factory.mktemp("s3"))
    yield server
    server.stop()


@pytest.fixture
def bucket(bucket_server, monkeypatch):
    """An empty bucket; the environment has what its driver needs."""
    for name, value in bucket_server.environment.items():
        monkeypatch.setenv(name, value)
    return new_bucket(bucket_server)


@pytest.fixture(params=["directory", "memory", "bucket"])
def remote_url(request, tmp_path):
    """A place for a remote, of each kind."""
    if request.param == "bucket":
        return request.getfixturevalue("bucket").url
    if request.param == "memory":
        return f"memory://{tmp_path.name}"
    (tmp_path / "remote").mkdir()
    return str(tmp_path / "remote")
