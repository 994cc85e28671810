"""Answers that are no answers: empty, refusals, talk of the model about itself, one phrase over and over, stopped half-way."""

from __future__ import annotations

import re

import numpy as np

_EMPTY = re.compile(r"\.|…+|[.…\-–—_*#`~|]{3,}|</?no ?(?:output|input|answer)>")

_LAYOUT_SPACE = re.compile(r"\s+(?![a-z])")
_APOLOGY = r"(?:i(?:'m| am) (?:very |so |truly |really |terribly )?sorry|sorry|(?:my )?apologies|i apologi[sz]e|unfortunately|regrettably)"
_KIND = r"(?:model|assistant|chat ?bot|bot|system|program|tool|entity|agent)"
_MODEL = (
    r"an? (?:(?:ai|artificial intelligence)(?:[- ](?:text-based|language|powered|chat|virtual|digital|machine learning))*"
    rf"(?: {_KIND})?|(?:(?:large|text-based|machine learning|computer) )*(?:language model|ai {_KIND})|(?:text-based|machine learning) model)"
)
_CANNOT = (
    r"(?:can(?:no|')t|can not|am unable to|'m unable to|am not able to|'m not able to|won't|will not|am not programmed to|must decline to)"
)
_REFUSAL = re.compile(
    rf"(?:{_APOLOGY}[\s,.!:;]*)?(?:(?:but|however)[\s,]*)?(?:as {_MODEL}[\s,]*)?i ?(?:currently )?(?:"
    rf"{_CANNOT} (?:directly |currently |actually |really )?(?!help (?:falling|but|it|feeling|thinking|wondering|myself|notic)|give (?:up|in)\b)"
    r"(?:assist|help|fulfil|fulfill|comply|provide|answer|do (?:that|this)|engage|support|generate|create|write|complete|give|perform|access"
    r"|browse|retrieve|satisfy|display|draw|book|order)\b"
    r"|(?:do not|don't|lack|do not currently|don't currently) (?:have )?(?:direct |real-time |the )*"
    r"(?:capability|capabilities|capacity|ability|abilities|means|access|permission|function)\b)"
)
"""How an answer opens that refuses; matched at its start."""

_SELF = re.compile(
    rf"\bas {_MODEL}[\s,]*(?:i|my)\b"
    rf"|\bi(?:'m| am) (?:just |only |merely |actually |simply )?{_MODEL}(?=\s*(?:[,.;:!?)]|$)| (?:and|so|but|i|that|who|without|not|created"
    r"|designed|developed|trained|built|made|programmed|by)\b)"
    r"|\bi (?:was|am|have been|'ve been) (?:\w+ )?(?:trained|developed|created|made|built|designed) (?:and \w+ )?by "
    r"(?:openai|open ai|anthropic|google|deepmind|meta ai|microsoft|mistral|alibaba|cohere|deepseek|baidu|hugging ?face)\b"
    r"|\bi(?:'m| am) (?:chatgpt|gpt-?[345]|"
    r"(?:claude|bard|gemini|llama|qwen|copilot|mistral),? (?:an? (?:ai|large|language|virtual)|made|created|developed|trained)\b)"
    r"|\bmy (?:last )?knowledge (?:cut-?off|update)\b|\bmy (?:last )?training (?:data )?cut-?off\b|\bas of my last (?:training|update)\b"
)
_MAKERS = re.compile(r" by (?:open ?ai|anthropic|google|deepmind|meta ai|microsoft|mistral|alibaba|cohere|deepseek|baidu|hugging)")
_NAME = re.compile(r"\bi(?:'m| am) (?:chatgpt|gpt|claude|bard|gemini|llama|qwen|copilot|mistral)")
_ASKS_ABOUT_MODELS = re.compile(
    r"(?<!you are an )\b(?:a\.?i\.?|artificial intelligence|language models?|chat ?bots?|llms?|chatgpt|gpt|openai|anthropic)\b"
    r"|\b(?:who|what) (?:exactly )?(?:are|created|built|made|trained|developed|designed) you\b|\bare you (?:an?|human|real|conscious|alive)\b"
    r"|\byour (?:name|creators?|makers?|developers?)\b|\babout yourself\b|\bintroduce yourself\b"
)
_NAMES_VENDOR = re.compile(
    r"chatgpt|gpt-?\d|openai|open ai|anthropic|deepmind|\bby (?:google|meta|microsoft|mistral|alibaba|cohere|deepseek|baidu)"
)

LOOP_PERIOD = 24
"""Longest repeated phrase looked for, in words."""
LOOP_REPEATS = 5
LOOP_WORDS = 20
LOOP_SHARE = 0.3

_NEVER_LAST = re.compile(r"\b(?:the|an|and|or|but|because|although|whereas|which|whose|such as|into|than|their|our|your|if|while|between)$")
_SELDOM_LAST = re.compile(
    r"\b(?:a|of|to|for|with|in|on|at|by|from|as|that|is|are|was|were|has|have|had|be|been|its|his|this|these|can|will|would|may)$"
)
_SENTENCE_END = re.compile(r"[a-z)\"'][.!?][\"')]?\s")
_NOT_PROSE = re.compile(r"[{}\[\]=<>$_\\|;`*/@&^~]|\w\(")
_OPEN_QUOTE = re.compile(r"(?:^|[\s(])[\"“](?=\w)[^\"“”]*[^\s.!?…:\"“”]$")
_HALF_FORMULA = re.compile(r"\$(?![^$]*(?:[\"';]|(?<!\\)\b[A-Za-z]{3}))[^$]*(?:[=+]|\\(?:frac|cdot|times|sqrt|left|right|boxed)\{?)$")
_MIN_PROSE_WORDS = 6


def is_empty(answer: str) -> bool:
    """Whether an answer is nothing but a full stop, three marks of layout or more, or a placeholder such as <nooutput>.

    One or two marks may be right: `**` is an operator.
    """
    return len(answer) < 200 and bool(_EMPTY.fullmatch(_LAYOUT_SPACE.sub("", answer.lower())))


def is_refusal(answer: str) -> bool:
    """Whether an answer opens with a refusal: that it cannot help, or has no access or ability to."""
    return bool(_REFUSAL.match(_plain_quotes(answer[:400]).lstrip()))


def names_itself(answer: str, asked: str) -> bool:
    """Whether an answer speaks of itself as a language model, of its vendor, or of its training.

    Kept are quoted phrases ("Hello, I am an AI assistant" as a string in code), and answers to a user who asks about AI, unless they
    name a vendor as their own.
    """
    text = _plain_quotes(answer)
    if not _may_name_itself(text):
        return False
    found = [match for match in _SELF.finditer(text) if not _is_quoted(text, match.start())]
    if not found:
        return False
    return not _ASKS_ABOUT_MODELS.search(asked.lower()) or any(_NAMES_VENDOR.search(match[0]) for match in found)


def _may_name_itself(text: str) -> bool:
    """False for a text that holds no _SELF: a few plain searches instead of one slow pattern."""
    if "an ai" in text or "artificial intelligence" in text:
        return True
    if " model" in text and ("language model" in text or "learning model" in text or "based model" in text):
        return True
    if "my " in text and ("my last " in text or "my knowledge " in text or "my training " in text):
        return True
    if " by " in text and _MAKERS.search(text):
        return True
    return ("i am " in text or "i'm " in text) and bool(_NAME.search(text))


def _plain_quotes(text: str) -> str:
    return text.lower().replace("’", "'")


def _is_quoted(text: str, place: int) -> bool:
    """Whether a quotation mark is open at this place of its line, as far as the 300 characters before it tell."""
    before = text[max(0, place - 300) : place].rpartition("\n")[2]
    return before.count('"') % 2 == 1 or len(re.findall(r"(?<!\w)'|'(?!\w)", before)) % 2 == 1 or before.count("“") > before.count("”")


def is_truncated(answer: str) -> bool:
    """Whether an answer stops within a sentence, a formula, or a list in code.

    Prose: the last line has six words or more, reads as prose, and ends with a comma, a word that ends no sentence ("the", "and",
    "because"), a word that seldom does ("of", "to") after two whole sentences, or within a quotation.  Formulae: an odd `$` and an
    operator at the end.  Code: brackets are open, and the last character opens one or is a comma.
    An answer that ends in a full stop, or with a whole word of another kind, is never truncated here.
    """
    text = answer.rstrip()
    last = text[-1:]
    if not last or last in ".!?)`>;\"'。！？।…0123456789":
        return last == "`" and text.endswith("```") and _stops_in_code(text[:-3])
    line = text[text.rfind("\n") + 1 :]
    if last in "({[,":
        return _stops_in_code(text) or (last == "," and _reads_as_prose(line))
    if last in "=+{" or "\\" in line[-8:]:
        return line.count("$") % 2 == 1 and bool(_HALF_FORMULA.search(line))
    if not _reads_as_prose(line):
        return False
    if _NEVER_LAST.search(line) or _OPEN_QUOTE.search(line):
        return True
    return bool(_SELDOM_LAST.search(line)) and len(_SENTENCE_END.findall(text[-2000:])) >= 2


def _reads_as_prose(line: str) -> bool:
    """Six words or more, no signs of code or formulae, and no list of short items."""
    return line.count(" ") >= _MIN_PROSE_WORDS - 1 and line.count(",") * 3 <= line.count(" ") + 1 and not _NOT_PROSE.search(line)


def _stops_in_code(text: str) -> bool:
    """Whether the last code block, or the text where there is none, has open brackets and ends with an opening one or a comma."""
    code = text[text.rfind("```") + 3 :].rstrip() if "```" in text else text
    if code[-1:] not in tuple("({[,") or code.count("\n") < 3:
        return False
    return any(code.count(opening) > code.count(closing) for opening, closing in ("()", "[]", "{}"))


def has_loop(answer: str) -> bool:
    """Whether one phrase of up to 24 words follows itself five times or more, over at least 20 words and 30 % of the answer.

    Phrases without a word of three letters (rows of numbers, ASCII tables) do not count.
    """
    words = answer.split()
    needed = max(LOOP_WORDS, int(len(words) * LOOP_SHARE))
    if len(words) < LOOP_WORDS or not _may_loop(words, needed):
        return False
    numbers: dict[str, int] = {}
    ids = np.array([numbers.setdefault(word, len(numbers)) for word in words])
    return any(_repeats(words, ids, period, max(needed, LOOP_REPEATS * period)) for period in range(1, LOOP_PERIOD + 1))


def _may_loop(words: list[str], needed: int) -> bool:
    """Whether some phrase follows itself at one of the places that a loop of `needed` words cannot avoid, three fifths of that apart.

    From the first such place within a loop, two fifths of the loop are left, and its phrase is at most one fifth.
    """
    longest = min(LOOP_PERIOD, len(words) // LOOP_REPEATS)
    for place in range(0, len(words), needed * 3 // 5):
        word, following = words[place], words[place + 1 : place + 1 + longest]
        if word not in following:
            continue
        for period, other in enumerate(following, start=1):
            if other == word and words[place : place + period] == words[place + period : place + 2 * period]:
                return True
    return False


def _repeats(words: list[str], ids: np.ndarray, period: int, needed: int) -> bool:
    """Whether a stretch of at least `needed` words repeats with this period, and holds a word of three letters."""
    same = ids[period:] == ids[:-period]
    if np.count_nonzero(same) + period < needed:
        return False
    breaks = np.flatnonzero(np.concatenate(([True], ~same, [True])))
    longest = int(np.argmax(np.diff(breaks)))
    start, length = int(breaks[longest]), int(breaks[longest + 1] - breaks[longest]) - 1 + period
    return length >= needed and any(sum(map(str.isalpha, word)) >= 3 for word in words[start : start + period])
