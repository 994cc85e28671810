"""One conversation schema, and how rows of each known format become it.

    sharegpt              {conversations: [{from, value}]}; optional system, tools      SlimOrca
    messages              {messages: [{role, content}]}
    pesc                  {instruction: system, conversation: [{input, output}]}        the reference code's example
    alpaca                {instruction, input?, output}
    query_response        {query, response}                                             MetaMathQA
    problem_solution      {problem, solution}                                           Magicoder-OSS-Instruct
    instruction_response  {instruction, response}                                       Magicoder-Evol-Instruct
    multiple_choice       {question, options or choices, answer or answerKey}
    question_answer       {question, answer, passage or context?}

A conversation is an optional system turn, then turns that begin with the user's and end with the assistant's, no two of one role
in a row.  Per-turn weights of the hub's sets are not read: every assistant turn is trained on.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function_response": "tool",
    "observation": "tool",
}
"""Names of roles in the wild -> system, user, assistant, tool."""


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


@dataclass(frozen=True, slots=True)
class Conversation:
    """One training row with where it came from.  `id` depends on the data set's name and the turns alone."""

    id: str
    dataset: str
    domain: str
    stratum: str
    messages: tuple[Message, ...]
    questions: tuple[str, ...]
    file: str
    row: int

    @property
    def chars(self) -> int:
        """Characters over all turns."""
        return sum(len(message.content) for message in self.messages)

    @property
    def text(self) -> str:
        """All turns but the system's, which many rows share."""
        return "\n".join(message.content for message in self.messages if message.role != "system")

    @property
    def prompt(self) -> str:
        """The first user turn, for excerpts."""
        return next(message.content for message in self.messages if message.role == "user")


def conversation_id(dataset: str, messages: tuple[Message, ...]) -> str:
    """128 bits of SHA-256 over the data set's name and the turns, as hex."""
    payload = json.dumps([dataset, messages], ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(payload.encode()).hexdigest()[:32]


def parse_row(row: Any, row_format: str) -> Parsed:
    """One row as a conversation.  Raises RowError naming the field."""
    if not isinstance(row, Mapping):
        raise RowError("row", f"is a {type(row).__name__}, not a map of fields")
    parsed = PARSERS[row_format](row)
    _check_turns(parsed.messages, TURN_FIELDS.get(row_format, "messages"))
    return parsed


def detect_format(row: Any) -> str | None:
    """The format whose fields a row has; None when no format fits."""
    if not isinstance(row, Mapping):
        return None
    for name, needed in _SIGNATURES:
        if all(any(field in row for field in either.split("|")) for either in needed):
            return name
    return None


_SIGNATURES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("messages", ("messages",)),
    ("sharegpt", ("conversations",)),
    ("pesc", ("conversation",)),
    ("query_response", ("query", "response")),
    ("problem_solution", ("problem", "solution")),
    ("alpaca", ("instruction", "output")),
    ("instruction_response", ("instruction", "response")),
    ("multiple_choice", ("question", "options|choices")),
    ("question_answer", ("question", "answer")),
)


def _check_turns(messages: tuple[Message, ...], field: str) -> None:
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
        if message.role != "assistant" and message.role != "system" and not message.content:
            raise RowError(field, f"has an empty turn of the {message.role} (turn {index + 1})")


def _clean(value: Any, field: str) -> str:
    """A text with Unix line ends and without white space around it.  Raises RowError for anything else."""
    if isinstance(value, list) and value and all(isinstance(part, Mapping) for part in value):
        value = "".join(_part(part, field) for part in value)
    if not isinstance(value, str):
        raise RowError(field, "is empty" if value is None else f"is a {type(value).__name__}, not a text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise RowError(field, "is not valid Unicode (a lone surrogate)") from None
    return value.replace("\r\n", "\n").strip()


def _part(part: Mapping[str, Any], field: str) -> str:
    """A text part of a multi-part content."""
    text = part.get("text", part.get("value"))
    if part.get("type", "text") != "text" or not isinstance(text, str):
        raise RowError(field, f"has a part of type {part.get('type')!r}; only texts can be trained on")
    return text


def _required(row: Mapping[str, Any], field: str) -> str:
    if field not in row:
        raise RowError(field, "is missing")
    text = _clean(row[field], field)
    if not text:
        raise RowError(field, "is empty")
    return text


def _optional(row: Mapping[str, Any], field: str) -> str:
    value = row.get(field)
    return "" if value is None else _clean(value, field)


def _plain(*turns: Message) -> Parsed:
    """Turns whose user contents are the bare questions."""
    return Parsed(tuple(turns), tuple(turn.content for turn in turns if turn.role == "user"))


def _with_system(system: str, turns: list[Message]) -> Parsed:
    if system and (not turns or turns[0].role != "system"):
        turns = [Message("system", system), *turns]
    elif turns and turns[0].role == "system" and not turns[0].content:
        turns = turns[1:]
    return _plain(*turns)


def _turns(row: Mapping[str, Any], field: str) -> Parsed:
    if not isinstance(row.get(field), list):
        raise RowError(field, "is missing" if field not in row else "is not a list of turns")
    turns = []
    for index, turn in enumerate(row[field], start=1):
        if not isinstance(turn, Mapping):
            raise RowError(field, f"holds a {type(turn).__name__} as turn {index}")
        role, content = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
        if role not in ROLES:
            raise RowError(field, f"has the unknown role {role!r} (turn {index})")
        turns.append(Message(ROLES[role], _clean(content, f"{field}[{index - 1}]")))
    system, tools = _optional(row, "system"), row.get("tools")
    if tools:
        listing = tools if isinstance(tools, str) else json.dumps(tools, ensure_ascii=False, sort_keys=True)
        first = turns.pop(0).content if turns and turns[0].role == "system" else ""
        system = "\n\n".join(part for part in (system or first, f"Tools:\n{listing.strip()}") if part)
    return _with_system(system, turns)


def _pesc(row: Mapping[str, Any]) -> Parsed:
    rounds = row.get("conversation")
    if not isinstance(rounds, list) or not all(isinstance(item, Mapping) for item in rounds):
        raise RowError("conversation", "is not a list of {input, output}")
    turns = []
    for item in rounds:
        turns += [Message("user", _required(item, "input")), Message("assistant", _required(item, "output"))]
    return _with_system(_optional(row, "instruction"), turns)


def _pair(prompt: str, answer: str) -> Callable[[Mapping[str, Any]], Parsed]:
    def parse(row: Mapping[str, Any]) -> Parsed:
        return _plain(Message("user", _required(row, prompt)), Message("assistant", _required(row, answer)))

    return parse


def _alpaca(row: Mapping[str, Any]) -> Parsed:
    prompt = "\n\n".join(part for part in (_required(row, "instruction"), _optional(row, "input")) if part)
    return _plain(Message("user", prompt), Message("assistant", _required(row, "output")))


def _question_answer(row: Mapping[str, Any]) -> Parsed:
    passage = _optional(row, "passage") or _optional(row, "context")
    question = "\n".join(part for part in (passage, _required(row, "question")) if part)
    answer = row.get("answer")
    row = {**row, "answer": answer[0]} if isinstance(answer, list) and answer else row
    return _plain(Message("user", question), Message("assistant", _required(row, "answer")))


def _multiple_choice(row: Mapping[str, Any]) -> Parsed:
    question = _required(row, "question")
    options = _options(row)
    answer = _answer(row, options)
    user = question + "\n" + "\n".join(f"{label}. {text}" for label, text in options)
    return Parsed((Message("user", user), Message("assistant", answer)), (question,))


def _options(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(label, text) of each option, from lines `A. text`, a list of texts, or {text: [...], label: [...]}."""
    field = "options" if "options" in row else "choices"
    value = row.get(field)
    if isinstance(value, str):
        pairs = re.findall(r"^\s*([A-Z0-9])[.):]\s*(.*\S)", value, flags=re.MULTILINE)
    elif isinstance(value, Mapping) and isinstance(value.get("text"), list):
        labels = value.get("label") or [chr(ord("A") + index) for index in range(len(value["text"]))]
        pairs = list(zip(map(str, labels), map(str, value["text"]), strict=False))
    elif isinstance(value, list):
        pairs = [(chr(ord("A") + index), str(text)) for index, text in enumerate(value)]
    else:
        raise RowError(field, "is missing" if field not in row else "is not a list of options")
    if len(pairs) < 2:
        raise RowError(field, "has fewer than two options")
    return [(label, _clean(text, field)) for label, text in pairs]


def _answer(row: Mapping[str, Any], options: list[tuple[str, str]]) -> str:
    """The right option's line, from that line, its label, its text, or its index."""
    field = "answer" if "answer" in row else "answerKey"
    if field not in row:
        raise RowError("answer", "is missing")
    value = row[field]
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(options):
        label, text = options[value]
        return f"{label}. {text}"
    given = _required(row, field)
    for label, text in options:
        if given in (label, text, f"{label}. {text}", f"{label}) {text}"):
            return f"{label}. {text}"
    raise RowError(field, f"is {given[:60]!r}, which is not one of the options")


PARSERS: dict[str, Callable[[Mapping[str, Any]], Parsed]] = {
    "sharegpt": lambda row: _turns(row, "conversations"),
    "messages": lambda row: _turns(row, "messages"),
    "pesc": _pesc,
    "alpaca": _alpaca,
    "query_response": _pair("query", "response"),
    "problem_solution": _pair("problem", "solution"),
    "instruction_response": _pair("instruction", "response"),
    "python_functions": _pair("instruction", "response"),
    "multiple_choice": _multiple_choice,
    "question_answer": _question_answer,
}
TURN_FIELDS = {"sharegpt": "conversations", "messages": "messages", "pesc": "conversation"}
