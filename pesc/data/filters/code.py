"""Answers whose code is broken: a fence that is not closed, Python that does not parse, Python 2."""

from __future__ import annotations

import ast
import re
import textwrap
import warnings
from collections.abc import Iterator
from functools import lru_cache

_FENCE = re.compile(r"(`{3,}|~{3,})(.*)")
_PYTHON = re.compile(r"(?:python|py|python3|python 3)\b", re.IGNORECASE)
MAX_BLOCK = 20_000
"""Characters of the longest block that is parsed."""
MIN_LINES = 3
"""Shorter blocks are fragments: a signature, a branch, a command."""
_NOT_A_PROGRAM = re.compile(
    r"\A\s*(?:elif|else|except|finally|case)\b"
    r"|^\s*(?:>>>|\.\.\. |\$ |[%!]\w|In \[\d|#!/bin|(?:pip3?|conda|sudo|cd|git|python3?) [\w./-]+|@@ |Traceback \(|File \"|\d+\. [A-Z])"
    r"|^[-+] ?(?:def|class|import|from|return|if|for) |^\s*(?:Output|Input|Example|Note|Explanation)\b[^\n=]*:?\s*$"
    r"|…|\.\.\.\s*$|<[a-z_]+(?: [a-z_]+)*>|\{\{|\{%",
    re.MULTILINE,
)
"""Signs of sessions, shells, diffs, templates, outlines and placeholders: not meant to parse."""
_PYTHON2 = re.compile(
    r"^[^#\n\"']*\bprint +(?:[\"'\w%]|>>)(?![^\n]*=)[^\n]*$|^\s*except\s+[\w.]+\s*,\s*\w+\s*:|^\s*exec +[\"'\w]|^\s*raise +[\w.]+\s*,|[\w)] *<> *[\w(]"
    r"|\bur[\"']|\b0[0-7]+\b(?=[,)\s])|\b\d+L\b",
    re.MULTILINE,
)


def has_unclosed_code(answer: str) -> bool:
    """Whether a code fence is opened and not closed.

    As in CommonMark, a closing fence is bare and at least as long as the opening one, and what follows an opening fence of backticks holds
    no backtick: "```x = 1```" on one line is code within a line.
    """
    fence = ""
    for mark, rest in (match.groups() for match in _fences(answer)):
        if not fence:
            fence = "" if _is_inline(mark, rest) else mark
        elif mark[0] == fence[0] and len(mark) >= len(fence) and not rest.strip():
            fence = ""
    return bool(fence)


def _fences(answer: str) -> Iterator[re.Match[str]]:
    """Marks of three or more that begin a line (group 1), each with the rest of its line (group 2)."""
    marks = [mark for mark in ("```", "~~~") if mark in answer]
    place = min((answer.find(mark) for mark in marks), default=-1)
    while place >= 0:
        match = _FENCE.match(answer, place)
        assert match
        if not answer[answer.rfind("\n", 0, place) + 1 : place].strip(" \t"):
            yield match
            end = match.end()
        else:
            end = match.end(1)
        place = min((found for mark in marks if (found := answer.find(mark, end)) >= 0), default=-1)


def _is_inline(mark: str, rest: str) -> bool:
    return mark[0] == "`" and "`" in rest


def has_broken_python(answer: str) -> bool:
    """Whether a fenced Python block of three lines or more, meant to run as it stands, does not parse.

    Passed over are sessions (`>>>`), shell lines, diffs, templates, outlines and ellipses, blocks that begin within a statement,
    bodies that hold a comment alone ("your code here"), Python 2, and blocks of over 20,000 characters.
    """
    return any(_verdict(block) == "broken" for block in _python_blocks(answer))


def has_python2(answer: str) -> bool:
    """Whether a fenced Python block is Python 2: it does not parse, and holds a print statement, `except X, e` or the like."""
    return any(_verdict(block) == "python2" for block in _python_blocks(answer))


def _python_blocks(answer: str) -> Iterator[str]:
    """Contents of the closed fences marked as Python."""
    fence, start, is_python = "", 0, False
    for match in _fences(answer):
        mark, rest = match.groups()
        if not fence:
            if not _is_inline(mark, rest):
                fence, start, is_python = mark, match.end() + 1, bool(_PYTHON.match(rest.strip()))
        elif mark[0] == fence[0] and len(mark) >= len(fence) and not rest.strip():
            if is_python:
                yield answer[start : answer.rfind("\n", 0, match.start()) + 1]
            fence = ""


@lru_cache(maxsize=8)  # two filters ask for the same block
def _verdict(block: str) -> str:
    """parses, broken, python2, or unknown."""
    if len(block) > MAX_BLOCK or block.strip().count("\n") < MIN_LINES - 1:
        return "unknown"
    problem = _syntax_error(block)
    if problem is None or _syntax_error(textwrap.dedent(block)) is None:
        return "parses"
    if _PYTHON2.search(block):
        return "python2"
    if _NOT_A_PROGRAM.search(block) or _is_placeholder(block, problem) or (problem.msg or "").startswith("f-string"):
        return "unknown"
    return "broken"


def _syntax_error(code: str) -> SyntaxError | None:
    """Why a text is not Python, or None: it parses, or the parser gave up for its size or depth."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            ast.parse(code)
        except SyntaxError as error:
            return None if "too many" in (error.msg or "") else error
        except ValueError as error:  # NUL characters
            return SyntaxError(str(error))
        except (RecursionError, MemoryError):
            return None
    return None


def _is_placeholder(block: str, error: SyntaxError) -> bool:
    """Whether the error is a body that holds comments alone."""
    if "expected an indented block" not in (error.msg or "") or error.lineno is None:
        return False
    before = block.split("\n")[: error.lineno - 1]
    while before and not before[-1].strip():
        before.pop()
    return bool(before) and before[-1].lstrip().startswith("#")
