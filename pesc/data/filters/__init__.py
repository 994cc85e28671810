"""Rows thrown out for what they are, in the order of FILTER_REASONS; the first reason is the one that counts.

Map
    encoding.py  bytes read in the wrong encoding, control characters, scripts, languages     prose.py  refusals, loops, truncation
    code.py      code fences, Python that does not parse                                      maths.py  final answers that disagree

Promises
- A row's reason depends on that row and the settings alone.
- A filter that is off changes no other: its rows are kept, or go to a reason further down the list.
- Nothing is downloaded, and no filter's time grows faster than its row.

Pitfalls
- The checks are cautious on purpose: a good row lost costs more than a bad one kept among half a million. Their limits stand with each.
- Whether Python parses is asked of the running interpreter: 3.11 and 3.14 do not agree on all of the newest syntax.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

from pesc.data.config import FilterConfig
from pesc.data.conversation import Conversation
from pesc.data.filters.code import has_broken_python, has_python2, has_unclosed_code
from pesc.data.filters.encoding import has_bad_encoding, has_foreign_script, is_other_language
from pesc.data.filters.maths import answers_disagree
from pesc.data.filters.prose import has_loop, is_empty, is_refusal, is_truncated, names_itself
from pesc.data.text import approximate_tokens, normal_form

__all__ = [
    "FILTER_REASONS",
    "answers_disagree",
    "has_bad_encoding",
    "has_broken_python",
    "has_foreign_script",
    "has_loop",
    "has_python2",
    "has_unclosed_code",
    "is_empty",
    "is_other_language",
    "is_refusal",
    "is_truncated",
    "names_itself",
    "reason_to_drop",
]


class _Row(NamedTuple):
    """A conversation with what nearly every filter looks at."""

    conversation: Conversation
    answers: list[str]


class _Filter(NamedTuple):
    """One reason: when it is on, and which rows it throws out."""

    reason: str
    is_on: Callable[[FilterConfig], object]
    is_bad: Callable[[_Row, FilterConfig], bool]


def _any_answer(check: Callable[[str], bool]) -> Callable[[_Row, FilterConfig], bool]:
    """A check of one answer, as a check of a row."""

    def is_bad(row: _Row, _: FilterConfig) -> bool:
        return any(map(check, row.answers))

    return is_bad


def _any_exchange(check: Callable[[str, str], bool]) -> Callable[[_Row, FilterConfig], bool]:
    """A check of (answer, the turn before it), as a check of a row."""

    def is_bad(row: _Row, _: FilterConfig) -> bool:
        turns = row.conversation.messages
        return any(answer.role == "assistant" and check(answer.content, asked.content) for asked, answer in pairwise(turns))

    return is_bad


def _is_short(row: _Row, config: FilterConfig) -> bool:
    return any(len(answer) < config.min_answer_chars or len(answer.strip()) < config.min_answer_chars for answer in row.answers)


def _tokens(row: _Row) -> int:
    return sum(approximate_tokens(message.content) for message in row.conversation.messages)


def _has_foreign_script(row: _Row, _: FilterConfig) -> bool:
    if all(map(str.isascii, row.answers)):
        return False
    others = "\n".join(message.content for message in row.conversation.messages if message.role != "assistant")
    return any(has_foreign_script(answer, others) for answer in row.answers)


def _is_copy(answer: str, prompt: str) -> bool:
    """Whether an answer is its own prompt again, up to case and white space."""
    return _first_words(prompt) == _first_words(answer) and normal_form(prompt) == normal_form(answer)


def _first_words(text: str) -> str:
    """Cheap to compare before whole texts are normalised."""
    start = " ".join(text.split(None, 4)[:4])
    return start.lower() if start.isascii() else normal_form(start)


_FILTERS = (
    _Filter("short_answer", lambda c: c.min_answer_chars, _is_short),
    _Filter("empty_answer", lambda c: c.drop_empty_answers, _any_answer(is_empty)),
    _Filter("too_long", lambda c: c.max_chars, lambda row, c: row.conversation.chars > c.max_chars),
    _Filter("too_few_tokens", lambda c: c.min_tokens, lambda row, c: _tokens(row) < c.min_tokens),
    _Filter("too_many_tokens", lambda c: c.max_tokens, lambda row, c: _tokens(row) > (c.max_tokens or 0)),
    _Filter("bad_encoding", lambda c: c.drop_bad_encoding, _any_answer(has_bad_encoding)),
    _Filter("foreign_script", lambda c: c.drop_foreign_script, _has_foreign_script),
    _Filter("language", lambda c: c.languages, lambda row, c: any(is_other_language(answer, c.languages) for answer in row.answers)),
    _Filter("refusal", lambda c: c.drop_refusals, _any_answer(is_refusal)),
    _Filter("self_reference", lambda c: c.drop_self_references, _any_exchange(names_itself)),
    _Filter("ngram_loop", lambda c: c.drop_ngram_loops, _any_answer(has_loop)),
    _Filter("truncated", lambda c: c.drop_truncated, _any_answer(is_truncated)),
    _Filter("unclosed_code", lambda c: c.drop_unclosed_code, _any_answer(has_unclosed_code)),
    _Filter("broken_python", lambda c: c.drop_broken_python, _any_answer(has_broken_python)),
    _Filter("python2", lambda c: c.drop_python2, _any_answer(has_python2)),
    _Filter("math_disagreement", lambda c: c.drop_math_disagreements, _any_answer(answers_disagree)),
    _Filter("copied_prompt", lambda c: c.drop_copied_prompt, _any_exchange(_is_copy)),
)
FILTER_REASONS: tuple[str, ...] = tuple(item.reason for item in _FILTERS)
"""Every reason that `reason_to_drop` can give, in the order the filters run."""


def reason_to_drop(row: Conversation, config: FilterConfig) -> str | None:
    """The name of the first filter that throws this row out (one of FILTER_REASONS), or None.

    About 55 µs for a row of 1,800 characters; parsing Python adds 140 µs to a row that holds some.
    Raises DataError when `languages` is set and its package is not installed.
    """
    view = _Row(row, [message.content for message in row.messages if message.role == "assistant"])
    return next((item.reason for item in _active(config) if item.is_bad(view, config)), None)  # type: ignore[arg-type]  # frozen, so it has a hash


@lru_cache(maxsize=32)
def _active(config: FilterConfig) -> tuple[_Filter, ...]:
    return tuple(item for item in _FILTERS if item.is_on(config))
