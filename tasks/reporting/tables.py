"""Markdown tables, and values as text."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

_WORDS = 28
"""Characters of a cell that is read as a sentence, not as a number."""
MAX_CELL = 300
"""Characters of a value that a cell shows."""


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """A table; bars and line breaks inside cells are escaped.  numbers: columns that are aligned to the right."""
    rule = ["--:" if column in numbers else ":--" for column in range(len(header))]
    cells = [header, rule, *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in cells)


def align_words(text: str) -> str:
    """A page whose tables have columns of words to the left, though they were written for numbers, to the right."""
    lines = text.split("\n")
    for number, line in enumerate(lines):
        if not re.fullmatch(r"\|(?: ?:?-+:? ?\|)+", line.strip()):
            continue
        last = next((n for n in range(number, len(lines)) if not lines[n].startswith("|")), len(lines))
        columns = zip(*(_cells(row) for row in lines[number + 1 : last]), strict=False)
        wide = [any(len(cell) > _WORDS for cell in column) for column in columns]
        rule = _cells(line)
        lines[number] = "| " + " | ".join(":--" if index < len(wide) and wide[index] else cell for index, cell in enumerate(rule)) + " |"
    return "\n".join(lines)


def _cells(row: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", row.strip())[1:-1]]


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
