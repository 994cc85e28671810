"""What one evaluation found: the schema of results.json and of the lines of samples.jsonl.

Nothing in it depends on when or where the evaluation ran. Times and hardware are in the stage's manifest.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pesc.errors import EvaluationError
from pesc.evaluate.config import BenchmarkConfig

SCHEMA_VERSION = 2


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelFacts(_Record):
    """What was evaluated, from the model's own configuration."""

    kind: Literal["pesc", "dense"]
    model_type: str
    parameters: int = Field(description="All parameters, tied ones counted once.")
    hidden_size: int | None = None
    num_layers: int | None = None
    pesc: dict[str, Any] | None = Field(None, description="The sparse model's own block: experts, top_k, adapter_dim.")


def model_facts(settings: Mapping[str, Any], parameters: int) -> ModelFacts:
    """Facts of config.json, and the number of parameters."""
    text, block = settings.get("text_config") or settings, settings.get("pesc")
    return ModelFacts(
        kind="pesc" if block else "dense", model_type=str(settings.get("model_type")), parameters=parameters,
        hidden_size=text.get("hidden_size"), num_layers=text.get("num_hidden_layers"), pesc=block,
    )  # fmt: skip


class Measurement(_Record):
    """One metric over all items."""

    metric: str
    filter: str
    value: float
    stderr: float | None
    higher_is_better: bool


class TaskResult(_Record):
    """One leaf task, as lm-eval aggregated it."""

    task: str
    version: str
    task_hash: str = Field(description="SHA-256 over the digests of items, prompts and targets, in order.")
    num_items: int
    num_available: int
    num_fewshot: int
    output_type: str
    measurements: tuple[Measurement, ...]


class BenchmarkResult(_Record):
    """results.json of one benchmark of one arm."""

    schema_version: int = SCHEMA_VERSION
    task: str
    task_version: str
    metric: str
    filter: str
    value: float
    stderr: float | None
    higher_is_better: bool
    num_items: int
    num_available: int
    num_correct: int | None = Field(description="Items with a score of 1, when every score is 0 or 1.")
    num_fewshot: int
    limit: int | None
    task_hash: str
    chat_template_sha256: str | None
    generation: dict[str, Any] | None = Field(description="Decoding settings of generating tasks.")
    num_truncated: int = Field(0, description="Items with a generation that ended at its longest length, before the model ended it.")
    num_cut_prompts: int = Field(0, description="Items whose prompt was longer than the model's positions and lost its beginning.")
    measurements: tuple[Measurement, ...]
    tasks: tuple[TaskResult, ...]
    model: ModelFacts
    settings: BenchmarkConfig
    lm_eval_version: str
    engine_version: str | None = Field(
        default=None, exclude_if=lambda version: version is None, description="What answered, where it was not transformers: vllm 0.32.0."
    )

    @property
    def is_subset(self) -> bool:
        """True when not every item of the task was asked."""
        return self.num_items < self.num_available


class Sample(_Record):
    """One item as it was asked, answered and scored.  score: the metric of this item; correct: 1 or 0 when it is one of both.

    truncated, prompt_cut: as in `BenchmarkResult.num_truncated` and `num_cut_prompts`.
    """

    task: str
    doc_id: int
    doc_hash: str
    prompt_hash: str
    target_hash: str
    question: str
    choices: tuple[str, ...] = ()
    target: Any
    responses: tuple[Any, ...]
    outcome: Any = Field(None, description="What a filter made of the response: the extracted answer, or the sandbox's verdict.")
    score: float | None
    correct: Literal[0, 1] | None
    truncated: bool = False
    prompt_cut: bool = False

    @property
    def key(self) -> tuple[str, str]:
        """Names the item across arms: task and digest of the item."""
        return self.task, f"{self.doc_id}:{self.doc_hash}"


def write_results(folder: Path, result: BenchmarkResult, samples: Iterable[Sample]) -> None:
    """Write results.json and samples.jsonl."""
    (folder / "results.json").write_text(_dump(result.model_dump(mode="json"), indent=2) + "\n", encoding="utf-8")
    with (folder / "samples.jsonl").open("w", encoding="utf-8") as file:
        for sample in samples:
            file.write(_dump(sample.model_dump(mode="json")) + "\n")


def _dump(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True, indent=indent, allow_nan=False)


def read_result(folder: Path) -> BenchmarkResult:
    """Read results.json.  Raises EvaluationError when it is absent or of another schema."""
    try:
        return BenchmarkResult.model_validate_json((folder / "results.json").read_bytes())
    except FileNotFoundError:
        raise EvaluationError("An evaluate object has no results.json; run that evaluation again.") from None
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise EvaluationError(
            f"results.json of an evaluation has an unusable field {field} ({first['msg']}); run that evaluation again."
        ) from None


def read_samples(folder: Path) -> Iterator[Sample]:
    """Lines of samples.jsonl, in order."""
    with (folder / "samples.jsonl").open(encoding="utf-8") as file:
        for line in file:
            yield Sample.model_validate_json(line)
