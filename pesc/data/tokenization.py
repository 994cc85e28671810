"""The `tokenize` stage: chat template, loss on the assistant's turns and their end token, global best-fit packing.

Writes
- blocks-00000.arrow …: packed blocks of the mixture (layout: `block_files.py`).
- heldout-00000.arrow …: packed blocks of the mix's held-out rows, domain by domain, each block with its domain.
- prompts.json: rendered prompts of held-out rows.  - stats.json: counts, fill, what was dropped and why.
- chat_template.jinja: the template, where it is not the model's own; the merged model talks in it.

Rows are tokenised in shards by `ctx.map_shards`, then packed all at once, so neither shards nor workers show in the result.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from pesc.data.block_files import write_blocks
from pesc.data.config import TokenizeConfig
from pesc.data.encoding import CHANGED, DROPPED, Conversation, RowEncoder, load_tokenizer
from pesc.data.packing import pack_rows
from pesc.data.token_shards import TokenShards, cut_rows, encode_shard, read_conversations
from pesc.errors import DataError
from pesc.stage import BuildResult, StageContext

log = logging.getLogger(__name__)
_HELDOUT_SHARE = 10
"""Of a mixture without a held-out split, at most one row in this many is held out for prompts."""


@dataclass(frozen=True)
class _HeldOut:
    """Rows that are in no training block: a table with messages (and domain), and how many of them begin the mixture itself."""

    table: Any
    of_mixture: int
    parquet: Path | None


def build(ctx: StageContext) -> BuildResult:
    """Fill `ctx.out` with packed blocks, prompts.json and stats.json.

    Raises DataError: a tokenizer without template, end token or offsets, or no row left.
    """
    config: TokenizeConfig = ctx.config
    encoder = RowEncoder(load_tokenizer(ctx.inputs["model"]), config)
    held_out = _find_held_out(ctx.inputs["mixture"], config.heldout_prompts)
    prompts = make_prompts(encoder, held_out.table, config)
    shards, counts = _tokenise(ctx, ctx.inputs["mixture"] / "mixture.parquet", "mixture", held_out.of_mixture)
    if not counts["rows"]:
        dropped = json.dumps({name: counts[name] for name in DROPPED})
        raise DataError(
            f"No row is left to train on: {dropped} of {counts['rows_in']}. Raise tokenize.context_length or change the template."
        )
    blocks = pack_rows(shards.lengths, config.context_length)
    ctx.progress(0, len(blocks), "blocks", "writing blocks")
    write_blocks(ctx.out, "blocks", shards, blocks)
    stats = _statistics(shards.lengths, len(blocks), config, held_out.of_mixture, counts)
    stats["heldout"] = _write_held_out(ctx, held_out)
    _write_json(ctx.out / "prompts.json", prompts)
    _write_json(ctx.out / "stats.json", stats)
    if encoder.renderer.template is not None:
        (ctx.out / "chat_template.jinja").write_text(encoder.renderer.template, encoding="utf-8")
    shutil.rmtree(_scratch(ctx))
    log.info("%d rows, %d tokens, %d blocks, fill %.2f %%", stats["rows"], stats["tokens"], len(blocks), 100 * stats["fill"])
    return BuildResult(metrics={key: stats[key] for key in ("rows", "blocks", "tokens", "supervised_tokens", "fill")})


def _find_held_out(mixture: Path, prompts: int) -> _HeldOut:
    """The mix's held-out split; in a mixture without one, its first rows (but not if that took more than a tenth)."""
    import pyarrow.parquet as pq

    path = mixture / "heldout.parquet"
    if path.is_file() and pq.read_metadata(path).num_rows:
        return _HeldOut(pq.read_table(path, columns=["domain", "messages"]), 0, path)
    with pq.ParquetFile(mixture / "mixture.parquet") as file:
        first = next(file.iter_batches(batch_size=prompts, columns=["messages"]), None)
        return _HeldOut(first, min(prompts, file.metadata.num_rows // _HELDOUT_SHARE), None)


def make_prompts(encoder: RowEncoder, table: Any, config: TokenizeConfig) -> list[str]:
    """`heldout_prompts` texts before the last answer, ready for generation, dealt over the domains in turn.

    Prompts over the context are passed over; if all are, the shortest is given.
    """
    if table is None:
        return []
    fitting: list[str] = []
    shortest: tuple[int, str] | None = None
    for messages in _over_domains(table):
        made = encoder.prompt(messages)
        if made is None:
            continue
        text, tokens = made
        shortest = min(shortest or (tokens, text), (tokens, text))
        fitting += [text] if tokens <= config.context_length else []
        if len(fitting) == config.heldout_prompts:
            break
    return fitting or ([shortest[1]] if shortest else [])


def _over_domains(table: Any) -> Iterator[Conversation]:
    """The rows of a table: the first of each domain by name, then the second of each …; in order, where there is no domain."""
    column = table.column("messages")
    rows: list[Conversation] = [row for chunk in getattr(column, "chunks", [column]) for row in read_conversations(chunk)]
    if "domain" not in table.schema.names:
        yield from rows
        return
    by_domain: dict[str, list[Conversation]] = defaultdict(list)
    for domain, row in zip(table.column("domain").to_pylist(), rows, strict=True):
        by_domain[domain].append(row)
    for turn in zip_longest(*(by_domain[domain] for domain in sorted(by_domain))):
        yield from (row for row in turn if row is not None)


def _scratch(ctx: StageContext) -> Path:
    return ctx.work / "tokens"


def _tokenise(ctx: StageContext, parquet: Path, name: str, skip: int) -> tuple[TokenShards, Counter[str]]:
    """All rows of a parquet file but the first `skip`, and the sum of the shards' counts with `rows_in`."""
    import pyarrow.parquet as pq

    folder = _scratch(ctx) / name
    shutil.rmtree(folder, ignore_errors=True)  # of an attempt that was killed
    folder.mkdir(parents=True)
    total = pq.read_metadata(parquet).num_rows - skip
    ctx.progress(0, total, "rows", "cutting the mixture into shards")
    shards = cut_rows(parquet, folder, skip)
    function = partial(encode_shard, model=ctx.inputs["model"], config=ctx.config, stage_process=os.getpid())
    counts: Counter[str] = Counter()
    for shard, found in zip(shards, ctx.map_shards(function, shards), strict=True):
        counts.update(found)
        shard.conversations.unlink()
        done = counts["rows"] + sum(counts[reason] for reason in DROPPED)
        ctx.progress(done, total, "rows", "tokenising")
    counts["rows_in"] = total
    return TokenShards([shard.tokens for shard in shards]), counts


def _write_held_out(ctx: StageContext, held_out: _HeldOut) -> dict[str, dict[str, int]]:
    """Pack the held-out rows domain by domain; returns rows, blocks and tokens of each domain."""
    if held_out.parquet is None:
        return {}
    shards, _ = _tokenise(ctx, held_out.parquet, "heldout", 0)
    domains = np.array(held_out.table.column("domain").to_pylist(), dtype=object)[shards.source_rows]
    blocks: list[list[int]] = []
    names: list[str] = []
    counts: dict[str, dict[str, int]] = {}
    for domain in sorted(set(domains)):
        rows = np.flatnonzero(domains == domain)
        packed = [rows[block].tolist() for block in pack_rows(shards.lengths[rows], ctx.config.context_length)]
        blocks += packed
        names += [domain] * len(packed)
        counts[domain] = {"rows": len(rows), "blocks": len(packed), "tokens": int(shards.lengths[rows].sum())}
    write_blocks(ctx.out, "heldout", shards, blocks, names)
    return counts


def _statistics(lengths: np.ndarray, blocks: int, config: TokenizeConfig, held_out: int, counts: Counter[str]) -> dict[str, Any]:
    tokens = counts["tokens"]
    percentiles = {f"p{share}": int(np.percentile(lengths, share, method="lower")) for share in (50, 90, 99)}
    return {
        "rows_in": counts["rows_in"] + held_out,
        "held_out": held_out,
        "rows": counts["rows"],
        "dropped": {name: counts[name] for name in DROPPED},
        **{name: counts[name] for name in CHANGED},
        "tokens": tokens,
        "supervised_tokens": counts["supervised_tokens"],
        "row_tokens": {"mean": round(tokens / counts["rows"], 2), **percentiles, "max": int(lengths.max())},
        "blocks": blocks,
        "context_length": config.context_length,
        "fill": round(tokens / (blocks * config.context_length), 6),
    }


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
