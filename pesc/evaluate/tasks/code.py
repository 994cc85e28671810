"""Code benchmarks: from a model's text to a program, and from the program to pass or fail in the sandbox.

lm-eval runs a task's filter once over all answers: `run_*` execute them in parallel there and hand an outcome per answer to `score`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pesc.evaluate.sandbox import run_programs

Document = dict[str, Any]

MBPP_EXAMPLES: tuple[Document, ...] = (
    {
        "task_id": 2,
        "text": "Write a function to find the similar elements from the given two tuple lists.",
        "code": "def similar_elements(test_tup1, test_tup2):\r\n  res = tuple(set(test_tup1) & set(test_tup2))\r\n  return (res) ",
        "test_list": [
            "assert similar_elements((3, 4, 5, 6),(5, 7, 4, 10)) == (4, 5)",
            "assert similar_elements((1, 2, 3, 4),(5, 4, 3, 7)) == (3, 4)",
            "assert similar_elements((11, 12, 14, 13),(17, 15, 14, 13)) == (13, 14)",
        ],
        "is_fewshot": True,
    },
    {
        "task_id": 3,
        "text": "Write a python function to identify non-prime numbers.",
        "code": "import math\r\ndef is_not_prime(n):\r\n    result = False\r\n"
        "    for i in range(2,int(math.sqrt(n)) + 1):\r\n        if n % i == 0:\r\n            result = True\r\n    return result",
        "test_list": ["assert is_not_prime(2) == False", "assert is_not_prime(10) == True", "assert is_not_prime(35) == True"],
        "is_fewshot": True,
    },
    {
        "task_id": 4,
        "text": "Write a function to find the largest integers from a given list of numbers using heap queue algorithm.",
        "code": "import heapq as hq\r\ndef heap_queue_largest(nums,n):\r\n  largest_nums = hq.nlargest(n, nums)\r\n  return largest_nums",
        "test_list": [
            "assert heap_queue_largest( [25, 35, 22, 85, 14, 65, 75, 22, 58],3)==[85, 75, 65] ",
            "assert heap_queue_largest( [25, 35, 22, 85, 14, 65, 75, 22, 58],2)==[85, 75] ",
            "assert heap_queue_largest( [25, 35, 22, 85, 14, 65, 75, 22, 58],5)==[85, 75, 65, 58, 35]",
        ],
        "is_fewshot": True,
    },
)
"""The three solved problems that lm-eval's own mbpp task shows (Austin et al. 2021, problems 2 to 4)."""


def list_mbpp_examples() -> list[Document]:
    """The few-shot examples of `pesc_mbpp`, in order."""
    return [dict(example) for example in MBPP_EXAMPLES]


def humaneval_program(answer: str, doc: Document) -> str:
    """Prompt, answer, the problem's checks, and the call of them (as lm-eval's humaneval)."""
    return f"{doc['prompt']}{answer}\n{doc['test']}\ncheck({doc['entry_point']})\n"


def humaneval_instruct_program(answer: str, doc: Document) -> str:
    """As `humaneval_program`, for an answer that ends its code block."""
    return humaneval_program(answer.partition("```")[0], doc)


def mbpp_program(answer: str, doc: Document) -> str:
    """The answer, what the problem's tests need beside it, and its three assertions.

    lm-eval's mbpp leaves `test_setup_code` out; without it the reference solution of problem 367 does not pass.
    """
    return "\n".join([answer, doc.get("test_setup_code") or "", *doc["test_list"][:3]]) + "\n"


def _run(build: Callable[[str, Document], str], responses: Sequence[Sequence[str]], docs: Sequence[Document]) -> list[list[dict[str, str]]]:
    programs = [build(answer, doc) for answers, doc in zip(responses, docs, strict=True) for answer in answers]
    outcomes = iter(run_programs(programs))
    return [[{"status": (outcome := next(outcomes)).status, "reason": outcome.reason} for _ in answers] for answers in responses]


def run_humaneval(responses: Sequence[Sequence[str]], docs: Sequence[Document]) -> list[list[dict[str, str]]]:
    """Outcome of each answer, in order."""
    return _run(humaneval_program, responses, docs)


def run_humaneval_instruct(responses: Sequence[Sequence[str]], docs: Sequence[Document]) -> list[list[dict[str, str]]]:
    """Outcome of each answer, in order."""
    return _run(humaneval_instruct_program, responses, docs)


def run_mbpp(responses: Sequence[Sequence[str]], docs: Sequence[Document]) -> list[list[dict[str, str]]]:
    """Outcome of each answer, in order."""
    return _run(mbpp_program, responses, docs)


def score(doc: Document, results: Sequence[Sequence[dict[str, str]]]) -> dict[str, float]:
    """lm-eval's `process_results`: pass@1 of one problem, the share of its answers that passed."""
    outcomes = results[0]
    return {"pass@1": sum(outcome["status"] == "passed" for outcome in outcomes) / len(outcomes)}
