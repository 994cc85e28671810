from __future__ import annotations

import pytest

from tests.data.conftest import smollm2  # noqa: F401  the same fixture
from tests.evaluate.builders import build_data, build_model


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    return build_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    return build_data(tmp_path_factory.mktemp("data"))
