"""Fixtures of the flow tests."""

from __future__ import annotations

from dataclasses import replace

import pytest
import yaml


@pytest.fixture
def recipe_file(tmp_path, fakes, monkeypatch):
    """Path of a complete recipe over local files, with fake builders installed."""
    from pesc import pipeline
    from tests.fake_stages import tiny_recipe_dict

    report = replace(pipeline._BY_NAME["report"], builder="tests.flows.builders:build_report", isolated=False, sources=())
    monkeypatch.setitem(pipeline._BY_NAME, "report", report)
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_recipe_dict(tmp_path / "sources")))
    return str(path)
