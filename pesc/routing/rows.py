"""Rows of token ids with their domain: from the held-out blocks of a tokenize object, or from a file of texts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pesc.errors import DataError
from pesc.train.blocks import HELD_OUT, PackedBlocks

NO_LOSS = -100
NO_DOMAIN = "all"


@dataclass(frozen=True)
class Row:
    """One conversation or text, S tokens."""

    ids_S: np.ndarray
    """int64."""
    counts_S: np.ndarray
    """bool: the tokens whose routing is counted."""
    domain: str


def has_held_out(folder: Path) -> bool:
    """Whether a tokenize object has held-out blocks."""
    return any(folder.glob(f"{HELD_OUT}-[0-9]*.arrow"))


def read_blocks(folder: Path, tokens: str = "all", blocks_per_domain: int = 64) -> list[Row]:
    """The rows of the first `blocks_per_domain` held-out blocks of each domain.  tokens: all, or answers (those with a loss).

    Raises DataError for a folder without such blocks, or blocks that mix domains.
    """
    if not folder.is_dir():
        raise DataError(f"There is no directory {folder}: give what `tokenize` wrote with --blocks, or texts with --texts.")
    if not has_held_out(folder):
        raise DataError(f"{folder} has no held-out blocks ({HELD_OUT}-00000.arrow): give what `tokenize` wrote, with mix.held_out above 0.")
    blocks = PackedBlocks(folder, HELD_OUT)
    if not blocks.domains:
        raise DataError(f"The held-out blocks of {folder} do not say their domain: run tokenize again.")
    rows = []
    for domain, numbers in sorted(blocks.domains.items()):
        for number in numbers[:blocks_per_domain]:
            rows.extend(_split(blocks[number], domain, tokens))
    return rows


def _split(block: Any, domain: str, tokens: str) -> Iterator[Row]:
    ids, labels = block["input_ids"], block["labels"]
    counts = labels != NO_LOSS if tokens == "answers" else np.ones(len(ids), dtype=bool)
    starts = np.flatnonzero(block["position_ids"] == 0)
    for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
        yield Row(ids[start:end], counts[start:end], domain)


def read_texts(path: Path, tokenizer: Any, max_tokens: int | None = None) -> tuple[list[Row], int]:
    """Rows of a file of JSON lines, `{"text": ..., "domain": ...}` or `{"messages": [...], "domain": ...}`, and how many were cut to `max_tokens`.

    `domain` may be absent.  Messages go through the tokenizer's chat template.  Raises DataError naming the file and the row.
    """
    rows, cut = [], 0
    for number, fields in _read_lines(path):
        try:
            ids = _encode(fields, tokenizer)
        except _BadRowError as error:
            raise DataError(f"{path}, row {number}: {error}.") from None
        cut += max_tokens is not None and len(ids) > max_tokens
        ids_S = np.asarray(ids[:max_tokens], dtype=np.int64)
        if ids_S.size:
            rows.append(Row(ids_S, np.ones(len(ids_S), dtype=bool), fields.get("domain", NO_DOMAIN)))
    if not rows:
        raise DataError(f'{path} has no rows: write one JSON object a line, such as {{"text": "2 + 2 = 4", "domain": "math"}}.')
    return rows, cut


class _BadRowError(Exception):
    """What is wrong with a row."""


def _read_lines(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise DataError(f"{path} cannot be read ({reason}): give a file of JSON lines with --texts.") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}, row {number}: is not JSON ({error}).") from None


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))


def _encode(fields: Any, tokenizer: Any) -> list[int]:
    from jinja2 import TemplateError

    if not isinstance(fields, dict) or ("text" in fields) == ("messages" in fields):
        raise _BadRowError("must be an object with `text` or `messages`, one of the two")
    if not isinstance(fields.get("domain", ""), str) or not fields.get("domain", NO_DOMAIN):
        raise _BadRowError("`domain` must be a name")
    if "text" in fields:
        if not isinstance(fields["text"], str):
            raise _BadRowError("`text` must be a text")
        return list(tokenizer(fields["text"])["input_ids"])
    messages = fields["messages"]
    if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
        raise _BadRowError("`messages` must be a list of objects with `role` and `content`, both text")
    if not tokenizer.chat_template:
        raise _BadRowError("has messages, but the model's tokenizer has no chat template; give `text`")
    try:
        return list(tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"])
    except (TemplateError, TypeError, ValueError) as error:
        raise _BadRowError(f"the chat template does not take its messages ({error})") from None
