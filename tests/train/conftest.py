from __future__ import annotations

import pytest

from tests.train import tiny


@pytest.fixture(scope="session")
def dense_dir(tmp_path_factory):
    return tiny.save_dense(tmp_path_factory.mktemp("models") / "dense")


@pytest.fixture(scope="session")
def sparse_dir(tmp_path_factory):
    return tiny.save_sparse(tmp_path_factory.mktemp("models") / "sparse")


@pytest.fixture(scope="session")
def blocks_dir(tmp_path_factory):
    return tiny.write_blocks(tmp_path_factory.mktemp("blocks"), 23)
