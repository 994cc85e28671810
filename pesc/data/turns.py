"""Turns of a conversation: roles, clean texts, tool calls as text, and what a sequence of turns must be."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "observation": "tool",
    "ipython": "tool",
}
"""Names of roles in the wild -> system, user, assistant, tool."""
_TEXT_PARTS = frozenset({None, "text", "input_text", "output_text"})
_MAX_BRACKETS = 200
"""Tool arguments with more brackets stay a text: how deep Python's JSON parser can go depends on the machine."""


class RowError(ValueError):
    """A row that is not a conversation: the field, and what is wrong with it."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"field {field!r} {problem}")
        self.field = field


class BadRow(NamedTuple):
    """A row that could not even be read."""

    reason: str


class Message(NamedTuple):
    """One turn."""

    role: str
    content: str


class Parsed(NamedTuple):
    """What a format's parser makes of a row: turns, and the bare questions (user turns without any answer template)."""

    messages: tuple[Message, ...]
    questions: tuple[str, ...]


def clean(value: Any, field: str) -> str:
    """A text with Unix line ends and without white space around it; texts in parts are joined.  Raises RowError for anything else."""
    if isinstance(value, list) and value:
        value = "".join([_part(part, field) for part in value])
    if not isinstance(value, str):
        raise RowError(field, "is empty" if value is None else f"is a {type(value).__name__}, not a text")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise RowError(field, "is not valid Unicode (a lone surrogate)") from None
    if "\0" in value:
        raise RowError(field, "holds a NUL character")
    return value.replace("\r\n", "\n").strip()


def _part(part: Any, field: str) -> str:
    """A text part of a multi-part content."""
    if not isinstance(part, Mapping):
        raise RowError(field, "is a list, not a text")
    kind = part.get("type")
    text = part.get("text")
    text = part.get("value") if text is None else text
    if not (kind is None or (isinstance(kind, str) and kind in _TEXT_PARTS)) or not isinstance(text, str):
        raise RowError(field, f"has a part of type {str(kind)[:40]!r}; only texts can be trained on")
    return text


def required(row: Mapping[str, Any], field: str) -> str:
    """The text of a field that must be there and not empty."""
    if field not in row:
        raise RowError(field, "is missing")
    text = clean(row[field], field)
    if not text:
        raise RowError(field, "is empty")
    return text


def optional(row: Mapping[str, Any], field: str) -> str:
    """The text of a field that may be absent or null."""
    value = row.get(field)
    return "" if value is None else clean(value, field)


def plain(turns: list[Message]) -> Parsed:
    """Turns whose user contents are the bare questions."""
    return Parsed(tuple(turns), tuple([turn.content for turn in turns if turn.role == "user"]))


def with_system(system: str, turns: list[Message]) -> list[Message]:
    """The turns behind a system prompt; one that they begin with already is put behind it, unless it is the same."""
    if turns and turns[0].role == "system":
        own, turns = turns[0].content, turns[1:]
        system = "\n\n".join(dict.fromkeys(text for text in (system, own) if text))
    return [Message("system", system), *turns] if system else turns


def tool_listing(row: Mapping[str, Any]) -> str:
    """The tools of a row as a part of its system prompt; empty when there are none."""
    tools = row.get("tools")
    if not tools:
        return ""
    if isinstance(tools, list | Mapping):
        tools = json.dumps(tools, ensure_ascii=False, sort_keys=True, default=str)
    listing = clean(tools, "tools")
    return "" if listing in ("", "[]", "{}") else f"Tools:\n{listing}"


def read_turns(row: Mapping[str, Any], field: str) -> list[Message]:
    """The turns of a list of {from, value} or {role, content}.  Results of tools that were called together are one turn."""
    listed = row.get(field)
    if not isinstance(listed, list):
        raise RowError(field, "is missing" if field not in row else "is empty" if listed is None else "is not a list of turns")
    turns: list[Message] = []
    for index, turn in enumerate(listed):
        if not isinstance(turn, Mapping):
            raise RowError(field, f"holds a {type(turn).__name__} as turn {index + 1}")
        role = _role(turn, field, index)
        content = _content(turn, role, field, index)
        if role == "tool" and turns and turns[-1].role == "tool":
            turns[-1] = Message("tool", f"{turns[-1].content}\n{content}")
        else:
            turns.append(Message(role, content))
    return turns


def _role(turn: Mapping[str, Any], field: str, index: int) -> str:
    name = turn.get("from")
    if name is None:
        name = turn.get("role")
    role = (ROLES.get(name) or ROLES.get(name.strip().lower())) if isinstance(name, str) else None
    if role is None:
        raise RowError(field, f"has the unknown role {_short(name)} (turn {index + 1})")
    return role


def _content(turn: Mapping[str, Any], role: str, field: str, index: int) -> str:
    value = turn.get("value")
    if value is None:
        value = turn.get("content")
    if role != "assistant" or not (turn.get("tool_calls") or turn.get("function_call")):
        return clean(value, f"{field}[{index}]")
    text = clean(value, f"{field}[{index}]") if value else ""
    calls = clean(_calls(turn, f"{field}[{index}]"), f"{field}[{index}]")
    return f"{text}\n{calls}" if text else calls


def _calls(turn: Mapping[str, Any], field: str) -> str:
    """The tool calls of a turn, one a line: {"name": …, "arguments": …}, as the sharegpt sets write them."""
    calls = turn.get("tool_calls") or [turn.get("function_call")]
    if not isinstance(calls, list):
        raise RowError(field, f"has tool calls that are a {type(calls).__name__}, not a list")
    lines = []
    for call in calls:
        function = (call.get("function") or call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise RowError(field, "has a tool call without the name of a function")
        name = json.dumps(function["name"], ensure_ascii=False)
        lines.append(f'{{"name": {name}, "arguments": {_arguments(function.get("arguments"))}}}')
    return "\n".join(lines)


def _arguments(value: Any) -> str:
    """Arguments as JSON: a text that is JSON stays as it is written, any other text becomes a JSON string."""
    if value is None or value == "":
        return "{}"
    if isinstance(value, str) and value.count("{") + value.count("[") <= _MAX_BRACKETS:
        try:
            json.loads(value)
            return value.strip()
        except ValueError:
            pass
    return json.dumps(value, ensure_ascii=False, default=str)


def check_turns(messages: tuple[Message, ...], field: str) -> None:
    """Raises RowError unless the turns are a conversation: user first, assistant last, no two of one role in a row, no empty question."""
    turns = messages[1:] if messages and messages[0].role == "system" else messages
    if not turns:
        raise RowError(field, "has no turns")
    if turns[0].role != "user":
        raise RowError(field, f"begins with a turn of the {turns[0].role}, not of the user")
    if turns[-1].role != "assistant":
        raise RowError(field, f"ends with a turn of the {turns[-1].role}, not of the assistant")
    for before, turn in itertools.pairwise(turns):
        if turn.role == before.role:
            raise RowError(field, f"has two turns of the {turn.role} in a row")
        if turn.role == "system":
            raise RowError(field, "has a system turn after the first one")
    for index, message in enumerate(messages):
        if not message.content and message.role in ("user", "tool"):
            raise RowError(field, f"has an empty turn of the {message.role} (turn {index + 1})")


def _short(value: Any) -> str:
    """A value as a message can show it."""
    text = repr(value[:60] if isinstance(value, str) else value)
    return text if len(text) <= 80 else text[:80] + "…"
