"""Equal conversations: one survivor each, whatever the order of the rows."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from pesc.data.conversation import Conversation
from pesc.data.text import normal_form


def survival_order(row: Conversation) -> tuple[int, str, str, int]:
    """Sort key under which, of two duplicates, the first survives: the longer one, then the smaller id."""
    return (-row.chars, row.id, row.file, row.row)


def content_key(row: Conversation) -> bytes:
    """Digest of roles and texts up to case, Unicode form and white space."""
    digest = hashlib.blake2b(digest_size=16)
    for message in row.messages:
        digest.update(f"{message.role}\0{normal_form(message.content)}\1".encode())
    return digest.digest()


def split_exact_duplicates(rows: Iterable[Conversation]) -> tuple[list[Conversation], list[tuple[Conversation, Conversation]]]:
    """(survivors, [(removed, its survivor)]), both in survival order; duplicates are found across data sets."""
    first: dict[bytes, Conversation] = {}
    removed = []
    for row in sorted(rows, key=survival_order):
        survivor = first.setdefault(content_key(row), row)
        if survivor is not row:
            removed.append((row, survivor))
    return list(first.values()), removed
