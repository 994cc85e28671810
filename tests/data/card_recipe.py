"""Recipes over local files whose data stages take seconds: what data cards are made of in the tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.data.builders import tiny_tokenizer, write_jsonl

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ARMS = {"arms": {"base": {"method": "dense"}}, "evaluate": {"benchmarks": {"quiz": {"task": "arc_easy", "metric": "acc"}}}}


def save_tokenizer(folder: Path) -> Path:
    """A model directory that holds a tokenizer alone."""
    tiny_tokenizer(CHATML).save_pretrained(str(folder))
    return folder


def shared_recipe(shared: Path, base: Path) -> dict[str, Any]:
    """The 500 real rows of the published sample in their hub schemas, and some that duplicate or leak, against real benchmarks."""
    data = shared / "data"
    folder = {"uri": str(data / "instructions"), "license": "MIT / Apache-2.0"}
    sets = {"slimorca": "general", "magicoder_evol_instruct": "code", "magicoder_oss_instruct": "code", "metamathqa": "math"}
    datasets: dict[str, Any] = {
        name: {"source": "instructions", "files": [f"{name}.jsonl"], "domain": domain} for name, domain in sets.items()
    }
    gsm8k = {"source": "benchmarks", "domain": "math", "format": "question_answer", "max_rows": 40}
    again = {"source": "instructions", "files": ["pesc_example_500.json"], "domain": "general", "format": "pesc"}
    return {
        "name": "real-rows",
        "description": "The published sample of 500 rows, and forty benchmark rows that must go",
        "base": "base",
        "sources": {
            "base": {"uri": str(base)},
            "instructions": folder,
            "benchmarks": {"uri": str(data / "benchmarks"), "license": "MIT", "include": ["gsm8k_test.jsonl", "math_test.jsonl", "humaneval_test.jsonl"]},
        },
        "dedup": {
            "datasets": {**datasets, "gsm8k-leak": {**gsm8k, "files": ["gsm8k_test.jsonl"]}, "sample-again": again},
            "max_duplicate_share": 1.0,
            "benchmarks": {
                "gsm8k": {"source": "benchmarks", "files": ["gsm8k_test.jsonl"], "fields": ["question"]},
                "math": {"source": "benchmarks", "files": ["math_test.jsonl"], "fields": ["problem"]},
                "humaneval": {"source": "benchmarks", "files": ["humaneval_test.jsonl"], "fields": ["prompt"]},
            },
        },
        "mix": {"total": 400, "weights": {"general": 3, "code": 1, "math": 1}},
        "tokenize": {"context_length": 2048},
        **ARMS,
    }  # fmt: skip


def small_recipe(folder: Path, questions: list[str], **changes: Any) -> dict[str, Any]:
    """Rows that ask these questions, in one data set `rows` of the domain `general`."""
    write_jsonl(folder / "rows" / "rows.jsonl", [{"query": text, "response": f"{text} Answer {n}."} for n, text in enumerate(questions)])
    return {
        "name": "small",
        "base": "base",
        "sources": {"base": {"uri": str(save_tokenizer(folder / "base"))}, "rows": {"uri": str(folder / "rows")}},
        "dedup": {
            "datasets": {"rows": {"source": "rows", "domain": "general"}},
            "max_duplicate_share": 1.0,
            "filters": {"max_malformed_share": 1.0},
        },
        "mix": {"total": len(questions), "weights": {"general": 1}},
        "tokenize": {"context_length": 64},
        **ARMS,
        **changes,
    }
