"""Prompts from a file or a pipe: one JSON object a line, `{"prompt": "..."}` or `{"messages": [{"role": "user", "content": "..."}]}`.

Other keys are kept and come back beside the answer.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pesc.errors import DataError

ROLES = ("system", "user", "assistant", "tool")
Message = dict[str, str]


@dataclass(frozen=True)
class PromptRow:
    """One row, checked: a prompt or a conversation, never both."""

    number: int
    """Line, from 1."""
    fields: dict[str, Any]

    @property
    def content(self) -> str | list[Message]:
        """The prompt, or the messages."""
        return self.fields["prompt"] if "prompt" in self.fields else self.fields["messages"]


def read_prompts(path: str) -> list[PromptRow]:
    """All rows of a file (`-`: standard input), checked before the first is answered.  Raises DataError that names the file and the row."""
    where = "standard input" if path == "-" else path
    try:
        data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error}): give a file of JSON lines with --file.") from None
    rows = list(_rows(data.splitlines(), where))
    if not rows:
        raise DataError(f'{where} has no rows: write one JSON object a line, such as {{"prompt": "Why is the sky blue?"}}.')
    return rows


def _rows(lines: Iterable[bytes], where: str) -> Iterable[PromptRow]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}, row {number}: is not JSON ({error}).") from None
        if reason := _broken(fields):
            raise DataError(f"{where}, row {number}: {reason}.")
        yield PromptRow(number, fields)


def _broken(fields: Any) -> str | None:
    """What is wrong with a row, or None."""
    if not isinstance(fields, dict):
        return f"must be an object with `prompt` or `messages`, not {type(fields).__name__}"
    if ("prompt" in fields) == ("messages" in fields):
        return "must have `prompt` or `messages`, one of the two"
    if "prompt" in fields:
        prompt = fields["prompt"]
        return None if isinstance(prompt, str) and prompt else "`prompt` must be a text that is not empty"
    messages = fields["messages"]
    if not isinstance(messages, list) or not messages:
        return "`messages` must be a list that is not empty"
    return next(filter(None, (_broken_message(place, message) for place, message in enumerate(messages, 1))), None)


def _broken_message(place: int, message: Any) -> str | None:
    if not isinstance(message, dict) or not isinstance(message.get("content"), str):
        return f"message {place} must be an object with `role` and `content`, both text"
    if message.get("role") not in ROLES:
        return f"message {place} has the role {message.get('role')!r}: it must be one of {', '.join(ROLES)}"
    return None
