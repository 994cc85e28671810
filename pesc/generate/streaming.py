"""Text as it is made, and the stop that Ctrl-C asks for."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch
from transformers import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

_UNFINISHED = "\ufffd"
"""What a decoder writes for bytes that are no character yet."""


class PieceStreamer(BaseStreamer):
    """Hands on each piece of text as soon as it is final; the pieces together are the text of all tokens.

    transformers' own TextStreamer decodes each line by itself, which takes the first space of every line from the text of a SentencePiece
    tokenizer: Python code loses a column of indentation.  Here a token is decoded behind the tokens before it.
    """

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        self._tokenizer, self._on_text = tokenizer, on_text
        self._ids: list[int] = []
        self._start = self._seen = 0
        self._prompt_is_next = True
        self.text = ""

    @property
    def count(self) -> int:
        """Tokens so far, without the prompt's."""
        return len(self._ids)

    @property
    def last(self) -> int | None:
        """The newest token."""
        return self._ids[-1] if self._ids else None

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt's tokens [1, T] (once), then each new one [1]."""
        if self._prompt_is_next:
            self._prompt_is_next = False
            return
        self._ids += value.flatten().tolist()
        before, now = self._decode(self._ids[self._start : self._seen]), self._decode(self._ids[self._start :])
        if len(now) > len(before) and not now.endswith(_UNFINISHED):
            self._emit(now[len(before) :])
            self._start, self._seen = self._seen, len(self._ids)

    def end(self) -> None:
        """Hand on what is left: bytes that never became a character."""
        before, now = self._decode(self._ids[self._start : self._seen]), self._decode(self._ids[self._start :])
        self._start = self._seen = len(self._ids)
        if len(now) > len(before):
            self._emit(now[len(before) :])

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def _emit(self, piece: str) -> None:
        self.text += piece
        self._on_text(piece)


class Stop(StoppingCriteria):
    """Ends a reply after the token that is being made."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_options: Any) -> torch.Tensor:
        """[B] whether each row is done."""
        return torch.full((input_ids.shape[0],), self.asked, dtype=torch.bool, device=input_ids.device)


@contextlib.contextmanager
def stop_on_ctrl_c() -> Iterator[Stop]:
    """While this is open, Ctrl-C ends the reply and not the program; a second one does not wait for the token (KeyboardInterrupt)."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(_signal: int, _frame: FrameType | None) -> None:
        if stop.asked:
            raise KeyboardInterrupt
        stop.asked = True

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
