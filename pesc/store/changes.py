"""What differs between two keys of one stage, in words."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pesc.store.manifest import Key


def changes_between(old: Key, new: Key) -> list[str]:
    """What differs between two keys of one stage, as `config.x 0.8 → 0.7`, `input mix 3f2a → 91bc`, `code_version 4 → 5`."""
    changes = []
    if old.format != new.format:
        changes.append(f"format {old.format} → {new.format}")
    if old.code_version != new.code_version:
        changes.append(f"code_version {old.code_version} → {new.code_version}")
    changes += [f"config.{path} {_short(a)} → {_short(b)}" for path, a, b in _differences(old.config, new.config)]
    for name in sorted(set(old.inputs) | set(new.inputs)):
        a, b = old.inputs.get(name), new.inputs.get(name)
        if a != b:
            changes.append(f"input {name} {a[:4] if a else 'none'} → {b[:4] if b else 'none'}")
    return changes


_ABSENT = object()


def _differences(old: Any, new: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted(set(old) | set(new)):
            yield from _differences(old.get(name, _ABSENT), new.get(name, _ABSENT), f"{path}.{name}" if path else name)
    elif old != new:
        yield path, old, new


def _short(value: Any) -> str:
    text = "absent" if value is _ABSENT else str(value)
    return text if len(text) <= 40 else text[:37] + "..."
