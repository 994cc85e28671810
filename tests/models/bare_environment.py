"""A virtual environment that holds torch, transformers, jinja2 and what they require, and nothing else.

The distributions are those of this environment, linked; which they are is read from their own metadata, as pip would.  Another version of
transformers is installed by pip with all that it requires; torch, which it does not require, stays linked.
"""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from collections.abc import Sequence
from importlib.metadata import Distribution, distributions, packages_distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOTS = ("torch", "transformers", "jinja2")  # jinja2: transformers renders chat templates with it, and does not require it


def required(roots: Sequence[str], site: Path | None = None) -> dict[str, Distribution]:
    """The roots and all that they require on this machine, by canonical name; of this environment, or of a site-packages."""
    there = {canonicalize_name(dist.name): dist for dist in (distributions(path=[str(site)]) if site else distributions())}
    found: dict[str, Distribution] = {}
    waiting, seen = [(root, "") for root in roots], set()
    while waiting:
        name, extra = waiting.pop()
        name = canonicalize_name(name)
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        found[name] = there[name]
        for requirement in map(Requirement, there[name].requires or ()):
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                waiting += [(requirement.name, wanted) for wanted in ("", *requirement.extras)]
    return found


def make_environment(directory: Path, transformers: str | None = None) -> tuple[Path, set[str]]:
    """(its python, the canonical names of its distributions); `transformers`: a requirement that pip installs, in place of the one here."""
    venv.create(directory, with_pip=False, symlinks=True)
    site = next(directory.glob("lib/python*/site-packages"))
    if transformers is not None:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(site), transformers]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    linked = required(ROOTS if transformers is None else [root for root in ROOTS if root != "transformers"])
    owners = packages_distributions()
    for dist in linked.values():
        _link(dist, site, set(linked), owners)
    return directory / "bin/python", set(required(ROOTS, site))


def _link(dist: Distribution, site: Path, allowed: set[str], owners: dict) -> None:
    """Link what lies at the top of a distribution; a package that is shared with a distribution beside the allowed ones is refused."""
    if list(site.glob(f"{canonicalize_name(dist.name).replace('-', '_')}-*.dist-info")):  # pip has brought it
        return
    for top in sorted({file.parts[0] for file in dist.files or ()} - {"..", "__pycache__"}):
        if top.endswith(".pth") or (site / top).exists():
            continue
        others = {canonicalize_name(owner) for owner in owners.get(top.removesuffix(".py"), ())} - allowed
        assert not others, f"{top} belongs to {others} as well"
        os.symlink(Path(str(dist.locate_file(top))), site / top)


def run_bare(python: Path, script: Path, *arguments: object, home: Path) -> str:
    """Standard output of a script, with nothing of this environment in it but PATH."""
    environment = {
        "PATH": os.environ["PATH"], "HOME": str(home), "HF_HOME": str(home / "hf"), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "2",
    }  # fmt: skip
    command = [str(python), "-I", str(script), *map(str, arguments)]
    done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
