"""The words of the benchmark items as numbers, and the same words with their digits masked.

    0           any word that no item has; the gap between two turns
    1 .. V      the words of the items, in the order of their first use
    V+1 .. V+M  masked forms: `73` and `8` are both `#`, `16t` is `#t`, and so are the spelled-out numbers up to a million

A row's `73` that no item has becomes the number of `#`: it equals no item's word, but its masked form is that of any other number.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable, Sequence
from itertools import chain

import numpy as np

NUMBER = "#"
_REMEMBERED = 200_000  # words with their numbers, those of the items included; 20 MB
_LONGEST = 40  # characters
_DIGITS = re.compile(r"\d+")
_SPELLED = frozenset(
    re.findall(
        r"\w+",
        """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen
        twenty thirty forty fifty sixty seventy eighty ninety hundred thousand million""",
    )
)


def mask_numbers(word: str) -> str:
    """The word with each run of digits as `#`; a spelled-out number is `#`."""
    if word in _SPELLED:
        return NUMBER
    return word if word.isalpha() else _DIGITS.sub(NUMBER, word)


class _Numbers(dict[str, int]):
    """word -> number; a word that is missing counts by its masked form, or as 0."""

    def __init__(self, known: Iterable[str], masked: Sequence[str]) -> None:
        super().__init__(zip(known, range(1, len(masked) + 1), strict=False))
        self.masked: dict[str, int] = {}

    def __missing__(self, word: str) -> int:
        masked = mask_numbers(word)
        number = 0 if masked == word else self.masked.get(masked, 0)
        if len(self) < _REMEMBERED and len(word) <= _LONGEST:
            self[word] = number
        return number


class Vocabulary:
    """Numbers of words.  `masked[number]` is the number of the masked form; words without digits are their own."""

    def __init__(self, known: Sequence[str]) -> None:
        self.words = known
        forms = [mask_numbers(word) for word in known]
        self.size = len(known)
        self._numbers = _Numbers(known, known)
        masked: dict[str, int] = {}
        for word, form in zip(known, forms, strict=True):
            if form != word:
                masked.setdefault(form, self.size + 1 + len(masked))
        self._numbers.masked = masked
        own = np.arange(self.size + 1 + len(masked), dtype=np.int32)
        own[1 : self.size + 1] = [masked.get(form, number) for number, form in enumerate(forms, start=1)]
        self.masked = own

    @classmethod
    def of(cls, texts: Iterable[Sequence[str]]) -> Vocabulary:
        """The distinct words of some token lists."""
        return cls(list(dict.fromkeys(chain.from_iterable(texts))))

    def numbers(self, tokens: Iterable[str]) -> array[int]:
        """The numbers of words, as 32-bit integers; numpy reads them in place."""
        return array("i", map(self._numbers.__getitem__, tokens))
