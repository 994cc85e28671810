"""What a light rewording does to a question: seeded, and independent of the rules under test."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

_WORD = re.compile(r"\w+")


def reword(text: str, rng: random.Random, others: Sequence[str]) -> str:
    """One word in 20 (at least one) replaced by another word; case, punctuation and spacing changed; a sentence before and one after."""
    spans = [match.span() for match in _WORD.finditer(text)]
    replaced = set(rng.sample(range(len(spans)), max(1, round(len(spans) / 20))))
    parts, last = [], 0
    for number, (begin, end) in enumerate(spans):
        gap = text[last:begin]
        parts.append((rng.choice([" ", "  ", "\n"]) if not gap.strip() else rng.choice([gap, " ", ", ", " - "])) if number else gap)
        word = text[begin:end]
        parts.append(rng.choice(others) if number in replaced else rng.choice([word, word.upper(), word.lower(), word.capitalize()]))
        last = end
    return f"My teacher gave me this one yesterday. {''.join(parts)}{rng.choice(['', '.', ' ?'])} Please explain each step to me."
