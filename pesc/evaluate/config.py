"""Settings of `evaluate` and `report`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from pesc.evaluate.suites import expand
from pesc.stage import StageConfig


class BenchmarkConfig(StageConfig):
    """One benchmark: an lm-eval task with its settings.  `evaluate[ARM/NAME]` runs it."""

    task: str = Field(description="lm-eval task: mmlu, gsm8k, humaneval, or one of this package's offline tasks (pesc_*).")
    metric: str | None = Field(
        default=None,
        description="Metric that the tables show, as lm-eval names it: acc, acc_norm, exact_match, pass@1. None: acc_norm "
        "where the task has it, else its first.",
    )
    filter: str | None = Field(default=None, description="lm-eval filter of the metric, e.g. strict-match.")
    num_fewshot: int | None = Field(default=None, ge=0, description="Solved examples in the prompt. None: as the task says.")
    limit: int | None = Field(default=None, gt=0, description="Use only the first N items of each (sub)task; marked in every table.")
    source: str | None = Field(default=None, description="Name of a source that holds the items, for machines without the hub.")
    files: dict[str, str] = Field(default_factory=dict, description="Split -> file inside the source, replacing the task's own data.")
    apply_chat_template: bool = Field(default=False, description="Ask through the model's chat template.")
    max_gen_toks: int | None = Field(default=None, gt=0, description="Longest generation in tokens. None: as the task says.")
    dtype: Literal["bfloat16", "float32"] = Field(default="bfloat16", description="Of the weights and the computation.")
    engine: Literal["transformers", "vllm"] = Field(
        default="transformers",
        exclude_if=lambda engine: engine == "transformers",  # so that the keys and results from before there was a choice stay
        description="Who computes. vllm: a server of vLLM ($PESC_VLLM), faster at long generations on a GPU; its numbers differ in the "
        "last digits, hence have a key of their own.",
    )
    seed: int = Field(default=1234, ge=0, description="Of the examples in the prompt.")
    baseline: str | None = Field(
        default=None, description="Row of the published figures (pesc/evaluate/baselines/figures.yaml). None: by the task."
    )


class EvaluateConfig(StageConfig):
    """The benchmarks of a recipe, by the name used in addresses.

    A recipe may also say `suites`, `tasks`, `limit`, `engine` and `data` (see `pesc.evaluate.suites`); they are turned into benchmarks when it is
    read.
    """

    benchmarks: dict[str, BenchmarkConfig] = Field(min_length=1, description="Name -> an lm-eval task and its settings.")

    @model_validator(mode="before")
    @classmethod
    def _expand(cls, raw: Any) -> Any:
        return expand(raw) if isinstance(raw, Mapping) else raw


class Question(StageConfig):
    """One comparison that was chosen before the runs: is the arm's held-out loss lower than the control's?"""

    arm: str = Field(description="Arm that is asked about, by the name of its first run.")
    control: str = Field(description="Arm that it is compared with, by the name of its first run.")
    asks: str = Field(default="", description="The question in words.")


class Preregistration(StageConfig):
    """What counts as better, written down before the runs.  The measure is the mean over the domains of the held-out loss."""

    primary: Question = Field(description="The question that decides.")
    secondary: tuple[Question, ...] = Field(default=(), description="Further questions; their p-values are adjusted together (Holm).")
    smallest_difference: float = Field(
        gt=0, description="Nats per token. A difference whose whole 95 % interval is smaller than this either way counts as none."
    )
    note: str = Field(default="", description="What else was settled beforehand.")

    @property
    def questions(self) -> tuple[Question, ...]:
        """The primary one first."""
        return (self.primary, *self.secondary)


class ReportConfig(StageConfig):
    """What the report shows."""

    title: str = Field(default="", description="Heading of the page. Default: what is compared.")
    baselines: tuple[str, ...] = Field(default=("gpt-3.5",), description="Columns of published figures beside the measured ones.")
    control_arm: str = Field(default="qlora", description="Arm that the others are compared with.")
    replicates: dict[str, tuple[str, ...]] = Field(
        default_factory=dict,
        description="Arm -> arms that are the same trained with other seeds; their spread enters the verdict between arms.",
    )
    preregistration: Preregistration | None = Field(
        default=None,
        exclude_if=lambda questions: questions is None,  # so that the keys from before there was a choice stay
        description="Questions about held-out losses that were chosen before the runs, and what decides them. Needs heldout.enabled and arms "
        "with replicates.",
    )
    samples_per_benchmark: int = Field(default=3, ge=0, description="Items shown in full on the page.")


class FilledReportConfig(ReportConfig):
    """What the report stage is given: the recipe's block, and what the graph knows."""

    expected: tuple[str, ...] = Field(default=(), description="Addresses of all benchmarks of the recipe; one without a result is a hole.")
