"""How rows of each known format become turns.

    sharegpt              {conversations: [{from, value}]}; optional system, tools      SlimOrca, SlimOrca-Dedup
    messages              {messages: [{role, content, tool_calls?}]}; optional system, tools
    prompt_completion     {prompt, completion or response}: texts, or lists of messages
    pesc                  {instruction: system, conversation: [{input, output}]}        the reference code's example
    query_response        {query, response}                                             MetaMathQA
    problem_solution      {problem, solution}                                           Magicoder-OSS-Instruct
    alpaca                {instruction, input?, output}
    instruction_response  {instruction, input or context?, response}                    Magicoder-Evol-Instruct
    multiple_choice       {question, options or choices, answer or answerKey}
    question_answer       {question, answer or response, passage or context?}

A row of one question and one answer may also have `system` (or `system_prompt`) and `history`, a list of earlier [question, answer].
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

from pesc.data.turns import Message, Parsed, RowError, clean, optional, plain, read_turns, required, tool_listing, with_system

_SIGNATURES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("messages", ("messages",)),
    ("sharegpt", ("conversations",)),
    ("pesc", ("conversation",)),
    ("query_response", ("query", "response")),
    ("problem_solution", ("problem", "solution")),
    ("alpaca", ("instruction", "output")),
    ("instruction_response", ("instruction", "response")),
    ("prompt_completion", ("prompt", "completion|response")),
    ("multiple_choice", ("question", "options|choices")),
    ("question_answer", ("question", "answer|response")),
)
_TEXT_FIELDS = frozenset({"text", "content", "raw_content"})


def detect_format(row: Any) -> str | None:
    """The format whose fields a row has; None when no format fits.  Fields that are null count only when no format fits without."""
    if not isinstance(row, Mapping):
        return None
    return _match(tuple([name for name, value in row.items() if value is not None])) or _match(tuple(row))


@functools.lru_cache(maxsize=4096)
def _match(fields: tuple[str, ...]) -> str | None:
    for name, needed in _SIGNATURES:
        if all(any(field in fields for field in either.split("|")) for either in needed):
            return name
    return None


def no_format(row: Mapping[str, Any]) -> RowError:
    """What to say of a row that has the fields of no format."""
    held = [name for name, value in row.items() if value is not None]
    texts = [name for name in held if name in _TEXT_FIELDS]
    if len(held) == 1 and texts:
        return RowError(texts[0], "is a plain text without an answer, which is not an instruction; name a set of instructions")
    for name, needed in _SIGNATURES:
        missing = [either for either in needed if not any(field in row for field in either.split("|"))]
        if held and set(held) <= {field for either in needed for field in either.split("|")}:
            return RowError(missing[0].replace("|", "' or '"), f"is missing (a row of the format {name})")
    return RowError("row", f"has the fields of no known format ({', '.join(sorted(map(str, row)))[:200]})")


def _chat(field: str) -> Callable[[Mapping[str, Any]], Parsed]:
    def parse(row: Mapping[str, Any]) -> Parsed:
        turns = read_turns(row, field)
        return plain(_introduce(row, turns) if "system" in row or "tools" in row or turns[:1] == _EMPTY_SYSTEM else turns)

    return parse


_EMPTY_SYSTEM = [Message("system", "")]


def _introduce(row: Mapping[str, Any], turns: list[Message]) -> list[Message]:
    """Turns behind the system prompt and the tools of their row."""
    turns = with_system(optional(row, "system"), turns)
    if tools := tool_listing(row):
        own, turns = (turns[0].content, turns[1:]) if turns and turns[0].role == "system" else ("", turns)
        turns = [Message("system", "\n\n".join(part for part in (own, tools) if part)), *turns]
    return turns


def _prompt_completion(row: Mapping[str, Any]) -> Parsed:
    answer = "completion" if row.get("completion") is not None or "response" not in row else "response"
    turns = []
    for field, role in (("prompt", "user"), (answer, "assistant")):
        value = row.get(field)
        listed = isinstance(value, list) and value and isinstance(value[0], Mapping) and ("role" in value[0] or "from" in value[0])
        turns += read_turns(row, field) if listed else [Message(role, required(row, field))]
    return plain(_introduce(row, turns))


def _pesc(row: Mapping[str, Any]) -> Parsed:
    rounds = row.get("conversation")
    if not isinstance(rounds, list) or not all(isinstance(item, Mapping) for item in rounds):
        raise RowError("conversation", "is not a list of {input, output}")
    turns = []
    for item in rounds:
        turns += [Message("user", required(item, "input")), Message("assistant", required(item, "output"))]
    return plain(with_system(optional(row, "instruction"), turns))


def _exchange(row: Mapping[str, Any], question: str, answer: str) -> Parsed:
    """One question and its answer, behind the row's system prompt and the exchanges before it."""
    turns = [Message("user", question), Message("assistant", answer)]
    if "history" in row and row["history"] is not None:
        turns = [*_history(row["history"]), *turns]
    system = optional(row, "system") or optional(row, "system_prompt")
    return plain([Message("system", system), *turns] if system else turns)


def _history(value: Any) -> list[Message]:
    if not isinstance(value, list):
        raise RowError("history", f"is a {type(value).__name__}, not a list of [question, answer]")
    turns = []
    for pair in value:
        if not isinstance(pair, list) or len(pair) != 2:
            raise RowError("history", "holds something else than a pair [question, answer]")
        turns += [Message("user", clean(pair[0], "history")), Message("assistant", clean(pair[1], "history"))]
    return turns


def _pair(question: str, answer: str) -> Callable[[Mapping[str, Any]], Parsed]:
    return lambda row: _exchange(row, required(row, question), required(row, answer))


def _instruction(answer: str) -> Callable[[Mapping[str, Any]], Parsed]:
    """An instruction with what it is about: `input`, or `context`."""

    def parse(row: Mapping[str, Any]) -> Parsed:
        if "instruction" not in row:
            raise RowError("instruction", "is missing")
        about = optional(row, "input") or optional(row, "context")
        question = optional(row, "instruction")
        question = f"{question}\n\n{about}" if question and about else question or about
        if not question:
            raise RowError("instruction", "is empty")
        return _exchange(row, question, required(row, answer))

    return parse


def _question_answer(row: Mapping[str, Any]) -> Parsed:
    passage = optional(row, "passage") or optional(row, "context")
    question = "\n".join(part for part in (passage, required(row, "question")) if part)
    field = "answer" if row.get("answer") is not None or "response" not in row else "response"
    answer = row.get(field)
    if isinstance(answer, list) and answer and isinstance(answer[0], str):
        row = {**row, field: answer[0]}
    return _exchange(row, question, required(row, field))


def _multiple_choice(row: Mapping[str, Any]) -> Parsed:
    question = required(row, "question")
    options = _options(row)
    answer = _answer(row, options)
    user = question + "\n" + "\n".join(f"{label}. {text}" for label, text in options)
    return Parsed((Message("user", user), Message("assistant", answer)), (question,))


def _options(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(label, text) of each option, from lines `A. text`, a list of texts, or {text: [...], label: [...]}."""
    field = "options" if row.get("options") is not None or "choices" not in row else "choices"
    value = row.get(field)
    labels: Any = None
    if isinstance(value, Mapping) and isinstance(value.get("text"), list):
        labels, value = value.get("label"), value["text"]
        if labels is not None and (not isinstance(labels, list) or len(labels) != len(value)):
            raise RowError(field, "does not have one label for each text")
    if isinstance(value, str):
        pairs = re.findall(r"^[ \t]*([A-Z0-9])[.):][ \t]*(\S.*)", value, flags=re.MULTILINE)
    elif isinstance(value, list):
        labels = labels or [chr(ord("A") + index) for index in range(len(value))]
        pairs = list(zip(map(str, labels), map(str, value), strict=True))
    else:
        raise RowError(field, "is missing" if field not in row else "is not a list of options")
    if len(pairs) < 2:
        raise RowError(field, "has fewer than two options")
    return [(clean(label, field), clean(text, field)) for label, text in pairs]


def _answer(row: Mapping[str, Any], options: list[tuple[str, str]]) -> str:
    """The right option's line, from that line, its label, its text, or its index."""
    field = "answer" if row.get("answer") is not None or "answerKey" not in row else "answerKey"
    if field not in row:
        raise RowError("answer", "is missing")
    value = row[field]
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(options):
        label, text = options[value]
        return f"{label}. {text}"
    given = required(row, field)
    for label, text in options:
        if given in (label, text, f"{label}. {text}", f"{label}) {text}"):
            return f"{label}. {text}"
    raise RowError(field, f"is {given[:60]!r}, which is not one of the options")


PARSERS: dict[str, Callable[[Mapping[str, Any]], Parsed]] = {
    "sharegpt": _chat("conversations"),
    "messages": _chat("messages"),
    "prompt_completion": _prompt_completion,
    "pesc": _pesc,
    "alpaca": _instruction("output"),
    "query_response": _pair("query", "response"),
    "problem_solution": _pair("problem", "solution"),
    "instruction_response": _instruction("response"),
    "python_functions": _pair("instruction", "response"),
    "multiple_choice": _multiple_choice,
    "question_answer": _question_answer,
}
TURN_FIELDS = {"sharegpt": "conversations", "messages": "messages", "pesc": "conversation"}
"""Where to look for turns that are in the wrong order."""
