"""A conversation as text, with the stretches that carry loss.

A chat template is rendered once for each sequence of roles with a marker in place of each content.  What lies between the markers
is the template's own text, so every position is known without searching, whatever the template inserts (a default system prompt,
thinking tags).  Every row is checked: markers replaced by contents must equal what the template renders from the row itself.  Many rows
are rendered in one call, which takes most of the price off that check (30 of 75 microseconds a row are left, of 900 in all).

Loss is on every assistant turn, from the end of the generation prompt to the turn's end token.  A template that ends turns without
a special token gets the tokenizer's end token after its last turn.  Nothing here looks at the pad token: it may be the end token.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple

from pesc.errors import DataError

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PESC = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}### System:\n{{ message['content'] }}\n"
    "{% elif message['role'] == 'assistant' %}### Assistant:\n{{ message['content'] }}{{ eos_token }}{% if not loop.last %}{{ '\n' }}{% endif %}"
    "{% elif message['role'] == 'tool' %}### Tool:\n{{ message['content'] }}\n"
    "{% else %}### Human:\n{{ message['content'] }}\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}### Assistant:\n{% endif %}"
)
"""The reference code's form, extended from one turn to many."""
TEMPLATES = {"chatml": CHATML, "pesc": PESC}


class TemplateRefusal(ValueError):
    """The template does not take this row: an order of roles, or a content that it rewrites."""


class Span(NamedTuple):
    """Characters [start, end) of a text."""

    start: int
    end: int


@dataclass(frozen=True)
class Rendered:
    """A whole row: its text, the spans with loss, whether the end token must be added, and where the last answer begins."""

    text: str
    spans: tuple[Span, ...]
    append_end: bool
    prompt_end: int


@dataclass(frozen=True)
class _Shape:
    """What the template writes around the contents of one sequence of roles: one piece more than there are contents.

    `own_words`: for each turn, how many characters before its content the model must say itself (0 but for odd templates).
    """

    pieces: tuple[str, ...]
    own_words: tuple[int, ...]


class ChatRenderer:
    """Renders conversations with one tokenizer's template, or with one of this package's.

    Raises DataError when the tokenizer has no template, or no end token.
    """

    def __init__(self, tokenizer: Any, template: Literal["model", "chatml", "pesc"]) -> None:
        self.tokenizer = tokenizer
        self.template = TEMPLATES.get(template)
        if template == "model" and not tokenizer.chat_template:
            raise DataError("The model's tokenizer has no chat template. Set tokenize.chat_template to chatml or pesc.")
        if tokenizer.eos_token is None:
            raise DataError(
                "The model's tokenizer has no end token (eos_token), so no answer could be ended. Add one to its configuration."
            )
        specials = {str(tokenizer.eos_token), *map(str, tokenizer.all_special_tokens), *_added_specials(tokenizer)}
        any_special = "|".join(re.escape(token) for token in sorted(specials, key=lambda token: (-len(token), token)))
        self._special = re.compile(any_special)
        self._end = re.compile(rf"{any_special}|\s+{re.escape(str(tokenizer.eos_token))}")
        self._shapes: dict[tuple[str, ...], _Shape] = {}

    @cached_property
    def takes_system(self) -> bool:
        """Whether the template has a place for a system turn.  If not, its text is put before the user's."""
        try:
            self._shape(("system", "user", "assistant"))
        except TemplateRefusal:
            return False
        return True

    def render(self, messages: Sequence[tuple[str, str]]) -> Rendered:
        """A whole row.  Raises TemplateRefusal."""
        (row,) = self.render_all([messages])
        if isinstance(row, TemplateRefusal):
            raise row
        return row

    def render_all(self, conversations: Sequence[Sequence[tuple[str, str]]]) -> list[Rendered | TemplateRefusal]:
        """Each row, or why the template does not take it, in order."""
        results: list[Rendered | TemplateRefusal] = []
        for messages in map(self.fold_system, conversations):
            try:
                results.append(self._compose(messages))
            except TemplateRefusal as refusal:
                results.append(refusal)
        composed = [index for index, row in enumerate(results) if isinstance(row, Rendered)]
        texts = self._apply_all([self.fold_system(conversations[index]) for index in composed])
        for index, text in zip(composed, texts, strict=True):
            results[index] = _checked(results[index], text)
        return results

    def _compose(self, messages: Sequence[tuple[str, str]]) -> Rendered:
        """The row from the template's pieces and its own contents, not yet compared with what the template renders."""
        if held := next(filter(None, (self._special.search(content) for _, content in messages)), None):
            raise TemplateRefusal(f"a turn holds the special token {held[0]!r} as text")
        shape = self._shape(tuple(role for role, _ in messages))
        parts, places, length = [shape.pieces[0]], [], len(shape.pieces[0])
        for (_, content), piece in zip(messages, shape.pieces[1:], strict=True):
            places.append(length)
            parts += content, piece
            length += len(content) + len(piece)
        text = "".join(parts)
        spans = []
        append_end = False
        for index, (role, content) in enumerate(messages):
            if role != "assistant":
                continue
            start = places[index] - shape.own_words[index]
            content_end = places[index] + len(content)
            ending = self._end.match(text, content_end, content_end + len(shape.pieces[index + 1]))
            spans.append(Span(start, ending.end() if ending else content_end))
            append_end = ending is None and index == len(messages) - 1
        if not spans:
            raise TemplateRefusal("the row has no assistant turn")
        return Rendered(text, tuple(spans), append_end, spans[-1].start)

    def fold_system(self, messages: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
        """The messages; for a template without a system turn, with the system's text before the first user turn."""
        if messages[0][0] != "system" or self.takes_system:
            return list(messages)
        (_, system), (role, content), *rest = messages
        return [(role, f"{system}\n\n{content}"), *rest]

    def _shape(self, roles: tuple[str, ...]) -> _Shape:
        if roles not in self._shapes:
            marks = [f"\u27e6{index}\u27e7" for index in range(len(roles))]
            messages = list(zip(roles, marks, strict=True))
            text = self._apply(messages)
            pieces = []
            for mark in marks:
                if text.count(mark) != 1:
                    raise TemplateRefusal(f"the template does not render the turns {', '.join(roles)} once each")
                before, _, text = text.partition(mark)
                pieces.append(before)
            pieces.append(text)
            own = (self._own_words(messages[:index], pieces[index]) if role == "assistant" else 0 for index, role in enumerate(roles))
            self._shapes[roles] = _Shape(tuple(pieces), tuple(own))
        return self._shapes[roles]

    def _own_words(self, before: Sequence[tuple[str, str]], piece: str) -> int:
        """Characters at the end of `piece` that the generation prompt after the turns `before` does not hold."""
        if not before:
            return 0
        prompt = self._apply(before, add_generation_prompt=True).rpartition(before[-1][1])[2]
        return len(piece) - len(prompt) if piece.startswith(prompt) else 0

    def _apply_all(self, conversations: Sequence[Sequence[tuple[str, str]]]) -> list[str | TemplateRefusal]:
        """What the template itself renders from each row; in one call, and one by one where a row makes the template raise."""
        from jinja2.exceptions import TemplateError

        if not conversations:
            return []
        with contextlib.suppress(TemplateError):
            return self._call([_turns(messages) for messages in conversations], False)
        texts: list[str | TemplateRefusal] = []
        for messages in conversations:
            try:
                texts.append(self._apply(messages))
            except TemplateRefusal as refusal:
                texts.append(refusal)
        return texts

    def _apply(self, messages: Sequence[tuple[str, str]], add_generation_prompt: bool = False) -> str:
        from jinja2.exceptions import TemplateError

        try:
            return self._call(_turns(messages), add_generation_prompt)
        except TemplateError as error:
            raise TemplateRefusal(f"the template says: {error}") from None

    def _call(self, conversation: Any, add_generation_prompt: bool) -> Any:
        return self.tokenizer.apply_chat_template(
            conversation, tokenize=False, add_generation_prompt=add_generation_prompt, chat_template=self.template
        )


def _turns(messages: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in messages]


def _checked(row: Rendered | TemplateRefusal, text: str | TemplateRefusal) -> Rendered | TemplateRefusal:
    """The row, ready to be tokenised, if the template renders this very text from it."""
    if isinstance(row, TemplateRefusal):
        return row
    if isinstance(text, TemplateRefusal):
        return text
    if row.text != text:
        return TemplateRefusal("the template rewrites the content of a turn")
    return replace(row, text=text[: row.spans[-1].end]) if row.append_end else row


def _added_specials(tokenizer: Any) -> set[str]:
    """Added tokens marked special that no role names (<|eot_id|>, <|im_end|> of some models)."""
    return {str(token) for token in getattr(tokenizer, "added_tokens_decoder", {}).values() if getattr(token, "special", False)}
