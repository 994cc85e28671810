"""The near-duplicate step against datasketch and datatrove, on the same rows in one run.

    pip install datasketch "datatrove[processing]"; pytest -m benchmark -s tests/benchmarks/test_near_duplicates.py

Each works on the same texts in memory, with word 5-grams of the same `\\w+` words.  datasketch: MinHash of 128 permutations in bulk, LSH at
0.8.  datatrove: signature, buckets, clusters of 14 × 8, in one process, through files as it does (its word tokenizer is replaced by the
plain one, which is faster than its own).  Neither verifies a pair; we do.
"""

from __future__ import annotations

import json
import os
import random
import time
from pathlib import Path

import pytest

from pesc.bench.synthetic_rows import Planted, read_seeds, write_chunk
from pesc.data.conversation import parse_row
from pesc.data.minhash import find_near_duplicates
from pesc.data.text import words

ROWS = int(os.environ.get("PESC_BENCH_ROWS", "100000"))
THRESHOLD = 0.8
pytestmark = pytest.mark.benchmark


@pytest.fixture(scope="module")
def planted_texts(tmp_path_factory, shared_data) -> tuple[list[str], list[Planted]]:
    """Texts in a random order, longest first as survival wants it, and what was planted (row numbers are places in the list)."""
    folder = shared_data / "data" / "instructions"
    root, texts, planted = tmp_path_factory.mktemp("rows"), [], []
    sets = [
        ("slimorca.jsonl", "sharegpt"),
        ("metamathqa.jsonl", "query_response"),
        ("magicoder_evol_instruct.jsonl", "instruction_response"),
    ]
    for number in range(10):
        file, row_format = sets[number % 3]
        path = root / f"{number}.jsonl"
        found = write_chunk(path, read_seeds(folder / file, row_format), [], ROWS // 10, f"near/{number}")
        first = len(texts) - 1
        planted += [Planted(first + p.row, p.kind, str(first + int(p.origin))) for p in found if p.origin.isdigit()]
        for line in path.read_text().rstrip("\n").split("\n"):
            texts.append("\n".join(turn.content for turn in parse_row(json.loads(line), row_format).messages if turn.role != "system"))
    order = sorted(range(len(texts)), key=lambda place: (-len(texts[place]), random.Random(place).random()))
    place_of = {old: new for new, old in enumerate(order)}
    pairs = [p for p in planted if similarity(texts[p.row], texts[int(p.origin)]) >= THRESHOLD]
    return [texts[old] for old in order], [Planted(place_of[p.row], p.kind, str(place_of[int(p.origin)])) for p in pairs]


def run_ours(texts: list[str]) -> set[int]:
    return {item.removed for item in find_near_duplicates(texts, threshold=THRESHOLD, ngram=5, permutations=128)}


def run_datasketch(texts: list[str]) -> set[int]:
    datasketch = pytest.importorskip("datasketch")
    shingles = []
    for text in texts:
        tokens = words(text)
        shingles.append({" ".join(tokens[at : at + 5]).encode() for at in range(len(tokens) - 4)})
    index, removed = datasketch.MinHashLSH(threshold=THRESHOLD, num_perm=128), set()
    for place, sketch in enumerate(datasketch.MinHash.generator(shingles, num_perm=128)):
        if not shingles[place]:
            continue
        if index.query(sketch):
            removed.add(place)
        else:
            index.insert(place, sketch)
    return removed


def run_datatrove(texts: list[str], folder: Path) -> set[int]:
    pytest.importorskip("datatrove")
    from datatrove.data import Document
    from datatrove.pipeline.dedup import MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupSignature
    from datatrove.utils.word_tokenizers import WordTokenizer
    from loguru import logger

    class PlainWords(WordTokenizer):
        def word_tokenize(self, text: str) -> list[str]:
            return words(text)

        sent_tokenize = span_tokenize = word_tokenize

    logger.remove()
    signature = MinhashDedupSignature(str(folder / "signatures"), language=PlainWords())
    signature.run((Document(text=text, id=str(place)) for place, text in enumerate(texts)), 0, 1)
    for bucket in range(14):
        MinhashDedupBuckets(str(folder / "signatures"), str(folder / "buckets")).run(None, bucket, 14)
    MinhashDedupCluster(str(folder / "buckets"), str(folder / "removed")).run(None, 0, 1)
    files = list((folder / "removed").glob("*.remove"))
    return {int.from_bytes(data[at : at + 4], "little") for file in files for data in [file.read_bytes()] for at in range(0, len(data), 4)}


def timed(run, *args) -> tuple[float, set[int]]:
    start = time.perf_counter()
    found = run(*args)
    return time.perf_counter() - start, found


def similarity(left: str, right: str) -> float:
    """The true Jaccard similarity of word 5-grams, the plain way."""
    a, b = ({tuple(tokens[at : at + 5]) for at in range(len(tokens) - 4)} for tokens in (words(left), words(right)))
    return len(a & b) / len(a | b) if a | b else 0.0


def recall(found: set[int], planted: list[Planted], kind: str) -> float:
    """Of the pairs that are near-duplicates by the definition: some edits of short rows leave fewer common 5-grams."""
    wanted = [item for item in planted if item.kind == kind]
    return sum(item.row in found or int(item.origin) in found for item in wanted) / len(wanted)


def test_five_times_as_fast_as_both_and_it_finds_what_was_planted(planted_texts, tmp_path):
    texts, planted = planted_texts
    ours, found = timed(run_ours, texts)
    lines = [f"{len(texts):,} texts of {sum(map(len, texts)) / len(texts):.0f} characters", f"ours        {ours:7.1f} s"]
    times = []
    for name, run, args in (("datasketch", run_datasketch, ()), ("datatrove", run_datatrove, (tmp_path,))):
        seconds, theirs = timed(run, texts, *args)
        times.append(seconds)
        lines.append(f"{name:<11} {seconds:7.1f} s   {seconds / ours:5.1f} x   recall at 1 % edits {recall(theirs, planted, 'edit_1'):.4f}")
    excused = {place for item in planted for place in (item.row, int(item.origin))}
    lines.append(", ".join(f"{kind} {recall(found, planted, kind):.4f}" for kind in ("exact", "edit_1", "edit_2")))
    mistakes = len(found - excused) / len(texts)
    lines.append(f"removed though distinct: {mistakes:.5f}")
    print("\n" + "\n".join(lines))
    assert recall(found, planted, "edit_1") >= 0.99
    assert recall(found, planted, "exact") >= 0.999
    assert mistakes <= 0.001
    assert min(times) >= 5 * ours
