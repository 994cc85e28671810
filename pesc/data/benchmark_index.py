"""All benchmark items, searchable by training rows: built once, saved, loaded by each worker in some ten milliseconds."""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np

from pesc.data import near_match
from pesc.data.benchmark_items import Entries, Item, Weights, covered_share, entry_counts, windows_of, without_templates, word_weights
from pesc.data.ngram_table import NgramTable, mix, window_hashes
from pesc.data.text import words
from pesc.data.vocabulary import Vocabulary
from pesc.errors import DataError

Kind = Literal["verbatim", "short", "reworded", "number_twin"]
KINDS: tuple[Kind, ...] = get_args(Kind)  # what a hit shows first
BATCH_WORDS = 100_000
SENTENCE_WORDS = 4  # shorter items are found as a whole turn only
COMMON_SEED = 64  # 4-grams of more entries align nothing
PHRASE = 3  # words of the phrases that make a word of an almost equal item common
NEAR_SHARE = 0.6  # of the weight of an almost equal item
TWIN_COVERAGE = 0.8
TWIN_WORDS = 5  # words of a masked n-gram that are no numbers
_FORMAT = 1


class Hit(NamedTuple):
    """Item number `item` lies in a row; `coverage` is the share of its words (by weight) that the row has, in (0, 1]."""

    item: int
    coverage: float
    kind: Kind


@dataclass(frozen=True)
class _Tables:
    plain: NgramTable
    masked: NgramTable
    seeds: NgramTable


@dataclass
class BenchmarkIndex:
    """See `pesc.data.decontaminate` for the rules.  Made by `build` or `load`."""

    ngram: int
    coverage: float
    vocabulary: Vocabulary
    entries: Entries
    entry_items: list[list[int]]
    tables: _Tables
    weights: Weights
    masked_weights: Weights
    near_weights: Weights
    _items: Sequence[Item] | None = None
    _directory: Path | None = None
    _pattern: np.ndarray = field(init=False, repr=False)
    _masked_pattern: np.ndarray = field(init=False, repr=False)
    _short: dict[tuple[int, ...], int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._pattern = mix(np.arange(len(self.vocabulary.masked)))
        self._masked_pattern = mix(self.vocabulary.masked)
        lengths = self.entries.lengths
        self._short = {
            tuple(self.entries.words[self.entries.offsets[entry] : self.entries.offsets[entry + 1]].tolist()): entry
            for entry in np.flatnonzero(lengths < self.ngram).tolist()
        }

    # --- building, saving, loading ----------------------------------------------------------------------------------------------

    @classmethod
    def build(cls, items: Sequence[Item], ngram: int = 8, coverage: float = 0.5) -> BenchmarkIndex:
        """The index of some items.  An item without a word is never found."""
        numbers: dict[tuple[str, ...], list[int]] = {}
        for number, item in enumerate(items):
            if tokens := tuple(words(item.text)):
                numbers.setdefault(tokens, []).append(number)
        order = sorted(numbers)
        vocabulary = Vocabulary.of(order)
        offsets = np.cumsum([0, *map(len, order)])
        entries = Entries(np.array(vocabulary.numbers(chain.from_iterable(order)), dtype=np.int32), offsets)
        plain, masked = _plain(entries, ngram), _masked(entries, vocabulary, ngram)
        phrases = NgramTable.build(*windows_of(entries, mix(entries.words), PHRASE))
        weights = [word_weights(entries, table, ngram) for table in (plain, masked)]
        tables = _Tables(without_templates(plain, weights[0]), without_templates(masked, weights[1]), _seeds(entries, ngram))
        weights.append(word_weights(entries, phrases, PHRASE))
        return cls(
            ngram,
            coverage,
            vocabulary,
            entries,
            [numbers[tokens] for tokens in order],
            tables,
            weights[0],
            weights[1],
            weights[2],
            _items=items,
        )

    def save(self, directory: Path) -> None:
        """Write the index into a directory, which is made."""
        directory.mkdir(parents=True, exist_ok=True)
        for name, values in self._arrays().items():
            np.save(directory / f"{name}.npy", values)
        (directory / "words.txt").write_text("\n".join(self.vocabulary.words), encoding="utf-8", errors="surrogatepass")
        (directory / "items.json").write_text(json.dumps(list(self.items)), encoding="ascii")
        settings = {"format": _FORMAT, "ngram": self.ngram, "coverage": self.coverage, "entry_items": self.entry_items}
        (directory / "index.json").write_text(json.dumps(settings), encoding="ascii")

    @classmethod
    def load(cls, directory: Path) -> BenchmarkIndex:
        """What `save` wrote; the arrays stay on disk until they are read.  Raises DataError when there is no such index."""
        try:
            settings = json.loads((directory / "index.json").read_text(encoding="ascii"))
            known = (directory / "words.txt").read_text(encoding="utf-8", errors="surrogatepass")
            arrays = {path.stem: np.asarray(np.load(path, mmap_mode="r")) for path in directory.glob("*.npy")}
        except (OSError, ValueError) as error:
            raise DataError(
                f"{directory} holds no complete benchmark index ({error}). Delete the directory and run the stage again."
            ) from error
        if settings.get("format") != _FORMAT:
            raise DataError(
                f"{directory} holds a benchmark index of format {settings.get('format')}, not {_FORMAT}. Delete it and run again."
            )

        def part(prefix: str) -> dict[str, np.ndarray]:
            return {name.removeprefix(prefix): values for name, values in arrays.items() if name.startswith(prefix)}

        tables = _Tables(*(NgramTable.from_arrays(part(f"{name}-")) for name in ("plain", "masked", "seeds")))
        plain, masked, near = (Weights(**part(f"{name}_weights-")) for name in ("plain", "masked", "near"))
        return cls(
            settings["ngram"],
            settings["coverage"],
            Vocabulary(known.split("\n") if known else []),
            Entries(**part("entries-")),
            settings["entry_items"],
            tables,
            plain,
            masked,
            near,
            _directory=directory,
        )

    def _arrays(self) -> dict[str, np.ndarray]:
        parts = {
            "plain": self.tables.plain.arrays(),
            "masked": self.tables.masked.arrays(),
            "seeds": self.tables.seeds.arrays(),
            "entries": vars(self.entries),
            "plain_weights": vars(self.weights),
            "masked_weights": vars(self.masked_weights),
            "near_weights": vars(self.near_weights),
        }
        return {f"{name}-{key}": values for name, arrays in parts.items() for key, values in arrays.items()}

    @cached_property
    def items(self) -> Sequence[Item]:
        """The items, in the order that `Hit.item` numbers them; a loaded index reads them at the first use."""
        if self._items is not None:
            return self._items
        assert self._directory is not None
        return [Item(*pair) for pair in json.loads((self._directory / "items.json").read_text(encoding="ascii"))]

    # --- searching --------------------------------------------------------------------------------------------------------------

    def find(self, rows: Iterable[Sequence[str]]) -> list[list[Hit]]:
        """For each row, given as its bare user turns: the items in it, one hit an item.

        Sorted by KINDS, then most covered first; [] where there is none."""
        found: list[list[Hit]] = []
        for batch in self._batches(rows):
            found += batch.hits()
        return found

    def _batches(self, rows: Iterable[Sequence[str]]) -> Iterator[_Batch]:
        batch = _Batch(self)
        for row in rows:
            batch.add(row)
            if len(batch.words) > BATCH_WORDS:
                yield batch
                batch = _Batch(self)
        if batch.num_rows:
            yield batch


def _plain(entries: Entries, ngram: int) -> NgramTable:
    return NgramTable.build(*windows_of(entries, mix(entries.words), ngram))


def _masked(entries: Entries, vocabulary: Vocabulary, ngram: int) -> NgramTable:
    """n-grams with masked numbers, of enough words that are none."""
    masked = vocabulary.masked[entries.words]
    hashes, entry, start = windows_of(entries, mix(masked), ngram)
    other = np.append(0, np.cumsum(masked <= vocabulary.size))
    first = entries.offsets[entry] + start
    keep = other[first + ngram] - other[first] >= min(TWIN_WORDS, ngram)
    return NgramTable.build(hashes[keep], entry[keep], start[keep])


def _seeds(entries: Entries, ngram: int) -> NgramTable:
    """4-grams that align: the rare ones of items up to `LONGEST` words, and the rarest one of each item shorter than an n-gram."""
    hashes, entry, start = windows_of(entries, mix(entries.words), near_match.SEED)
    table = NgramTable.build(hashes, entry, start)
    shared = entry_counts(table)
    lengths = entries.lengths[table.entries]
    keep = (lengths >= max(ngram, 8)) & (lengths <= near_match.LONGEST) & (shared <= COMMON_SEED)
    short = np.flatnonzero((lengths < ngram) & (lengths >= SENTENCE_WORDS))
    order = short[np.lexsort((table.starts[short], shared[short], table.entries[short]))]
    _, rarest = np.unique(table.entries[order], return_index=True)
    rarest = order[rarest]
    keep[rarest[shared[rarest] <= COMMON_SEED]] = True
    key = np.repeat(table.keys, np.diff(table.bounds))
    return NgramTable.build(key[keep], table.entries[keep], table.starts[keep])


class _Batch:
    """Turns laid end to end, with a 0 after each, so that no n-gram spans two."""

    def __init__(self, index: BenchmarkIndex) -> None:
        self.index = index
        self.num_rows = 0
        self.words: array[int] = array("i")
        self.turns: list[str] = []
        self.row_of: list[int] = []
        self.begins: list[int] = [0]

    def add(self, row: Sequence[str]) -> None:
        for turn in row:
            self.words += self.index.vocabulary.numbers(words(turn))
            self.words.append(0)
            self.turns.append(turn)
            self.row_of.append(self.num_rows)
            self.begins.append(len(self.words))
        self.num_rows += 1

    def hits(self) -> list[list[Hit]]:
        """The hits of each row, by each rule in turn; the first rule that finds an item names the kind."""
        self.numbers = np.frombuffer(self.words, dtype=np.int32) if self.words else np.zeros(0, np.int32)
        self.starts = np.array(self.begins)
        self.rows = np.array(self.row_of, dtype=np.int64)
        found: dict[tuple[int, int], tuple[float, Kind]] = {}
        pattern = self.index._pattern[self.numbers]
        self._whole_turns(found)
        self._covered(found, pattern)
        self._near(found, pattern)
        self._twins(found, self.index._masked_pattern[self.numbers])
        hits: list[list[Hit]] = [[] for _ in range(self.num_rows)]
        for (row, entry), (coverage, kind) in found.items():
            hits[row] += [Hit(item, coverage, kind) for item in self.index.entry_items[entry]]
        for row in hits:
            row.sort(key=lambda hit: (KINDS.index(hit.kind), -hit.coverage, hit.item))
        return hits

    def _whole_turns(self, found: dict[tuple[int, int], tuple[float, Kind]]) -> None:
        """Items shorter than an n-gram that are a whole turn."""
        short, starts = self.index._short, self.starts
        lengths = np.diff(starts) - 1
        for turn in np.flatnonzero((lengths > 0) & (lengths < self.index.ngram)).tolist():
            entry = short.get(tuple(self.numbers[starts[turn] : starts[turn + 1] - 1].tolist()))
            if entry is not None:
                found[self.row_of[turn], entry] = (1.0, "short")

    def _covered(self, found: dict[tuple[int, int], tuple[float, Kind]], pattern: np.ndarray) -> None:
        """Items of which the n-grams of one row cover more than the share that is allowed."""
        index = self.index
        cells, _ = self._cells(index.tables.plain, pattern)
        row, entry, share = self._shares(cells, index.weights)
        over = (share == 1) | ((share > index.coverage) & ~index.weights.whole[entry])
        for one, other, covered in zip(row[over].tolist(), entry[over].tolist(), share[over].tolist(), strict=True):
            found.setdefault((one, other), (covered, "verbatim" if covered == 1 else "reworded"))

    def _twins(self, found: dict[tuple[int, int], tuple[float, Kind]], pattern: np.ndarray) -> None:
        """Items that n-grams with masked numbers cover, where a number differs."""
        index = self.index
        cells, differing = self._cells(index.tables.masked, pattern, compare=True)
        row, entry, share = self._shares(cells, index.masked_weights)
        over = (share >= max(TWIN_COVERAGE, index.coverage)) & ~index.masked_weights.whole[entry]
        over &= np.isin(row * len(index.entry_items) + entry, differing)
        for one, other, covered in zip(row[over].tolist(), entry[over].tolist(), share[over].tolist(), strict=True):
            found.setdefault((one, other), (covered, "number_twin"))

    def _cells(self, table: NgramTable, pattern: np.ndarray, compare: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Distinct sorted (row, entry, start) of the n-grams found, (3, hits).

        With `compare`, also the row * E + entry of those where a word behind equal patterns differs.
        """
        index, size = self.index, self.index.ngram
        places, entry, start = table.find(window_hashes(pattern, size))
        row = self.rows[np.searchsorted(self.starts, places, side="right") - 1] if len(places) else places
        pair = row * len(index.entry_items) + entry
        span = int(start.max(initial=0)) + 1
        key, distinct_start = np.divmod(np.unique(pair * span + start), span)
        cells = np.stack([*np.divmod(key, max(len(index.entry_items), 1)), distinct_start])
        if not compare:
            return cells, pair[:0]
        window = np.arange(size)
        ours = index.entries.words[(index.entries.offsets[entry] + start)[:, None] + window]
        return cells, np.unique(pair[(self.numbers[places[:, None] + window] != ours).any(axis=1)])

    def _shares(self, cells: np.ndarray, weights: Weights) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Row, entry and covered share of each pair among the cells."""
        first, share = covered_share(weights, self.index.entries, cells, self.index.ngram)
        return cells[0][first], cells[1][first], share

    def _near(self, found: dict[tuple[int, int], tuple[float, Kind]], pattern: np.ndarray) -> None:
        """Items that lie in a turn almost word for word, and short ones that are a sentence or a line of it."""
        index = self.index
        seeds = index.tables.seeds.find(window_hashes(pattern, near_match.SEED))
        for group in near_match.align(index.entries, self.numbers, self.starts, seeds):
            best, mask = near_match.equal_words(group)
            length = int(index.entries.lengths[best.entry])
            if length < index.ngram:
                if mask.bit_count() == length and self._is_sentence(best):
                    found.setdefault((self.row_of[best.turn], best.entry), (1.0, "short"))
                continue
            verdict = self._judge(best, mask, length)
            if verdict:
                found.setdefault((self.row_of[best.turn], best.entry), verdict)

    def _judge(self, best: near_match.Alignment, mask: int, length: int) -> tuple[float, Kind] | None:
        """Coverage and kind of an almost equal item; None when too many words differ, or the ones that weigh."""
        index = self.index
        edits = length - mask.bit_count()
        allowed = int(near_match.allowed_edits(length))
        base = int(index.entries.offsets[best.entry])
        weight = np.diff(index.near_weights.sums[base : base + length + 1]).tolist()
        share = sum(value for place, value in enumerate(weight) if mask >> place & 1) / sum(weight)
        if edits > allowed or share < NEAR_SHARE or (index.near_weights.whole[best.entry] and edits):
            return None
        differing = [place for place in range(length) if not mask >> place & 1]
        twin = bool(differing) and all(
            self._is_number(index.entries.words[base + place]) and self._is_number(self._row_word(best, place)) for place in differing
        )
        return share, "number_twin" if twin else "reworded"

    def _row_word(self, best: near_match.Alignment, place: int) -> int:
        at = best.place + place
        return int(self.numbers[at]) if self.starts[best.turn] <= at < self.starts[best.turn + 1] else 0

    def _is_number(self, number: int) -> bool:
        return int(self.index.vocabulary.masked[number]) > self.index.vocabulary.size

    def _is_sentence(self, found: near_match.Alignment) -> bool:
        """Whether the item's words are a sentence, a quotation or a line of their turn, not a part of one."""
        index = self.index
        base = index.entries.offsets[found.entry]
        tokens = [
            index.vocabulary.words[int(number) - 1]
            for number in index.entries.words[base : base + index.entries.lengths[found.entry]].tolist()
        ]
        text = self.turns[found.turn].lower()
        pattern = _OPENING + r"\W+".join(map(re.escape, tokens)) + _CLOSING
        return re.search(pattern, text) is not None


_OPENING = r"(?:\A|[\n.?!:;\"“”(\[>])[^\w\n]*\b"
_CLOSING = r"\b[^\w\n.?!\"“”)\]<]*(?:\Z|[\n.?!\"“”)\]<])"
