r"""Final answers of one solution that contradict each other: `\boxed{…}`, `#### …`, "The answer is: …"."""

from __future__ import annotations

import re
from fractions import Fraction

_BOX = re.compile(r"boxed\s*\{")
_HASHES = re.compile(r"####[ \t]+([^\n]{1,200}?)[ \t]*(?=\s*\Z|\n\s*The answer is)")
_SAYS = re.compile(r"the (?:final )?answer is[ \t]*:?[ \t]*(?=\S)([^\n]+)\s*\Z", re.IGNORECASE)
_LAST = 400
"""Characters at the end of an answer in which it may state its result in words."""
_LAST_BOXES = 20_000
_MAX_VALUE = 200

_FRACTION = re.compile(r"\\[dtc]?frac\s*(?:\{([^{}]*)\}|(\d))\s*(?:\{([^{}]*)\}|(\d))")
_WRAPPER = re.compile(r"\\(?:mathrm|mathbf|boldsymbol|bf|rm|mathit|operatorname)\s*\{([^{}]*)\}")
_TEXT = re.compile(r"\\(?:text|mbox|textbf|textrm|textit)\s*\{([^{}]*)\}")
_LAYOUT = re.compile(r"\\(?:left|right|displaystyle|quad|qquad|[,;:! ])|[$~]|\\(?=[%#&])")
_DEGREES = re.compile(r"\^?\s*\{?\s*(?:\\circ|°)\s*\}?|\\degree|\bdegrees?\b")
_THOUSANDS = re.compile(r"(?<![\d.])(\d{1,3}(?:,\d{3})+)(?!\d)")
_BASE = re.compile(r"_\{?\d+\}?$")
_EQUATION = re.compile(r"^[A-Za-z](?:_?\{?\w{0,3}\}?)\s*=\s*(?=[^=]+$)")
_UNIT = re.compile(r"^([-+]?[\d./]+)\s*(?!e\d)[a-z][a-z .'²³^\d]*$", re.IGNORECASE)
_SCALE_WORD = re.compile(r"hundred|thousand|million|billion|trillion|dozen|\d\s*[kKmM]\b|cents?\b")
_MIXED = re.compile(r"^([-+]?)(\d+)\s+(\d+)/(\d+)$")
_PERIODIC = re.compile(r"sin|cos|tan|cis|mod")
_MANY_FORMS = re.compile(r"sqrt|frac|/|log|ln|pi|cup|or|and|[*!√π]|\\times|\\cdot|\d\.\d|e\d")
"""Marks of expressions that have many equal forms once they hold two numbers: 2\\sqrt{8} is 4\\sqrt{2}."""
_NUMBER = re.compile(r"^([-+]?)(\d+(?:\.\d*)?|\.\d+)(?:/(\d+(?:\.\d+)?))?$")


def answers_disagree(answer: str) -> bool:
    r"""Whether an answer gives its result in two of the three ways, and no value of the one equals any of the other.

    Compared are numbers (integers, decimals up to their rounding, fractions, percentages, with or without units), single option
    letters, and expressions that differ in their numbers alone, as (1, 2) and (1, 3) do.  Everything else is no disagreement: whether
    \sqrt{8} is 2\sqrt{2} is not decided here.
    """
    if "boxed" not in answer and "####" not in answer:
        return False
    values = [found for found in (_boxed(answer), _hashes(answer), _said(answer)) if found]
    return any(all(_differ(a, b) for a in first for b in second) for number, first in enumerate(values) for second in values[number + 1 :])


def _boxed(answer: str) -> list[str]:
    r"""What stands in each \boxed{…} of the last 20,000 characters, with braces matched."""
    answer = answer[-_LAST_BOXES:]
    values, place = [], answer.find("boxed")
    while place >= 0:
        opening = _BOX.match(answer, place)
        place = opening.end() if opening else place + 1
        depth = 1
        for end in range(place, min(len(answer), place + _MAX_VALUE)) if opening else ():
            depth += {"{": 1, "}": -1}.get(answer[end], 0)
            if not depth:
                values.append(answer[place:end])
                break
        place = answer.find("boxed", place)
    return values


def _hashes(answer: str) -> list[str]:
    match = _HASHES.match(answer, answer.rfind("####")) if "####" in answer else None
    return [match[1]] if match else []


def _said(answer: str) -> list[str]:
    tail = answer[-_LAST:]
    start = tail.lower().rfind("the ", 0, max(0, tail.lower().rfind("answer is")))
    match = _SAYS.match(tail, start) if start >= 0 else None
    return [match[1]] if match and len(match[1]) <= _MAX_VALUE else []


def _differ(first: str, second: str) -> bool:
    """Whether two results are surely not the same."""
    if first.strip(" $.") == second.strip(" $."):
        return False
    a, b = _plain(first), _plain(second)
    if _letters(a) == _letters(b):
        return False
    number_a, number_b = _number(a), _number(b)
    if number_a is not None and number_b is not None:
        scales = (1, 100, Fraction(1, 100)) if ("%" in a) != ("%" in b) else (1,)
        return not any(_close(number_a, number_b, scale) for scale in scales)
    if re.fullmatch(r"\(?[A-E]\)?", a) and re.fullmatch(r"\(?[A-E]\)?", b):
        return a.strip("()") != b.strip("()")
    if re.sub(r"\d+", "#", _letters(a)) != re.sub(r"\d+", "#", _letters(b)):
        return False
    numbers_a, numbers_b = ([int(digits) for digits in re.findall(r"\d{1,30}", text)] for text in (a, b))
    undecided = _PERIODIC.search(a) or (len(numbers_a) > 1 and _MANY_FORMS.search(a))
    return not undecided and sorted(numbers_a) != sorted(numbers_b)


def _plain(value: str) -> str:
    """A result without layout: fractions as a/b, no units in \\text, no thousands separators, no base, no `x =`."""
    value = value.strip().rstrip(".")
    value = _TEXT.sub(lambda match: f" {match[1]} ", _WRAPPER.sub(r"\1", value))
    value = _LAYOUT.sub("", value.replace("\\$", "").replace("\\!", ""))
    for _ in range(3):
        value = _FRACTION.sub(lambda m: f" {m[1] or m[2]}/{m[3] or m[4]}", value)
    value = _DEGREES.sub("", value).replace("−", "-").replace("\u2013", "-")
    value = _THOUSANDS.sub(lambda match: match[1].replace(",", ""), value)
    value = _EQUATION.sub("", value.strip().rstrip(".").strip())
    return re.sub(r"([-+])\s+(?=\d)", r"\1", _BASE.sub("", value)).strip()


def _letters(value: str) -> str:
    """What is compared when a result is no number: no white space, braces or backslashes."""
    return re.sub(r"[\s{}\\]", "", value).casefold()


def _number(value: str) -> tuple[Fraction, int] | None:
    """(value, decimals given) of a plain result that is one number with or without a unit; decimals is -1 for an exact one."""
    value = value.replace("%", "").replace("€", "").replace("£", "").strip()
    if _SCALE_WORD.search(value):
        return None
    if unit := _UNIT.match(value):
        value = unit[1]
    if mixed := _MIXED.match(value):
        whole = Fraction(int(mixed[2])) + (Fraction(int(mixed[3]), int(mixed[4])) if int(mixed[4]) else 0)
        return (-whole if mixed[1] == "-" else whole), -1
    match = _NUMBER.match(value)
    if not match or len(value) > 60:
        return None
    divisor = Fraction(match[3]) if match[3] else Fraction(1)
    if not divisor:
        return None
    number = Fraction(match[2]) / divisor
    decimals = -1 if match[3] or "." not in match[2] else len(match[2].partition(".")[2])
    return (-number if match[1] == "-" else number), decimals


def _close(first: tuple[Fraction, int], second: tuple[Fraction, int], scale: int | Fraction) -> bool:
    """Whether two numbers are equal, or one is the other rounded to the decimals it is given with."""
    distance = abs(first[0] * scale - second[0])
    given = [decimals for decimals in (first[1], second[1]) if decimals >= 0]
    if not given or first[1] == second[1]:  # two decimals of one length are as exact as they look
        return distance == 0
    return distance <= Fraction(1, 10 ** min(given))
