"""As many instruction rows as wanted, made from real ones, with known duplicates and known contamination.

A synthetic row is a real row whose words are exchanged, each distinct word of four or more small letters for another with a probability of
0.6, the same way throughout the row: lengths, layout, numbers, code that parses and answers that agree stay as they were, and two rows
made from one share few word 5-grams.  Real rows with too few such words (numbers, other scripts) are no seeds.  Every row is drawn from
(seed, data set, chunk) alone, so that a larger set begins with the smaller one.

    exact      an earlier row of its chunk in other case and white space
    edit_1     an earlier row with 1 word in 100 exchanged, at least one                edit_2    with 2 in 100
    verbatim   a benchmark question inside an instruction                               reworded  the same with 1 word in 20 exchanged
"""

from __future__ import annotations

import copy
import json
import keyword
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pesc.data.rows import read_rows

CHUNK = 10_000
SHARES = {"exact": 0.04, "edit_1": 0.03, "edit_2": 0.03, "verbatim": 0.005, "reworded": 0.005}
_WORD = re.compile(r"(?<![\\_])\b[a-z]{4,}\b")
_KEPT_WORDS = 20
_MARKS = frozenset({"answer", "python", "return"})
"""Words that answers are checked by."""
_EXCHANGED = 0.6
_LEAST_SHARE = 0.25
_EDITABLE = re.compile(r"\b[A-Za-z]{3,}\b")


class Planted(NamedTuple):
    """A row that was put there on purpose: its number in its file, what it is, and the row number or benchmark item that it is made from."""

    row: int
    kind: str
    origin: str


@dataclass(frozen=True)
class Seeds:
    """Real rows of one data set, and the words to exchange theirs for."""

    rows: Sequence[dict[str, Any]]
    row_format: str
    vocabulary: Sequence[str]
    fixed: frozenset[str]


def read_seeds(path: Path, row_format: str, without: frozenset[int] = frozenset()) -> Seeds:
    """The rows of a file of whose words at least a quarter can be exchanged, but those with the numbers `without`.

    The most frequent words, and Python's, are never exchanged.
    """
    rows = [row for number, row in read_rows(path) if isinstance(row, dict) and number not in without]
    counts = Counter(word for row in rows for text in _texts(row) for word in _WORD.findall(text))
    frequent = {word for word, _ in counts.most_common(_KEPT_WORDS)}
    fixed = frozenset({*frequent, *keyword.kwlist, *keyword.softkwlist, *_MARKS})
    usable = [row for row in rows if _share_of_exchangeable(row, fixed) >= _LEAST_SHARE]
    return Seeds(usable, row_format, sorted(set(counts) - fixed), fixed)


def _share_of_exchangeable(row: dict[str, Any], fixed: frozenset[str]) -> float:
    text = " ".join(_texts(row))
    return sum(word not in fixed for word in _WORD.findall(text)) / max(1, len(text.split()))


def write_chunk(path: Path, seeds: Seeds, items: Sequence[tuple[str, str]], rows: int, seed: str) -> list[Planted]:
    """One jsonl file of so many rows; items are (benchmark, question)."""
    draw = random.Random(seed)
    made: list[dict[str, Any]] = []
    planted: list[Planted] = []
    kinds = [kind for kind in SHARES if items or kind not in ("verbatim", "reworded")]
    weights = [*(SHARES[kind] for kind in kinds), 1 - sum(SHARES.values())]
    with path.open("w", encoding="utf-8") as stream:
        for number in range(1, rows + 1):
            kind = draw.choices([*kinds, "own"], weights)[0] if number > 1 else "own"
            row, origin = _make(kind, seeds, items, made, draw)
            if kind != "own":
                planted.append(Planted(number, kind, origin))
            made.append(row if kind == "own" else {})
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
    return planted


def _make(
    kind: str, seeds: Seeds, items: Sequence[tuple[str, str]], made: list[dict[str, Any]], draw: random.Random
) -> tuple[dict[str, Any], str]:
    if kind == "own":
        return _own(seeds, draw), ""
    if kind in ("verbatim", "reworded"):
        benchmark, question = draw.choice(items)
        if kind == "reworded":
            question = _edit(question.lower(), 0.05, draw)
        wrapped = f"Please solve the following problem.\n\n{question}\n\nExplain each step."
        return _with_prompt(_own(seeds, draw), wrapped), f"{benchmark}: {question[:80]}"
    place = next(place for place in iter(lambda: draw.randrange(len(made)), None) if made[place])
    original = made[place]
    if kind == "exact":
        return _map_texts(original, lambda text: text.replace(" ", "  ").upper()), str(place + 1)
    share = 0.01 if kind == "edit_1" else 0.02
    longest = max(_texts(original), key=len)
    total = sum(len(text.split()) for text in _texts(original))
    return _map_texts(original, lambda text: _edit(text, share * total / len(text.split()), draw) if text == longest else text), str(
        place + 1
    )


def _own(seeds: Seeds, draw: random.Random) -> dict[str, Any]:
    mapping: dict[str, str] = {}
    return _map_texts(draw.choice(seeds.rows), lambda text: _WORD.sub(lambda match: _exchange(match[0], mapping, seeds, draw), text))


def _exchange(word: str, mapping: dict[str, str], seeds: Seeds, draw: random.Random) -> str:
    if word in seeds.fixed:
        return word
    if word not in mapping:
        mapping[word] = draw.choice(seeds.vocabulary) if draw.random() < _EXCHANGED else word
    return mapping[word]


def _edit(text: str, share: float, draw: random.Random) -> str:
    """The text with this share of its words (at least one) exchanged for a word that occurs nowhere."""
    spans = [match.span() for match in _EDITABLE.finditer(text)]
    count = min(len(spans), max(1, round(share * len(text.split()))))
    for start, end in sorted(draw.sample(spans, count), reverse=True):
        text = f"{text[:start]}zq{draw.randrange(10**6)}{text[end:]}"
    return text


_TURN_KEYS = ("conversations", "messages")


def _texts(row: dict[str, Any]) -> Iterator[str]:
    """The texts of a row that make its user's and assistant's turns."""
    found: list[str] = []
    _map_texts(row, lambda text: (found.append(text), text)[1])
    return iter(found)


def _map_texts(row: dict[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    """A copy of a row with every text of more than a word changed, but system prompts and what only describes the row."""
    row = copy.copy(row)
    for key in _TURN_KEYS:
        if key in row:
            row[key] = [_change_turn(turn, change) for turn in row[key]]
    for key in ("query", "instruction", "problem", "response", "output", "solution"):
        if row.get(key):
            row[key] = change(row[key])
    return row


def _change_turn(turn: dict[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    role, key = turn.get("from", turn.get("role")), "value" if "value" in turn else "content"
    return turn if role == "system" or not turn.get(key) else {**turn, key: change(turn[key])}


def _with_prompt(row: dict[str, Any], prompt: str) -> dict[str, Any]:
    """A copy of a row that asks something else."""
    replaced = False

    def first(text: str) -> str:
        nonlocal replaced
        done, replaced = replaced, True
        return text if done else prompt

    return _map_texts(row, first)
