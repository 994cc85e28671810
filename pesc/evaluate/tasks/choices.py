"""Multiple-choice rows of the form {question, options "A. ..\\nB. ..", answer "B. text"}."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from pesc.errors import EvaluationError

if TYPE_CHECKING:
    from datasets import Dataset

_LETTER = re.compile(r"^([A-Z])\.[ \t]?", re.MULTILINE)


def split_options(options: str) -> list[str]:
    """Texts of the options, in order.  A line belongs to the option whose next expected letter opened last.

    Raises EvaluationError when no "A." begins the text.
    """
    starts: list[re.Match[str]] = []
    for match in _LETTER.finditer(options):
        if match[1] == chr(ord("A") + len(starts)):
            starts.append(match)
    if len(starts) < 2 or options[: starts[0].start()].strip():
        raise EvaluationError(f"Options {options[:60]!r} are not of the form 'A. ..\\nB. ..'; use a file with that column.")
    ends = [*(match.start() for match in starts[1:]), len(options)]
    return [options[match.end() : end].strip() for match, end in zip(starts, ends, strict=True)]


def parse_choice(row: dict[str, Any]) -> dict[str, Any]:
    """One row as {question, choices, gold}.  Raises EvaluationError naming the row's question and what is wrong."""
    try:
        question, options, answer = row["question"], row["options"], row["answer"]
    except KeyError as error:
        raise EvaluationError(
            f"A benchmark row has no {error.args[0]!r} field (it has {', '.join(row)}); this task reads question, options, answer."
        ) from None
    choices = split_options(options)
    gold = ord(answer.strip()[:1] or "?") - ord("A")
    if not 0 <= gold < len(choices):
        raise EvaluationError(
            f"The answer {answer[:30]!r} of {question[:60]!r} does not begin with the letter of one of {len(choices)} options."
        )
    return {"question": question.strip(), "choices": choices, "gold": gold}


def process_choices(dataset: Dataset) -> Dataset:
    """lm-eval's `process_docs` of the choice tasks: file order is kept, so `limit: N` means the first N rows."""
    return type(dataset).from_list([parse_choice(dict(row)) for row in dataset])


def process_four_choices(dataset: Dataset) -> Dataset:
    """As `process_choices`, for tasks whose prompt shows exactly four options."""
    parsed = process_choices(dataset)
    for row in map(dict, parsed):
        if len(row["choices"]) != 4:
            raise EvaluationError(f"{row['question'][:60]!r} has {len(row['choices'])} options; pesc_mmlu reads rows with four.")
    return parsed
