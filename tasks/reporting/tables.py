"""Values as text, for the cells of tables."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

MAX_CELL = 300
"""Characters of a value that a cell shows."""


def seconds_text(seconds: float) -> str:
    """`41.0 s`, `12.5 min` or `3.1 h`."""
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def bytes_text(size: float) -> str:
    """`1.2 kB`, `90.9 MB`, `3.48 GB`."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:,.3g} {unit}" if size < 1000 * scale else f"{size / scale:,.0f} {unit}"
    return f"{size:g} bytes"


def value_text(name: str, value: Any) -> str:
    """A measurement or a fact for reading: bytes with their unit, numbers short, what is nested as `name value, name value`."""
    if isinstance(value, bool) or value is None:
        text = {True: "yes", False: "no", None: "–"}[value]
    elif isinstance(value, int | float):
        is_bytes = name.endswith("bytes") or name.endswith("_memory")
        text = bytes_text(value) if is_bytes else f"{value:,}" if isinstance(value, int) else f"{value:.6g}"
    elif isinstance(value, str):
        text = value
    elif isinstance(value, Mapping) and all(not isinstance(item, Mapping | list | tuple) for item in value.values()):
        text = ", ".join(f"{key} {value_text(str(key), item)}" for key, item in value.items())
    elif isinstance(value, list | tuple) and all(isinstance(item, str | int | float) for item in value):
        text = ", ".join(map(str, value)) or "–"
    else:
        text = json.dumps(value, default=str)
    return text if len(text) <= MAX_CELL else text[: MAX_CELL - 1] + "…"
