"""One conversation schema for the rows of every format.

A conversation is an optional system turn, then turns that begin with the user's and end with the assistant's, no two of one role
in a row.  Tools are listed in the system turn, a call of them is an assistant turn, their results are a tool turn.  Per-turn weights
of the hub's sets are not read: every assistant turn is trained on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pesc.data.formats import PARSERS, TURN_FIELDS, detect_format, no_format
from pesc.data.turns import ROLES, BadRow, Message, Parsed, RowError, check_turns

__all__ = [
    "ROLES",
    "BadRow",
    "Conversation",
    "Message",
    "Parsed",
    "RowError",
    "conversation_id",
    "detect_format",
    "parse_row",
]


@dataclass(frozen=True, slots=True)
class Conversation:
    """One training row with where it came from.  `id` depends on the data set's name and the turns alone."""

    id: str
    dataset: str
    domain: str
    stratum: str
    messages: tuple[Message, ...]
    questions: tuple[str, ...]
    file: str
    row: int

    @property
    def chars(self) -> int:
        """Characters over all turns."""
        return sum(len(message.content) for message in self.messages)

    @property
    def text(self) -> str:
        """All turns but the system's, which many rows share."""
        return "\n".join(message.content for message in self.messages if message.role != "system")

    @property
    def prompt(self) -> str:
        """The first user turn, for excerpts."""
        return next(message.content for message in self.messages if message.role == "user")


def conversation_id(dataset: str, messages: tuple[Message, ...]) -> str:
    """128 bits of SHA-256 over the data set's name and the turns, as hex."""
    payload = json.dumps([dataset, messages], ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(payload.encode()).hexdigest()[:32]


def parse_row(row: Any, row_format: str = "auto") -> Parsed:
    """One row as a conversation.  auto: in the format that this row's own fields show.

    Raises RowError naming the field: a row that could not be read (BadRow), one without a known format, or one that is no conversation.
    """
    if isinstance(row, BadRow):
        raise RowError("row", row.reason)
    if not isinstance(row, Mapping):
        raise RowError("row", f"is a {type(row).__name__}, not a map of fields")
    if row_format == "auto":
        found = detect_format(row)
        if found is None:
            raise no_format(row)
        row_format = found
    parsed = PARSERS[row_format](row)
    check_turns(parsed.messages, TURN_FIELDS.get(row_format, "messages"))
    return parsed
