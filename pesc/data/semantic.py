"""Paraphrases that words do not show: an optional pass over a sample of the kept rows with a small embedding model, reported and not removed.

    python -m pesc.data.semantic MODEL INPUT OUTPUT THRESHOLD         (a child process: this is the only part that imports torch)

Sentences are embedded as sentence-transformers models of this kind want it (mean of the last layer over the first 256 tokens, unit length), and
each pair's cosine is compared with the threshold: rows with rows, and rows' questions with benchmark questions.  Tülu 3 tried embeddings as
a filter and left it ("difficult to distinguish mere distributional similarity from actual paraphrasing"), hence a report.  Cosines differ in
the last digits from machine to machine, so the report goes into the manifest (`metrics["semantic"]`), never into the object.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pesc.data.config import SemanticConfig
from pesc.errors import DataError
from pesc.launch.child import run_child

_MAX_TOKENS = 256
_BATCH = 64
_BLOCK = 2048
_EXAMPLES = 10


def report_semantic(
    config: SemanticConfig,
    model: Path,
    rows: Sequence[dict[str, str]],
    items: Sequence[tuple[str, str]],
    work: Path,
    on_progress: Callable[[int, int], None],
) -> dict[str, Any]:
    """Similar pairs by data sets and by benchmark, with examples.

    rows: {id, dataset, text, question}; items: (benchmark, question).  Raises DataError when the model cannot be used.
    """
    if not (model / "config.json").is_file():
        raise DataError(f"dedup.semantic.source holds no model in {config.directory or '.'!r} (no config.json). Set semantic.directory.")
    question, answer = work / "semantic.json", work / "semantic-pairs.json"
    texts = {"rows": [row["text"] for row in rows], "questions": [row["question"] for row in rows], "items": [text for _, text in items]}
    question.write_text(json.dumps(texts))
    lines: list[str] = []

    def follow(line: str) -> None:
        lines.append(line)
        if step := re.match(r"embedded (\d+)/(\d+)", line):
            on_progress(int(step[1]), int(step[2]))

    command = [sys.executable, "-m", "pesc.data.semantic", str(model), str(question), str(answer), str(config.threshold)]
    if status := run_child(command, {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}, follow):
        raise DataError(f"dedup.semantic: the embedding model failed (exit {status}): {' | '.join(lines[-3:])}")
    found = json.loads(answer.read_text())
    question.unlink()
    return {
        "rows": len(rows),
        "threshold": config.threshold,
        "pairs": _summarise(
            found["rows"], lambda left, right: " / ".join(sorted((rows[left]["dataset"], rows[right]["dataset"]))),
            lambda left, right: (rows[left]["question"], rows[right]["question"]),
        ),
        "benchmarks": _summarise(
            found["items"], lambda _row, item: items[item][0], lambda row, item: (rows[row]["question"], items[item][1])
        ),
    }  # fmt: skip


def _summarise(
    pairs: list[list[Any]], group: Callable[[int, int], str], texts: Callable[[int, int], tuple[str, str]]
) -> dict[str, dict[str, Any]]:
    """{group: {count, examples}}, the most similar pairs first."""
    counts: Counter[str] = Counter()
    examples: dict[str, list[dict[str, Any]]] = {}
    for left, right, score in sorted(pairs, key=lambda pair: (-pair[2], pair[0], pair[1])):
        name = group(left, right)
        counts[name] += 1
        shown = examples.setdefault(name, [])
        if len(shown) < _EXAMPLES:
            one, other = texts(left, right)
            shown.append({"score": score, "row": one[:200], "other": other[:200]})
    return {name: {"count": counts[name], "examples": examples[name]} for name in sorted(counts)}


# --- the child -----------------------------------------------------------------------------------------------------------------


def _embed(model: Any, tokenizer: Any, texts: Sequence[str]) -> np.ndarray:
    """Unit vectors, float32 [texts, H]; texts of like length share a batch."""
    import torch

    order = sorted(range(len(texts)), key=lambda place: len(texts[place]))
    vectors = np.zeros((len(texts), model.config.hidden_size), dtype=np.float32)
    with torch.inference_mode():
        for start in range(0, len(order), _BATCH):
            part = order[start : start + _BATCH]
            inputs = tokenizer([texts[place] for place in part], padding=True, truncation=True, max_length=_MAX_TOKENS, return_tensors="pt")
            hidden = model(**inputs).last_hidden_state
            mask = inputs["attention_mask"].unsqueeze(-1)
            mean = (hidden * mask).sum(1) / mask.sum(1)
            vectors[part] = torch.nn.functional.normalize(mean, dim=-1).numpy()
            print(f"embedded {start + len(part)}/{len(order)}", flush=True)
    return vectors


def _similar(left: np.ndarray, right: np.ndarray, threshold: float, below: bool) -> Iterator[tuple[int, int, float]]:
    """Pairs (i, j, cosine) with a cosine of at least the threshold; with `below`, j < i alone."""
    for start in range(0, len(left), _BLOCK):
        scores = left[start : start + _BLOCK] @ right.T
        for row, column in zip(*np.nonzero(scores >= threshold), strict=True):
            if not below or column < start + row:
                yield int(start + row), int(column), round(float(scores[row, column]), 4)


def main(model_path: str, question: str, answer: str, threshold: str) -> None:
    """What the child runs."""
    from transformers import AutoModel, AutoTokenizer

    texts = json.loads(Path(question).read_text())
    tokenizer = AutoTokenizer.from_pretrained(model_path, local_files_only=True)
    model: Any = AutoModel.from_pretrained(model_path, local_files_only=True).eval()
    rows = _embed(model, tokenizer, texts["rows"])
    found = {"rows": list(_similar(rows, rows, float(threshold), below=True)), "items": []}
    if texts["items"]:
        questions, items = _embed(model, tokenizer, texts["questions"]), _embed(model, tokenizer, texts["items"])
        found["items"] = list(_similar(questions, items, float(threshold), below=False))
    part = Path(f"{answer}.part")
    part.write_text(json.dumps(found))
    os.replace(part, answer)


if __name__ == "__main__":
    main(*sys.argv[1:])
