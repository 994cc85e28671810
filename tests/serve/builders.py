"""A Python that has vLLM, a sparse model whose experts differ, and a served model."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pesc.models.config import UpcycleConfig
from pesc.models.upcycle import upcycle_directory

ROOT = Path(__file__).resolve().parents[2]
UPCYCLED = UpcycleConfig(num_experts=8, top_k=2, adapter_dim=64)
START_SECONDS = 420  # a quiet machine of two cores needs 40


def vllm_python() -> str:
    """The Python of `$PESC_VLLM`, or of the environment that `make vllm` builds; skips where there is none."""
    python = Path(os.environ.get("PESC_VLLM") or ROOT / ".venv-vllm/bin/python")
    if not python.is_file():
        pytest.skip(f"no vLLM at {python}: run `make vllm`, or set PESC_VLLM to the Python of its environment")
    return str(python)


def make_fake_python(folder: Path, source: str = "", **versions: str) -> Path:
    """A Python whose environment holds packages of these versions, and a `vllm` server of this source."""
    site = folder / "site"
    for name, version in versions.items():
        (site / f"{name}-{version}.dist-info").mkdir(parents=True)
        (site / f"{name}-{version}.dist-info/METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\n"
        )
    server = site / "vllm/entrypoints/cli/main.py"
    server.parent.mkdir(parents=True, exist_ok=True)
    server.write_text(textwrap.dedent(source))
    program = folder / "python"
    program.write_text(f'#!/bin/sh\nexec env PYTHONPATH={site} {sys.executable} "$@"\n')
    program.chmod(0o755)
    return program


def save_slice(model: Path, directory: Path, layers: int | None) -> Path:
    """`directory/dense` and `directory/sparse`: the first layers of a model, and its sparse form with experts that differ."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    cut = {} if layers is None else {"num_hidden_layers": layers}
    AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16, **cut).save_pretrained(directory / "dense")
    AutoTokenizer.from_pretrained(model).save_pretrained(directory / "dense")
    (directory / "sparse").mkdir()
    upcycle_directory(directory / "dense", directory / "sparse", UPCYCLED)
    fill_experts(directory / "sparse")
    return directory


def fill_experts(directory: Path, deviation: float = 0.05) -> None:
    """Give each expert of a sparse directory values of its own, from a seed, so that it matters which one is chosen."""
    path = directory / "bank.safetensors"
    tensors, generator = load_file(path), torch.Generator().manual_seed(7)
    for name in sorted(tensors):
        if name.endswith("adapters.up"):
            tensors[name] = (torch.randn(tensors[name].shape, generator=generator) * deviation).to(tensors[name].dtype)
    save_file(tensors, directory / "filled", {"format": "pt"})
    os.replace(directory / "filled", path)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(model: Path, python: str, *options: str, log: Path) -> tuple[subprocess.Popen, str]:
    """`pesc serve`, and the URL that it says once it answers."""
    command = [sys.executable, "-m", "pesc.cli", "serve", str(model), "--python", python, "--port", str(free_port()), "--log", str(log)]
    process = subprocess.Popen(
        [*command, *options], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )  # fmt: skip
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        _, err = process.communicate()
        raise AssertionError(f"no server: {err}\n{log.read_text()[-3000:] if log.exists() else ''}")
    return process, line.split()[3]


@contextlib.contextmanager
def served(model: Path, python: str, *options: str, log: Path):
    """The URL of a served model; afterwards the server has ended cleanly."""
    process, url = start(model, python, *options, log=log)
    try:
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err


def processes_of(session_text: str) -> list[str]:
    """Command lines of living processes whose environment or command holds a text."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state = (place / "stat").read_text().rpartition(")")[2].split()[0]
            if state not in "ZX" and session_text in (place / "environ").read_text(errors="replace"):
                found.append((place / "cmdline").read_text(errors="replace").replace("\0", " "))
    return found


def wait_until_gone(text: str, seconds: float) -> list[str]:
    """What is still there of the processes that have a text in their environment, after at most so many seconds."""
    end = time.monotonic() + seconds
    while (left := processes_of(text)) and time.monotonic() < end:
        time.sleep(0.2)
    return left


def ask(python: str, url: str, requests: dict, room: Path) -> dict:
    """Run tests/serve/clients.py, which uses the `openai` package beside vLLM; returns what it writes."""
    (room / "requests.json").write_text(json.dumps(requests))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [python, str(ROOT / "tests/serve/clients.py"), url, str(room / "requests.json"), str(room / "answers.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((room / "answers.json").read_text())
