"""Tables in Markdown, for reports, cards and the pages of the Prefect UI."""

from __future__ import annotations

from collections.abc import Container, Sequence


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: Container[int] = ()) -> str:
    """A table; bars and line breaks inside cells are escaped.  numbers: columns that are aligned to the right."""
    rule = ["--:" if column in numbers else ":--" for column in range(len(head))]
    return "\n".join("| " + " | ".join(row) + " |" for row in (map(_cell, head), rule, *(map(_cell, row) for row in rows)))


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
