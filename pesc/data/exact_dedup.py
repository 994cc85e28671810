"""Equal conversations: one survivor each, whatever the order of the rows; and the order in which rows survive one another."""

from __future__ import annotations

import hashlib

import numpy as np

from pesc.data.conversation import Conversation
from pesc.data.text import normal_form

KEYS = np.dtype(
    [
        ("id", "<u8", 2),
        ("content", "<u8", 2),
        ("group", "<u8", 2),
        ("tie", "<u8", 2),
        ("chars", "<i8"),
        ("file", "<i4"),
        ("row", "<i8"),
        ("shingles", "<i4"),
    ]
)
"""What is known of a row when its text is not in memory.

id, content, group and tie are 128-bit digests as two halves (see `halves`); tie is that of stratum and group, in which rows of one id may
differ.  file and row say where it came from; shingles counts its word n-grams.
"""


def halves(digests: list[bytes]) -> np.ndarray:
    """128-bit digests as uint64 [N, 2]; they sort as the bytes, and the hex, do."""
    return np.frombuffer(b"".join(digests), dtype=">u8").reshape(-1, 2).astype("<u8")


def hex_of(half_pair: np.ndarray) -> str:
    """The hex of one digest of `halves`."""
    return f"{int(half_pair[0]):016x}{int(half_pair[1]):016x}"


def content_key(row: Conversation) -> bytes:
    """128-bit digest of roles and texts up to case, Unicode form and white space."""
    digest = hashlib.blake2b(digest_size=16)
    for message in row.messages:
        digest.update(f"{message.role}\0{normal_form(message.content)}\1".encode())
    return digest.digest()


def survival_order(keys: np.ndarray) -> np.ndarray:
    """Places of KEYS rows in the order under which, of two duplicates, the first survives: the longer one, then the smaller id."""
    ids = keys["id"]
    return np.lexsort((keys["row"], keys["file"], keys["tie"][:, 1], keys["tie"][:, 0], ids[:, 1], ids[:, 0], -keys["chars"]))


def find_exact_duplicates(keys: np.ndarray, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(removed, its survivor) as places, given places in survival order; found across data sets."""
    content = keys["content"][order]
    by_content = np.lexsort((content[:, 1], content[:, 0]))  # stable: equal contents stay in survival order
    content = content[by_content]
    is_first = np.concatenate(([True], (content[1:] != content[:-1]).any(axis=1)))[: len(order)]
    first = np.flatnonzero(is_first)
    survivors = by_content[first[np.cumsum(is_first) - 1]]
    return order[by_content[~is_first]], order[survivors[~is_first]]
