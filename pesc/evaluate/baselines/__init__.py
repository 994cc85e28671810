"""Published figures, each with its source and settings, from figures.yaml.

Promise: no number without a source, a metric and a number of examples (null where the source does not say). Pitfall: these come from
other harnesses and prompts; `pesc.evaluate.comparison` says for each whether a measured number may be compared with it.
"""

from __future__ import annotations

import difflib
from functools import lru_cache
from importlib import resources
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pesc.errors import EvaluationError

Method = Literal["answer alone", "chain of thought"]


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class BenchmarkEntry(_Entry):
    """A row: one benchmark, and the tasks that ask its questions."""

    name: str
    items: int = Field(gt=0, description="Questions in the full evaluated split.")
    tasks: tuple[str, ...] = Field(description="lm-eval tasks that measure it.")
    partial_tasks: tuple[str, ...] = Field((), description="Tasks over another selection of its questions.")
    method: Method = Field("answer alone", description="How the tasks' solved examples answer: at once, or step by step.")


class SystemEntry(_Entry):
    """A column: one published system."""

    name: str
    kind: Literal["proprietary", "open", "paper"]
    note: str = ""


class Figure(_Entry):
    """One published number, in percent unless the metric says otherwise."""

    system: str
    benchmark: str
    value: float
    shots: int | None = Field(ge=0, description="Solved examples in the prompt; null where the source does not say.")
    metric: str
    source: str = Field(min_length=10)
    date: str = Field(pattern=r"^\d{4}-\d{2}$")
    note: str = ""
    method: Method | None = Field(None, description="How the system was asked to answer; null where the source does not say.")
    never: str = Field("", description="Why no measured score is comparable with this figure; empty when one can be.")


class Baselines(_Entry):
    """All rows, columns and figures."""

    benchmarks: dict[str, BenchmarkEntry]
    systems: dict[str, SystemEntry]
    figures: tuple[Figure, ...]

    @model_validator(mode="after")
    def _references_exist_once(self) -> Baselines:
        seen = set()
        for figure in self.figures:
            if figure.system not in self.systems or figure.benchmark not in self.benchmarks:
                raise ValueError(f"a figure names {figure.system!r} on {figure.benchmark!r}, which are not both listed")
            if (figure.system, figure.benchmark) in seen:
                raise ValueError(f"two figures for {figure.system!r} on {figure.benchmark!r}")
            seen.add((figure.system, figure.benchmark))
        return self

    def row_of_task(self, task: str) -> str | None:
        """The row that a task measures, whole or in part."""
        return next((name for name, row in self.benchmarks.items() if task in (*row.tasks, *row.partial_tasks)), None)

    def figure(self, system: str, benchmark: str) -> Figure | None:
        """One number, or None where the source has none."""
        return next((f for f in self.figures if (f.system, f.benchmark) == (system, benchmark)), None)

    def require_system(self, name: str) -> SystemEntry:
        """The column's entry.  Raises EvaluationError with the nearest name."""
        if name not in self.systems:
            close = difflib.get_close_matches(name, self.systems, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise EvaluationError(f"report.baselines names {name!r}, which has no figures.{hint} There are: {', '.join(self.systems)}.")
        return self.systems[name]

    def require_row(self, name: str) -> BenchmarkEntry:
        """The row's entry.  Raises EvaluationError with the nearest name."""
        if name not in self.benchmarks:
            close = difflib.get_close_matches(name, self.benchmarks, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise EvaluationError(
                f"A benchmark's baseline is {name!r}, which is no row of the published figures.{hint} Rows: {', '.join(self.benchmarks)}."
            )
        return self.benchmarks[name]


@lru_cache(maxsize=1)
def load_baselines() -> Baselines:
    """The figures that ship with the package.  Raises EvaluationError when the file is damaged."""
    text = (resources.files("pesc.evaluate.baselines") / "figures.yaml").read_text(encoding="utf-8")
    raw = yaml.safe_load(text)
    figures = [
        {
            "system": table["system"],
            "benchmark": benchmark,
            **{key: table[key] for key in ("source", "date", "note") if key in table},
            **figure,
        }
        for table in raw.pop("tables")
        for benchmark, figure in table["figures"].items()
    ]
    try:
        return Baselines.model_validate({**raw, "figures": figures})
    except ValidationError as error:
        raise EvaluationError(
            f"The published figures (figures.yaml) cannot be used: {error.errors()[0]['loc']}: {error.errors()[0]['msg']}."
        ) from None
