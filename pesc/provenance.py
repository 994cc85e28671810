"""Where a result was made: git commit, lock, package versions, hardware.  Facts for the manifest, never for a key.

Nothing here imports torch; GPUs are asked of `nvidia-smi`, so that planning and orchestration stay light.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import socket
import subprocess
import sys
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from pesc.settings import image_commit

PACKAGES = (
    "pesc", "torch", "transformers", "peft", "bitsandbytes", "accelerate", "deepspeed", "datasets", "lm-eval", "tokenizers", "safetensors",
    "pyarrow", "numpy", "gaoya", "gguf", "prefect",
)  # fmt: skip
PROJECT_ROOT = Path(__file__).resolve().parent.parent


@lru_cache(maxsize=1)
def environment() -> dict[str, Any]:
    """Everything about this machine and installation that a manifest records."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "packages": package_versions(),
        "constraints_sha256": _file_sha256(PROJECT_ROOT / "constraints.txt"),
        "git": git_state(),
        "hardware": hardware(),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def package_versions() -> dict[str, str]:
    """Versions of the packages that can change a result; absent ones are left out."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_state() -> dict[str, Any] | None:
    """Commit of the sources, and whether they differ from it: the checkout's, or that of the image.  None where neither is known."""
    commit = _output("git", "-C", str(PROJECT_ROOT), "rev-parse", "HEAD")
    if not commit:
        return {"commit": image_commit(), "dirty": False} if image_commit() else None
    changes = _output("git", "-C", str(PROJECT_ROOT), "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": bool(changes)}


def hardware() -> dict[str, Any]:
    """CPU, memory in bytes, and GPUs by name, memory and driver."""
    facts: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }
    if hasattr(os, "sysconf"):
        facts["memory_bytes"] = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    listing = (
        _output("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader") if shutil.which("nvidia-smi") else ""
    )
    facts["gpus"] = [line.strip() for line in listing.splitlines()] if listing else []
    return facts


def _cpu_name() -> str:
    return _cpu_field("model name") or platform.processor() or platform.machine()


def _cpu_field(*names: str) -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(names):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return ""


_BFLOAT16_FLAGS = {"avx512bw", "avx512_bf16", "amx_bf16", "avx_ne_convert", "bf16"}


def slow_bfloat16_sentence(setting: str) -> str | None:
    """A warning when this CPU has no instructions for bf16 matrices: torch's own loops are some twenty times slower than its fp32.

    None when the CPU has them, or does not say.  setting: what to set to float32 instead.
    """
    flags = set(_cpu_field("flags", "Features").split())
    if not flags or flags & _BFLOAT16_FLAGS:
        return None
    return f"This CPU ({_cpu_name()}) has no instructions for bfloat16 matrices, which makes them many times slower than float32: set {setting}=float32."


def _file_sha256(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def _output(*argv: str) -> str:
    try:
        return subprocess.run(argv, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
