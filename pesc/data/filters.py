"""Rows thrown out for what they are: too short or long, refusals, loops, broken code fences, answers that copy the prompt."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import pairwise

import numpy as np

from pesc.data.config import FilterConfig
from pesc.data.conversation import Conversation
from pesc.data.text import normal_form

_REFUSAL = re.compile(
    r"\bas an? (?:ai|artificial intelligence)(?: (?:language|text-based))?(?: (?:model|assistant|chatbot))?,? (?:i|my)\b"
    r"|\bas a (?:large )?language model\b"
    r"|\bi(?:'m| am) (?:just |only |merely )?(?:an? )?(?:ai|artificial intelligence) language model\b"
    r"|\bi (?:was|am|have been) (?:trained|developed|created|made|built) by (?:openai|anthropic|google|meta|mistral|alibaba)\b"
    r"|\bi(?:'m| am) (?:chatgpt|gpt-?[34])\b"
)
_OPENING_REFUSAL = re.compile(
    r"(?:i(?:'m| am) (?:very |so |truly )?sorry|sorry|i apologi[sz]e|apologies|unfortunately)?[\s,.!]*(?:but )?"
    r"(?:i|we) (?:can(?:no|')t|can not|am unable to|am not able to|won't|will not) "
    r"(?:assist|help|fulfil|fulfill|comply|provide|answer|do that|engage|support|generate|create|write|complete|give)\b"
)
_FENCE = re.compile(r"^[ \t]*(`{3,}|~{3,})(.*)$", re.MULTILINE)
LOOP_PERIOD = 24
"""Longest repeated phrase looked for, in words."""
LOOP_REPEATS = 5
LOOP_WORDS = 20
LOOP_SHARE = 0.3


def reason_to_drop(conversation: Conversation, config: FilterConfig) -> str | None:
    """The name of the first filter that throws this row out, or None."""
    return next((name for name, is_bad in _checks(config) if is_bad(conversation)), None)


def _checks(config: FilterConfig) -> Iterator[tuple[str, Callable[[Conversation], bool]]]:
    yield "short_answer", lambda row: any(len(answer.strip()) < config.min_answer_chars for answer in _answers(row))
    yield "too_long", lambda row: row.chars > config.max_chars
    if config.drop_refusals:
        yield "refusal", lambda row: any(map(is_refusal, _answers(row)))
    if config.drop_ngram_loops:
        yield "ngram_loop", lambda row: any(map(has_loop, _answers(row)))
    if config.drop_unclosed_code:
        yield "unclosed_code", lambda row: any(map(has_unclosed_code, _answers(row)))
    if config.drop_copied_prompt:
        yield "copied_prompt", copies_prompt


def _answers(row: Conversation) -> Iterator[str]:
    return (message.content for message in row.messages if message.role == "assistant")


def is_refusal(answer: str) -> bool:
    """Whether an answer opens with a refusal, or speaks of itself as a language model or of its vendor."""
    text = answer.lower().replace("’", "'")
    return bool(_OPENING_REFUSAL.match(text.lstrip()) or _REFUSAL.search(text))


def has_loop(answer: str) -> bool:
    """Whether one phrase of up to 24 words follows itself five times or more, over at least 20 words and 30 % of the answer.

    Phrases without a word of three letters (rows of numbers, ASCII tables) do not count.
    """
    words = answer.split()
    needed = max(LOOP_WORDS, int(len(words) * LOOP_SHARE))
    if len(words) < LOOP_WORDS or len(words) - len(set(words)) < needed * (1 - 1 / LOOP_REPEATS):
        return False
    numbers: dict[str, int] = {}
    ids = np.array([numbers.setdefault(word, len(numbers)) for word in words])
    return any(_repeats(words, ids, period, max(needed, LOOP_REPEATS * period)) for period in range(1, LOOP_PERIOD + 1))


def _repeats(words: list[str], ids: np.ndarray, period: int, needed: int) -> bool:
    """Whether a stretch of at least `needed` words repeats with this period, and holds a word of three letters."""
    same = ids[period:] == ids[:-period]
    if np.count_nonzero(same) + period < needed:
        return False
    breaks = np.flatnonzero(np.concatenate(([True], ~same, [True])))
    longest = int(np.argmax(np.diff(breaks)))
    start, length = int(breaks[longest]), int(breaks[longest + 1] - breaks[longest]) - 1 + period
    return length >= needed and any(sum(map(str.isalpha, word)) >= 3 for word in words[start : start + period])


def has_unclosed_code(answer: str) -> bool:
    """Whether a code fence is opened and not closed (CommonMark: a closing fence is bare and at least as long)."""
    fence = ""
    for mark, rest in _FENCE.findall(answer):
        if not fence:
            fence = mark
        elif mark[0] == fence[0] and len(mark) >= len(fence) and not rest.strip():
            fence = ""
    return bool(fence)


def copies_prompt(row: Conversation) -> bool:
    """Whether an answer is its own prompt again."""
    turns = [(before.content, answer.content) for before, answer in pairwise(row.messages) if answer.role == "assistant"]
    return any(_first_word(prompt) == _first_word(answer) and normal_form(prompt) == normal_form(answer) for prompt, answer in turns)


def _first_word(text: str) -> str:
    """Cheap to compare before whole texts are normalised."""
    return normal_form((text.split(None, 1) or [""])[0])
