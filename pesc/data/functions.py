"""Documented Python functions as code instructions: the docstring asks, the source answers.

Only top-level public functions with a docstring of at least 40 characters and a body of their own count; tests do not.  The
answer is the function without its docstring, which the question already holds.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pesc.data.conversation import BadRow

MIN_DOCSTRING = 40
_TESTS = re.compile(r"(^|/)(tests?|testing)/|(^|/)(test_[^/]*|[^/]*_test|conftest|setup)\.py$")
_TAIL = re.compile(r"^(Examples?|References|See Also|Notes|Doctests?)\n[-=~]{3,}", re.MULTILINE)
"""Sections of a NumPy docstring that say nothing about what to write."""


def is_test_file(path: str) -> bool:
    """Whether a relative path belongs to tests or packaging."""
    return bool(_TESTS.search(path))


def read_functions(path: Path) -> Iterator[tuple[int, Any]]:
    """(line, {instruction, response, name}) of each usable function; a file that does not parse gives one unreadable row."""
    try:
        source = path.read_text(encoding="utf-8")
        module = ast.parse(source)
    except (SyntaxError, ValueError) as error:
        yield 1, BadRow(f"is not valid Python ({error})")
        return
    lines = source.splitlines()
    for node in module.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (row := _as_row(node, lines)):
            yield node.lineno, row


def _as_row(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> dict[str, str] | None:
    docstring = ast.get_docstring(node) or ""
    if node.name.startswith("_") or len(docstring) < MIN_DOCSTRING or not _has_body(node):
        return None
    question = _TAIL.split(inspect.cleandoc(docstring), maxsplit=1)[0].strip() or docstring
    instruction = f"Write the Python function `{_signature(node)}`.\n\n{question}"
    return {"instruction": instruction, "response": f"```python\n{_source(node, lines)}\n```", "name": node.name}


def _has_body(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether anything but `pass`, `...` and `raise NotImplementedError` follows the docstring."""
    for statement in node.body[1:]:
        text = ast.unparse(statement)
        if not (text in {"pass", "..."} or text.startswith("raise NotImplementedError")):
            return True
    return False


def _signature(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{'async ' if isinstance(node, ast.AsyncFunctionDef) else ''}def {node.name}({ast.unparse(node.args)}){returns}"


def _source(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> str:
    """The function's lines without its docstring; decorators, formatting and comments stay as their author wrote them."""
    docstring, first = node.body[0], min([node.lineno, *(item.lineno for item in node.decorator_list)])
    head = lines[first - 1 : docstring.lineno - 1]
    tail = lines[docstring.end_lineno or docstring.lineno : node.end_lineno]
    while tail and not tail[0].strip():
        tail = tail[1:]
    shares_a_line = docstring.lineno == node.lineno or node.body[1].lineno <= (docstring.end_lineno or 0)
    kept = lines[first - 1 : node.end_lineno] if shares_a_line else [*head, *tail]
    return inspect.cleandoc("\n" + "\n".join(kept)).strip("\n")
