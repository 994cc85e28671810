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
from collections.abc import Callable, Sequence
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
    datasets, benchmarks = (sorted({row["dataset"] for row in rows}), sorted({name for name, _ in items}))
    texts = {
        "rows": [row["text"] for row in rows], "row_groups": [datasets.index(row["dataset"]) for row in rows],
        "questions": [row["question"] for row in rows],
        "items": [text for _, text in items], "item_groups": [benchmarks.index(name) for name, _ in items],
    }  # fmt: skip
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

    def shown(groups: list[dict[str, Any]], name: Callable[[int, int], str], other: Callable[[int], str]) -> dict[str, Any]:
        return {
            name(*group["groups"]): {
                "count": group["count"],
                "examples": [
                    {"score": score, "row": rows[left]["question"][:200], "other": other(right)[:200]}
                    for score, left, right in group["top"]
                ],
            }
            for group in groups
        }

    return {
        "rows": len(rows),
        "threshold": config.threshold,
        "pairs": shown(found["rows"], lambda *pair: " / ".join(datasets[code] for code in pair), lambda row: rows[row]["question"]),
        "benchmarks": shown(found["items"], lambda _, code: benchmarks[code], lambda item: items[item][1]),
    }


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


class _Similar:
    """Pairs above a threshold, counted by the groups of the two sides; only the most similar of each are kept."""

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self._counts: Counter[tuple[int, int]] = Counter()
        self._top: dict[tuple[int, int], list[tuple[float, int, int]]] = {}

    def scan(self, left: np.ndarray, right: np.ndarray, groups: tuple[np.ndarray, np.ndarray], one_group: bool) -> list[dict[str, Any]]:
        """Vectors [n, H] and [m, H], and the group of each.  one_group: left and right are the same, each pair is looked at once.

        Returns {groups, count, top: [(cosine, left, right)]} of each pair of groups; without `one_group`, of each group on the right.
        """
        for start in range(0, len(left), _BLOCK):
            scores = left[start : start + _BLOCK] @ right.T
            rows, columns = np.nonzero(scores >= self.threshold)
            keep = columns < rows + start if one_group else np.ones(len(rows), bool)
            rows, columns = rows[keep], columns[keep]
            first, second = groups[0][rows + start] if one_group else np.zeros_like(rows), groups[1][columns]
            self._note(scores[rows, columns], rows + start, columns, np.minimum(first, second), np.maximum(first, second))
        return [{"groups": list(key), "count": self._counts[key], "top": self._top[key]} for key in sorted(self._counts)]

    def _note(self, scores: np.ndarray, rows: np.ndarray, columns: np.ndarray, first: np.ndarray, second: np.ndarray) -> None:
        for key in set(zip(first.tolist(), second.tolist(), strict=True)):
            mine = np.flatnonzero((first == key[0]) & (second == key[1]))
            self._counts[key] += len(mine)
            best = mine[np.lexsort((columns[mine], rows[mine], -scores[mine]))[:_EXAMPLES]]
            found = [(round(float(scores[place]), 4), int(rows[place]), int(columns[place])) for place in best]
            self._top[key] = sorted([*self._top.get(key, []), *found], key=lambda pair: (-pair[0], *pair[1:]))[:_EXAMPLES]


def main(model_path: str, question: str, answer: str, threshold: str) -> None:
    """What the child runs."""
    from transformers import AutoModel, AutoTokenizer

    texts = json.loads(Path(question).read_text())
    tokenizer = AutoTokenizer.from_pretrained(model_path, local_files_only=True, trust_remote_code=False)
    model: Any = AutoModel.from_pretrained(model_path, local_files_only=True, trust_remote_code=False).eval()
    limit, row_groups = float(threshold), np.array(texts["row_groups"])
    rows = _embed(model, tokenizer, texts["rows"])
    found = {"rows": _Similar(limit).scan(rows, rows, (row_groups, row_groups), one_group=True), "items": []}
    if texts["items"]:
        questions, items = _embed(model, tokenizer, texts["questions"]), _embed(model, tokenizer, texts["items"])
        found["items"] = _Similar(limit).scan(questions, items, (row_groups, np.array(texts["item_groups"])), one_group=False)
    part = Path(f"{answer}.part")
    part.write_text(json.dumps(found))
    os.replace(part, answer)


if __name__ == "__main__":
    main(*sys.argv[1:])
