"""Suites: what a recipe's `evaluate` block may say instead of every benchmark's settings.

    evaluate:
      suites: [pesc-paper, chat]          benchmarks with their settings, from suites.yaml
      tasks: [boolq, lambada_openai]      any tasks of lm-eval, as they are; the name is the task's
      limit: 100                          the first 100 items of each (sub)task, where a benchmark says nothing else
      engine: vllm                        who computes (transformers or vllm), where a benchmark says nothing else
      data: {mmlu: {source: S, files: {test: a.jsonl, dev: b.jsonl}}}     items of a lm-eval task from files
      benchmarks: {math: {limit: 50}}     own benchmarks, and changes to the ones above

They are turned into plain benchmarks when the recipe is read, so that two recipes that mean the same have the same fingerprints.
Imports neither torch nor lm_eval.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterable, Mapping
from importlib import resources
from typing import Any

import yaml

Rows = dict[str, dict[str, Any]]
SHORTHAND = ("suites", "tasks", "limit", "engine", "data")


@functools.lru_cache(maxsize=1)
def read_suites() -> dict[str, Rows]:
    """Every suite: benchmark name -> settings."""
    text = resources.files("pesc.evaluate").joinpath("suites.yaml").read_text(encoding="utf-8")
    return yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def expand(raw: Mapping[str, Any]) -> dict[str, Any]:
    """An `evaluate` block without `suites`, `tasks`, `limit`, `engine` and `data`; what else it has stays.

    Raises ValueError, as pydantic's validators do, for an unknown suite, a value of another form, or data that no benchmark reads.
    """
    if not any(key in raw for key in SHORTHAND):
        return dict(raw)
    rows: Rows = {}
    for suite in _names(raw, "suites"):
        for name, row in _suite(suite).items():
            if rows.get(name, row) != row:
                raise ValueError(f"suite {suite} has another benchmark {name!r} than the suites before it; take one of them")
            rows[name] = dict(row)
    rows |= {name.replace("_", "-").lower(): {"task": name} for name in _names(raw, "tasks")}
    own = _map(raw, "benchmarks")
    for name, row in own.items():
        rows[name] = {**rows.get(name, {}), **row} if isinstance(row, Mapping) else row
    _add_data(rows, _map(raw, "data"))
    for key in ("limit", "engine"):
        if raw.get(key) is not None:
            rows = {name: {key: raw[key], **row} if isinstance(row, Mapping) else row for name, row in rows.items()}
    return {**{key: value for key, value in raw.items() if key not in SHORTHAND}, "benchmarks": rows}


def _suite(name: str) -> Rows:
    suites = read_suites()
    if name not in suites:
        close = difflib.get_close_matches(name, suites, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ValueError(f"there is no suite {name!r}{hint}; suites: {', '.join(suites)}")
    return suites[name]


def _names(raw: Mapping[str, Any], key: str) -> Iterable[str]:
    names = raw.get(key) or ()
    if isinstance(names, str) or not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{key} must be a list of names, not {names!r}")
    return names


def _map(raw: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = raw.get(key) or {}
    if not isinstance(value, Mapping):
        raise ValueError(f"{key} must be a map, not {value!r}")
    return value


def _add_data(rows: Rows, data: Mapping[str, Any]) -> None:
    """Give the benchmarks of each task its files, where they name no source of their own."""
    for task, place in data.items():
        if not isinstance(place, Mapping):
            raise ValueError(f"data.{task} must be a map of source and files, not {place!r}")
        readers = [name for name, row in rows.items() if isinstance(row, Mapping) and row.get("task") == task]
        if not readers:
            raise ValueError(f"data names the task {task!r}, which no benchmark of this recipe has")
        for name in readers:
            rows[name] = {**place, **rows[name]}
