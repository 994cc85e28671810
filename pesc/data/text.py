"""Words, and the two normal forms that texts are compared in."""

from __future__ import annotations

import re
import unicodedata

_WORD = re.compile(r"\w+")
_SPACE = re.compile(r"\s+")


def words(text: str) -> list[str]:
    r"""Lower-cased `\w+` words: the unit of shingles and of the contamination test.  Punctuation and layout do not count."""
    return _WORD.findall(text.lower())


def normal_form(text: str) -> str:
    """Text up to case, Unicode form and runs of white space.  Punctuation counts: `5 + 3` is not `5 - 3`."""
    return _SPACE.sub(" ", unicodedata.normalize("NFKC", text)).strip().casefold()


def excerpt(text: str, length: int = 160) -> str:
    """The start of a text on one line, for ledgers and messages."""
    line = _SPACE.sub(" ", text).strip()
    return line if len(line) <= length else line[: length - 1] + "…"
