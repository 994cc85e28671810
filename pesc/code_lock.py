"""stages.lock: which sources each stage's `code_version` stands for.

Automatic source hashing in a cache key reruns a day of training for a comment; versions kept by hand are forgotten. So the integer
is in the key, and the lock holds a digest of the sources it was decided for, with comments, docstrings and formatting removed.
A test compares them: whoever changes a stage raises its `code_version`, or says with `pesc dev lock` that its bytes stay the same.
"""

from __future__ import annotations

import ast
import json
from pathlib import Path

from pesc.pipeline import STAGES, Stage
from pesc.store.digest import digest_json
from pesc.store.disk import write_atomic

PACKAGE_ROOT = Path(__file__).resolve().parent.parent
LOCK_PATH = Path(__file__).with_name("stages.lock")


def sources_digest(stage: Stage) -> str:
    """Digest of a stage's sources as the interpreter sees them (and of the data files beside them)."""
    files = {path for module in stage.sources for path in _module_files(module)}
    parts = {path.relative_to(PACKAGE_ROOT).as_posix(): _normalised(path) for path in files}
    return digest_json(parts)


def current_lock() -> dict[str, dict[str, int | str]]:
    """What the lock should say for the sources as they are."""
    return {stage.name: {"code_version": stage.code_version, "sources": sources_digest(stage)} for stage in STAGES}


def read_lock() -> dict[str, dict[str, int | str]]:
    """What the lock says."""
    return json.loads(LOCK_PATH.read_text())


def write_lock() -> list[str]:
    """Bring the lock up to date; returns the names of the stages that changed."""
    old = read_lock() if LOCK_PATH.exists() else {}
    new = current_lock()
    write_atomic(LOCK_PATH, (json.dumps(new, indent=2) + "\n").encode())
    return [name for name in new if old.get(name) != new[name]]


def lock_problems() -> list[str]:
    """Sentences about stages whose sources changed since somebody last decided."""
    locked, problems = read_lock(), []
    for name, now in current_lock().items():
        was = locked.get(name)
        if was == now:
            continue
        if was and was["code_version"] == now["code_version"]:
            problems.append(
                f"The sources of `{name}` changed. If its results can change, raise its code_version in pesc/pipeline.py; then run `pesc dev lock`."
            )
        else:
            problems.append(f"stages.lock does not have code_version {now['code_version']} of `{name}` yet: run `pesc dev lock`.")
    return problems


def _module_files(module: str) -> list[Path]:
    path = PACKAGE_ROOT.joinpath(*module.split("."))
    if path.is_dir():
        return [p for p in path.rglob("*") if p.suffix in {".py", ".yaml", ".j2", ".html"}]
    return [path.with_suffix(".py")]


def _normalised(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        return text
    tree = ast.parse(text)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [item for item in body if not _is_docstring(item)]  # type: ignore[attr-defined]
    return ast.unparse(tree)


def _is_docstring(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
