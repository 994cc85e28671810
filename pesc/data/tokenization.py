"""The `tokenize` stage: chat template, loss on the assistant's turns and their end token, global best-fit packing.

Writes
- blocks.arrow: an Arrow IPC stream that `datasets.Dataset.from_file` maps without a copy; one row a block: input_ids, labels (-100 =
  no loss), position_ids (from 0 in each packed row), seq_lens (lengths of the packed rows).  Blocks are not padded.
- prompts.json: rendered prompts of rows that are kept out of the blocks.  - stats.json: counts, fill, what was dropped and why.

A row is tokenised as one text, so its tokens are what the tokenizer makes of the whole, and the spans are found through the
tokens' character offsets.  A token that begins before a span carries no loss.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pesc.data.chat import ChatRenderer, Rendered, TemplateRefusal
from pesc.data.config import TokenizeConfig
from pesc.data.packing import pack_rows
from pesc.errors import DataError
from pesc.stage import BuildResult, StageContext

log = logging.getLogger(__name__)
IGNORED = -100
_BATCH = 1000
_HELDOUT_SHARE = 10
"""At most one row in this many is held out for prompts."""


@dataclass(frozen=True)
class TokenRow:
    """One row: its tokens, and the half-open token ranges that carry loss."""

    ids: np.ndarray
    supervised: tuple[tuple[int, int], ...]

    @property
    def supervised_tokens(self) -> int:
        """Tokens that carry loss."""
        return sum(end - start for start, end in self.supervised)

    def labels(self) -> np.ndarray:
        """The tokens where there is loss, -100 elsewhere."""
        labels = np.full(len(self.ids), IGNORED, dtype=np.int32)
        for start, end in self.supervised:
            labels[start:end] = self.ids[start:end]
        return labels


def build(ctx: StageContext) -> BuildResult:
    """Fill `ctx.out` with blocks.arrow, prompts.json and stats.json.

    Raises DataError: a tokenizer without template, end token or offsets, or no row left.
    """
    import pyarrow.parquet as pq

    config: TokenizeConfig = ctx.config
    tokenizer = load_tokenizer(ctx.inputs["model"])
    encoder = RowEncoder(tokenizer, config)
    table = pq.read_table(ctx.inputs["mixture"] / "mixture.parquet", columns=["messages"])
    held_out = min(config.heldout_prompts, table.num_rows // _HELDOUT_SHARE)
    prompts = encoder.prompts(_messages(table.slice(0, held_out or config.heldout_prompts)))
    rows: list[TokenRow] = []
    total = table.num_rows - held_out
    for start in range(held_out, table.num_rows, _BATCH):
        with _parallel_tokenizers():
            rows += encoder.encode(_messages(table.slice(start, _BATCH)))
        ctx.progress(min(start + _BATCH, table.num_rows) - held_out, total, "rows", "tokenising")
    dropped = {name: encoder.counts[name] for name in ("overlong", "no_answer_left", "template")}
    if not rows:
        raise DataError(
            f"No row is left to train on: {json.dumps(dropped)} of {total}. Raise tokenize.context_length or change the template."
        )
    blocks = pack_rows([len(row.ids) for row in rows], config.context_length)
    write_blocks(ctx.out / "blocks.arrow", rows, blocks)
    stats = _statistics(rows, blocks, config, total, held_out, encoder.counts, dropped)
    _write_json(ctx.out / "prompts.json", prompts)
    _write_json(ctx.out / "stats.json", stats)
    log.info("%d rows, %d tokens, %d blocks, fill %.2f %%", len(rows), stats["tokens"], len(blocks), 100 * stats["fill"])
    return BuildResult(metrics={key: stats[key] for key in ("rows", "blocks", "tokens", "supervised_tokens", "fill")})


def load_tokenizer(model: Path) -> Any:
    """The tokenizer of a model directory.  Raises DataError when it is missing or gives no offsets."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"The model directory holds no usable tokenizer ({str(error).splitlines()[0]}). Check the base source's files."
        ) from None
    if not tokenizer.is_fast:
        raise DataError("The model's tokenizer is a slow one without character offsets. Add its tokenizer.json to the base source.")
    return tokenizer


@contextlib.contextmanager
def _parallel_tokenizers() -> Iterator[None]:
    """Let the tokenizer use all cores.  Stage processes switch that off against deadlocks after a fork; nothing is forked here."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


class RowEncoder:
    """Conversations -> TokenRows, with counts of what was dropped or changed."""

    def __init__(self, tokenizer: Any, config: TokenizeConfig) -> None:
        self.config = config
        self.renderer = ChatRenderer(tokenizer, config.chat_template)
        self.counts: Counter[str] = Counter()
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self._end_id = int(tokenizer.eos_token_id)
        self._bos = str(tokenizer.bos_token) if _adds_bos(tokenizer) else None
        self._bos_id = tokenizer.bos_token_id

    def prompts(self, conversations: Sequence[list[tuple[str, str]]]) -> list[str]:
        """The text before the last answer of each conversation, ready for generation."""
        texts = [row.text[: row.prompt_end] for row in self._render(conversations, count=False)]
        lengths = [len(encoding.ids) for encoding in self._backend.encode_batch(texts, add_special_tokens=False)]
        fitting = [text for text, length in zip(texts, lengths, strict=True) if length <= self.config.context_length]
        return fitting or sorted(texts, key=len)[:1]

    def encode(self, conversations: Sequence[list[tuple[str, str]]]) -> list[TokenRow]:
        """Rows that have an answer within the context, in order."""
        rendered = list(self._render(conversations))
        encodings = self._backend.encode_batch([row.text for row in rendered], add_special_tokens=False)
        rows = (self._row(row, encoding) for row, encoding in zip(rendered, encodings, strict=True))
        return [row for row in rows if row is not None]

    def _render(self, conversations: Sequence[list[tuple[str, str]]], count: bool = True) -> Iterator[Rendered]:
        for messages in conversations:
            try:
                row = self.renderer.render(messages)
            except TemplateRefusal as refusal:
                self.counts["template"] += count
                log.debug("dropped: %s", refusal)
                continue
            self.counts["system_folded"] += count and messages[0][0] == "system" and not self.renderer.takes_system
            yield row

    def _row(self, rendered: Rendered, encoding: Any) -> TokenRow | None:
        ids = list(encoding.ids)
        ranges = [self._range(encoding, start, end) for start, end in rendered.spans]
        if rendered.append_end:
            ids.append(self._end_id)
            ranges[-1] = (ranges[-1][0], len(ids))
        if self._bos is not None and not rendered.text.startswith(self._bos):
            ids.insert(0, self._bos_id)
            ranges = [(start + 1, end + 1) for start, end in ranges]
        limit = self.config.context_length
        if len(ids) > limit:
            if self.config.overlong == "drop":
                self.counts["overlong"] += 1
                return None
            ids = ids[:limit]
            ranges = [(start, min(end, limit)) for start, end in ranges if start < limit]
        row = TokenRow(np.array(ids, dtype=np.int32), tuple((max(1, start), end) for start, end in ranges if end > max(1, start)))
        if not row.supervised_tokens:
            self.counts["no_answer_left"] += 1
            return None
        self.counts["truncated"] += len(encoding.ids) > limit
        return row

    def _range(self, encoding: Any, start: int, end: int) -> tuple[int, int]:
        """Tokens within the characters [start, end); one that begins earlier is left out and counted."""
        first = next((token for place in range(start, end) if (token := encoding.char_to_token(place)) is not None), None)
        if first is None:
            return 0, 0
        if encoding.token_to_chars(first)[0] < start:
            self.counts["straddling_tokens"] += 1
            first += 1
        last = next(token for place in range(end - 1, start - 1, -1) if (token := encoding.char_to_token(place)) is not None)
        count = len(encoding.ids)
        while last + 1 < count and encoding.token_to_chars(last + 1) and encoding.token_to_chars(last + 1)[0] < end:
            last += 1
        return first, last + 1


def _adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer begins a text with its BOS token by itself."""
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


def _messages(table: Any) -> list[list[tuple[str, str]]]:
    return [[(turn["role"], turn["content"]) for turn in row] for row in table.column("messages").to_pylist()]


def write_blocks(path: Path, rows: Sequence[TokenRow], blocks: Sequence[Sequence[int]]) -> None:
    """Write packed blocks as an Arrow IPC stream, a thousand to a record batch."""
    import pyarrow as pa

    names = ("input_ids", "labels", "position_ids", "seq_lens")
    schema = pa.schema([(name, pa.list_(pa.int32())) for name in names])
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for start in range(0, len(blocks), _BATCH):
            members = [[rows[number] for number in block] for block in blocks[start : start + _BATCH]]
            columns = (
                [np.concatenate([row.ids for row in block]) for block in members],
                [np.concatenate([row.labels() for row in block]) for block in members],
                [np.concatenate([np.arange(len(row.ids), dtype=np.int32) for row in block]) for block in members],
                [np.array([len(row.ids) for row in block], dtype=np.int32) for block in members],
            )
            writer.write_batch(pa.record_batch([_list_array(column) for column in columns], schema=schema))


def _list_array(arrays: Sequence[np.ndarray]) -> Any:
    """Arrays of one Arrow list column, without a Python object for each token."""
    import pyarrow as pa

    offsets = np.cumsum([0, *map(len, arrays)], dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(arrays)))


def _statistics(
    rows: Sequence[TokenRow],
    blocks: Sequence[Sequence[int]],
    config: TokenizeConfig,
    total: int,
    held_out: int,
    counts: Counter[str],
    dropped: dict[str, int],
) -> dict[str, Any]:
    lengths = np.array([len(row.ids) for row in rows])
    tokens = int(lengths.sum())
    percentiles = {f"p{share}": int(np.percentile(lengths, share, method="lower")) for share in (50, 90, 99)}
    return {
        "rows_in": total + held_out,
        "held_out": held_out,
        "rows": len(rows),
        "dropped": dropped,
        "truncated": counts["truncated"],
        "system_folded": counts["system_folded"],
        "straddling_tokens": counts["straddling_tokens"],
        "tokens": tokens,
        "supervised_tokens": sum(row.supervised_tokens for row in rows),
        "row_tokens": {"mean": round(tokens / len(rows), 2), **percentiles, "max": int(lengths.max())},
        "blocks": len(blocks),
        "context_length": config.context_length,
        "fill": round(tokens / (len(blocks) * config.context_length), 6),
    }


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
