"""Conversations -> token ids and which of them carry loss.

A row is tokenised as one text, so its tokens are what the tokenizer makes of the whole, and the spans are found through the
tokens' character offsets.  A token that begins before a span carries no loss.

Pitfall: many tokenizers' post-processor trims white space off the offsets, which would take the loss from an answer's indentation.
Special tokens are never added here, so the post-processor has nothing to do and is left out.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pesc.data.chat import ChatRenderer, Rendered, TemplateRefusal
from pesc.data.config import TokenizeConfig
from pesc.errors import DataError
from pesc.remote_code import refuse_own_code

log = logging.getLogger(__name__)
IGNORED = -100
Conversation = Sequence[tuple[str, str]]
"""(role, content) of each turn."""
DROPPED = ("overlong", "no_answer_left", "template")
"""Reasons for which a row is dropped."""
CHANGED = ("truncated", "system_folded", "straddling_tokens")
"""What else is counted: rows cut to the context, rows whose system turn went into the user's, answers whose first token begins before them."""


@dataclass(frozen=True)
class TokenRow:
    """One row: its tokens (int32), and the half-open token ranges that carry loss."""

    ids: np.ndarray
    supervised: tuple[tuple[int, int], ...]

    @property
    def supervised_tokens(self) -> int:
        """Tokens that carry loss."""
        return sum(end - start for start, end in self.supervised)

    def loss(self) -> np.ndarray:
        """Whether each token carries loss (bool)."""
        loss = np.zeros(len(self.ids), dtype=np.bool_)
        for start, end in self.supervised:
            loss[start:end] = True
        return loss

    def labels(self) -> np.ndarray:
        """The tokens where there is loss, -100 elsewhere."""
        return np.where(self.loss(), self.ids, np.int32(IGNORED))


@dataclass(frozen=True)
class EncodedRows:
    """The rows that have an answer within the context, where they stood in the input, and counts by DROPPED and CHANGED."""

    rows: list[TokenRow]
    places: list[int]
    counts: Counter[str]


def load_tokenizer(model: Path) -> Any:
    """The tokenizer of a model directory.  Raises DataError when it is missing or gives no offsets, ModelError when it brings code."""
    from transformers import AutoTokenizer

    refuse_own_code(model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"The model directory holds no usable tokenizer ({str(error).splitlines()[0]}). Check the base source's files."
        ) from None
    if not tokenizer.is_fast:
        raise DataError("The model's tokenizer is a slow one without character offsets. Add its tokenizer.json to the base source.")
    return tokenizer


class RowEncoder:
    """Conversations -> TokenRows.  It keeps no counts, so one encoder serves many callers.

    Raises DataError: a tokenizer without template or end token.
    """

    def __init__(self, tokenizer: Any, config: TokenizeConfig) -> None:
        self.config = config
        self.renderer = ChatRenderer(tokenizer, config.chat_template)
        self._backend = _without_post_processor(tokenizer.backend_tokenizer)
        self._end_id = int(tokenizer.eos_token_id)
        self._bos = str(tokenizer.bos_token) if _adds_bos(tokenizer) else None
        self._bos_id = tokenizer.bos_token_id

    def prompt(self, messages: Conversation) -> tuple[str, int] | None:
        """The text before the last answer, ready for generation, and its tokens; None when the template refuses the row."""
        try:
            row = self.renderer.render(messages)
        except TemplateRefusal as refusal:
            log.debug("no prompt: %s", refusal)
            return None
        text = row.text[: row.prompt_end]
        return text, len(self._backend.encode(text, add_special_tokens=False).ids)

    def encode(self, conversations: Sequence[Conversation]) -> EncodedRows:
        """Rows that have an answer within the context, in order."""
        result = EncodedRows([], [], Counter())
        rendered: list[tuple[int, Rendered]] = []
        for place, row in enumerate(self.renderer.render_all(conversations)):
            if isinstance(row, TemplateRefusal):
                result.counts["template"] += 1
                log.debug("dropped: %s", row)
                continue
            result.counts["system_folded"] += conversations[place][0][0] == "system" and not self.renderer.takes_system
            rendered.append((place, row))
        encodings = self._backend.encode_batch([row.text for _, row in rendered], add_special_tokens=False)
        for (place, row), encoding in zip(rendered, encodings, strict=True):
            if tokens := self._row(row, encoding, result.counts):
                result.rows.append(tokens)
                result.places.append(place)
        return result

    def _row(self, rendered: Rendered, encoding: Any, counts: Counter[str]) -> TokenRow | None:
        ids = encoding.ids
        ranges = [_range(encoding, start, end, counts) for start, end in rendered.spans]
        if rendered.append_end:
            ids.append(self._end_id)
            ranges[-1] = (ranges[-1][0], len(ids))
        if self._bos is not None and not rendered.text.startswith(self._bos):
            ids.insert(0, self._bos_id)
            ranges = [(start + 1, end + 1) for start, end in ranges]
        overlong = len(ids) > self.config.context_length
        if overlong:
            kept = self._cut(ranges)
            if kept is None:
                counts["overlong"] += 1
                return None
            ids = ids[:kept]
            ranges = [(start, min(end, kept)) for start, end in ranges if start < kept]
        row = TokenRow(np.array(ids, dtype=np.int32), tuple((max(1, start), end) for start, end in ranges if end > max(1, start)))
        if not row.supervised:
            counts["no_answer_left"] += 1
            return None
        counts["truncated"] += overlong
        return row

    def _cut(self, ranges: Sequence[tuple[int, int]]) -> int | None:
        """Tokens that are kept of a row over the context; None: the row goes."""
        limit = self.config.context_length
        if self.config.overlong == "drop":
            return None
        if self.config.overlong == "truncate":
            return limit
        return max((end for start, end in ranges if max(1, start) < end <= limit), default=None)


def _range(encoding: Any, start: int, end: int, counts: Counter[str]) -> tuple[int, int]:
    """Tokens within the characters [start, end); one that begins earlier is left out and counted.

    One question a span is 40 times cheaper than taking all offsets out of the encoding, which is done where that one has no answer.
    """
    if start >= end:
        return 0, 0
    first, last = encoding.char_to_token(start), encoding.char_to_token(end - 1)
    if first is None or last is None:  # a character that the tokenizer drops
        offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
        inside = np.flatnonzero((offsets[:, 1] > start) & (offsets[:, 0] < end) & (offsets[:, 1] > offsets[:, 0]))
        if not len(inside):
            return 0, 0
        first, last = int(inside[0]), int(inside[-1])
    if encoding.token_to_chars(first)[0] < start:
        counts["straddling_tokens"] += 1
        first += 1
        while first < len(encoding) and _begins_before(encoding, first, start):  # a character made of several tokens
            first += 1
    while last + 1 < len(encoding) and _begins_before(encoding, last + 1, end):
        last += 1
    return first, last + 1


def _begins_before(encoding: Any, token: int, place: int) -> bool:
    characters = encoding.token_to_chars(token)
    return characters is not None and characters[0] < place


def _without_post_processor(backend: Any) -> Any:
    """A copy that neither cuts, pads, adds tokens nor trims offsets."""
    copy = type(backend).from_str(backend.to_str())
    copy.post_processor = None
    copy.no_truncation()
    copy.no_padding()
    return copy


def _adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer begins a text with its BOS token by itself."""
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
