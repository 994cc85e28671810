"""Who may import whom, and how fast: the borders of the house."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_import_contracts_hold():
    """`deployments → flows → tasks → pesc`, never backwards, and the other contracts in pyproject.toml."""
    done = subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


HEAVY = ("torch", "transformers", "datasets", "deepspeed", "lm_eval", "prefect", "bitsandbytes", "numpy", "pyarrow", "matplotlib")


@pytest.mark.parametrize(
    "module", ["pesc.cli", "pesc.plan", "pesc.build", "pesc.run", "pesc.store.maintenance", "pesc.data.sources", "pesc.launch.isolated"]
)
def test_orchestration_imports_nothing_heavy(module):
    code = f"import {module}, sys; print(*[m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == []


def test_the_library_never_imports_prefect():
    offenders = [p for p in (ROOT / "pesc").rglob("*.py") if "import prefect" in p.read_text() or "from prefect" in p.read_text()]
    assert offenders == []
