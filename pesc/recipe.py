"""A recipe: one YAML file that says everything a run depends on.

    name, description          what it is
    sources                    where bytes come from; `base` names the one that is the dense model
    dedup mix tokenize         the instruction mixture
    upcycle train merge        the model
    evaluate routing heldout   the benchmarks, the experts' use, the loss on held-out rows
    report                     the page
    arms                       what is compared: each arm has a method and may override `upcycle` and `train`
    execution                  where and how fast (never in a fingerprint)

`extends: NAME` starts from another recipe: maps are merged, lists and values replaced.  An override `train.learning_rate=2e-4`
is read as YAML and checked by the same models as the file.  Nothing here imports torch.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from pesc.data.config import DedupConfig, MixConfig, SourceConfig, TokenizeConfig
from pesc.errors import RecipeError
from pesc.evaluate.config import EvaluateConfig, ReportConfig
from pesc.heldout.config import HeldOutConfig
from pesc.models.config import MergeConfig, UpcycleConfig
from pesc.redaction import find_secret, redact
from pesc.routing.config import RoutingConfig
from pesc.stage import Execution, StageConfig
from pesc.store.digest import canonical_json
from pesc.train.config import UNQUANTIZED, TrainConfig

C = TypeVar("C", bound=StageConfig)
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the C one reads a recipe ten times faster
NAME = r"^[a-z0-9][a-z0-9_.-]*$"
MAX_NAME = 100
"""Characters of a name; it becomes the name of a directory."""


class ArmConfig(StageConfig):
    """One line of the comparison."""

    method: Literal["pesc", "qlora", "lora", "upcycle-full", "dense"] = Field(
        description="pesc: sparse. qlora: the dense control. lora: the same without quantisation. upcycle-full: each expert a whole FFN, "
        "everything trained. dense: the base as it came."
    )
    upcycle: dict[str, Any] = Field(default_factory=dict, description="Overrides of the recipe's upcycle block.")
    train: dict[str, Any] = Field(default_factory=dict, description="Overrides of the recipe's train block.")


class Recipe(StageConfig):
    """A complete, checked run.  Every value is present: defaults are filled in, overrides applied."""

    name: str = Field(pattern=NAME, max_length=MAX_NAME, description="Name of the run in tables, artifacts and the store's records.")
    description: str = Field(default="", description="What it is, in a line.")
    base: str = Field(description="Name of the source that is the dense model.")
    sources: dict[str, SourceConfig] = Field(min_length=1, description="Name -> where bytes come from.")
    dedup: DedupConfig
    mix: MixConfig
    tokenize: TokenizeConfig = TokenizeConfig()
    upcycle: UpcycleConfig = UpcycleConfig()
    train: TrainConfig = TrainConfig()
    merge: MergeConfig = MergeConfig()
    evaluate: EvaluateConfig
    routing: RoutingConfig = RoutingConfig()
    heldout: HeldOutConfig = HeldOutConfig()
    report: ReportConfig = ReportConfig()
    arms: dict[str, ArmConfig] = Field(min_length=1, description="Name -> what is compared: a method, and overrides of upcycle and train.")
    execution: Execution = Execution()

    @field_validator("sources", "arms")
    @classmethod
    def _names_fit_addresses(cls, value: dict[str, Any]) -> dict[str, Any]:
        _check_names(value)
        return value

    @model_validator(mode="after")
    def _references_exist(self) -> Recipe:
        known = set(self.sources)
        _check_names(self.evaluate.benchmarks)
        references = {"base": self.base}
        references |= {f"dedup.datasets.{name}.source": item.source for name, item in self.dedup.datasets.items()}
        references |= {f"dedup.benchmarks.{name}.source": item.source for name, item in self.dedup.benchmarks.items()}
        if self.dedup.semantic:
            references["dedup.semantic.source"] = self.dedup.semantic.source
        references |= {f"evaluate.benchmarks.{name}.source": item.source for name, item in self.evaluate.benchmarks.items() if item.source}
        for where, source in references.items():
            if source not in known:
                raise ValueError(f"{where} names the source {source!r}, which is not among the sources ({', '.join(sorted(known))})")
        domains = {item.domain for item in self.dedup.datasets.values()}
        if missing := set(self.mix.weights) - domains:
            raise ValueError(
                f"mix.weights names the domain {min(missing)!r}, but no data set has it (there are: {', '.join(sorted(domains))})"
            )
        if unknown := set(self.mix.dataset_weights) - set(self.dedup.datasets):
            raise ValueError(f"mix.dataset_weights names {min(unknown)!r}, which is not among dedup.datasets")
        if "control_arm" in self.report.model_fields_set and self.report.control_arm not in self.arms:
            raise ValueError(
                f"report.control_arm names the arm {self.report.control_arm!r}, which is not among the arms ({', '.join(self.arms)})"
            )
        for arm in self.arms:  # an arm's overrides are checked when the recipe is read, not when its stage runs
            self.upcycle_of(arm)
            self.train_of(arm)
        self._check_replicates()
        if self.heldout.enabled and self.mix.held_out == 0:
            raise ValueError("heldout.enabled measures the rows that mix.held_out keeps out of training, and mix.held_out is 0")
        self._check_questions()
        return self

    def _check_replicates(self) -> None:
        """Further runs of an arm are that arm with another seed: else their spread would be no spread from seed to seed."""
        runs = [*self.report.replicates, *(name for names in self.report.replicates.values() for name in names)]
        if unknown := [name for name in runs if name not in self.arms]:
            raise ValueError(f"report.replicates names the arm {unknown[0]!r}, which is not among the arms ({', '.join(self.arms)})")
        if repeated := [name for name in runs if runs.count(name) > 1]:
            raise ValueError(f"report.replicates names the arm {repeated[0]!r} twice")
        for arm, others in self.report.replicates.items():
            ours = self._settings_of(arm)
            for name in others:
                theirs = self._settings_of(name)
                if different := next((key for key in ours if ours[key] != theirs[key]), None):
                    raise ValueError(
                        f"report.replicates says that {name} is {arm} trained with another seed, but {different} differs "
                        f"({ours[different]!r} and {theirs[different]!r})"
                    )
            seeds = [self.train_of(name).seed for name in (arm, *others)]
            if twice := [seed for seed in seeds if seeds.count(seed) > 1]:
                raise ValueError(
                    f"report.replicates says that {', '.join(others)} are {arm} trained with other seeds, but train.seed {twice[0]} is there twice"
                )

    def _settings_of(self, arm: str) -> dict[str, Any]:
        """Dotted settings that make an arm what it is, without its seeds."""
        parts = {"upcycle": self.upcycle_of(arm), "train": self.train_of(arm)}
        settings = {f"{name}.{key}": value for name, part in parts.items() for key, value in part.model_dump().items() if key != "seed"}
        return {"method": self.arms[arm].method} | settings

    def _check_questions(self) -> None:
        """A pre-registered question that no run could answer is told now."""
        asked = self.report.preregistration
        if asked is None:
            return
        if not self.heldout.enabled:
            raise ValueError("report.preregistration asks about held-out losses, so heldout.enabled must be true")
        for name in (name for question in asked.questions for name in (question.arm, question.control)):
            if name not in self.arms:
                raise ValueError(f"report.preregistration names the arm {name!r}, which is not among the arms ({', '.join(self.arms)})")
            if not self.report.replicates.get(name):
                raise ValueError(
                    f"report.preregistration names the arm {name!r}, which is trained once: a difference between two runs says nothing of the "
                    "spread from seed to seed; add arms with other seeds, and report.replicates"
                )
        pairs = [frozenset((question.arm, question.control)) for question in asked.questions]
        for question, pair in zip(asked.questions, pairs, strict=True):
            if len(pair) == 1:
                raise ValueError(f"report.preregistration compares the arm {question.arm!r} with itself")
            if pairs.count(pair) > 1:
                raise ValueError(f"report.preregistration asks twice about {question.arm} and {question.control}: one question is one test")
            ours, theirs = ((name, *self.report.replicates[name]) for name in (question.arm, question.control))
            seeds = [[self.train_of(name).seed for name in names] for names in (ours, theirs)]
            if seeds[0] != seeds[1]:
                raise ValueError(
                    f"report.preregistration compares {question.arm} and {question.control} run by run, so their runs must have the same seeds "
                    f"in the same order; train.seed is {seeds[0]} and {seeds[1]}"
                )

    def upcycle_of(self, arm: str) -> UpcycleConfig:
        """The upcycle settings of one arm."""
        base = self.upcycle
        if self.arms[arm].method == "upcycle-full":  # of the recipe's block, what is not about adapters
            base = UpcycleConfig(kind="whole", **base.model_dump(include={"num_experts", "top_k", "seed", "dtype"}))
        return _override(base, self.arms[arm].upcycle, f"arms.{arm}.upcycle")

    def train_of(self, arm: str) -> TrainConfig:
        """The training settings of one arm; `method` is the arm's."""
        method = self.arms[arm].method
        fixed = {} if method == "dense" else {"method": method}
        implied = {"quantization": "none"} if method in UNQUANTIZED else {}
        return _override(self.train, {**implied, **self.arms[arm].train, **fixed}, f"arms.{arm}.train")

    def merge_of(self, arm: str) -> MergeConfig:
        """The merge settings of one arm: what was trained without quantisation has no 4-bit weights to fold into."""
        return self.merge.model_copy(update={"base": "original"}) if self.arms[arm].method in UNQUANTIZED else self.merge


def _check_names(value: Mapping[str, Any]) -> None:
    for name in value:
        if len(name) > MAX_NAME or not re.fullmatch(NAME, name):
            raise ValueError(f"{name!r} cannot be a name: use at most {MAX_NAME} lower-case letters, digits, '-', '_' and '.'")


def _override(config: C, changes: Mapping[str, Any], where: str) -> C:
    try:
        return type(config).model_validate(_merge(config.model_dump(mode="json"), changes))
    except ValidationError as error:
        raise ValueError(_sentence(error, where)) from None


def _merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Deep merge of maps; anything else is replaced."""
    merged = dict(base)
    for key, value in changes.items():
        both_maps = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if both_maps else value
    return merged


def recipe_names() -> list[str]:
    """Names of the recipes that ship with the package; FOLDER/NAME of those in a folder."""
    root = _shipped()
    return sorted(path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.yaml"))


def _shipped() -> Path:
    return Path(str(resources.files("pesc.recipes").joinpath("")))


def load_recipe(name_or_path: str, overrides: Iterable[str] = ()) -> Recipe:
    """Read a shipped recipe by name or a YAML file by path, apply `a.b=value` overrides, check everything.

    Raises RecipeError naming the recipe and the field.
    """
    raw = _read(name_or_path)
    for text in overrides:
        raw = _merge(raw, _parse_override(text))
    return recipe_from_dict(raw, name_or_path)


def recipe_from_dict(raw: Mapping[str, Any], origin: str = "recipe") -> Recipe:
    """Check a recipe given as data.  Raises RecipeError naming each wrong field, and one that holds a secret."""
    _refuse_secrets(raw, origin)
    try:
        recipe = Recipe.model_validate(raw)
        canonical_json(recipe.model_dump(mode="json"))
    except ValidationError as error:
        raise RecipeError(f"Recipe {origin!r} cannot be used: {_sentence(error)}. See `pesc show` for a complete recipe.") from None
    except UnicodeEncodeError as error:
        near = error.object[max(0, error.start - 40) : error.start]
        raise RecipeError(f"Recipe {origin!r} cannot be used: after {near!r} stands a character that is not valid Unicode.") from None
    return recipe


def _refuse_secrets(raw: Mapping[str, Any], origin: str) -> None:
    """A recipe is in every manifest and on the server's pages.  Raises RecipeError for a password or a token in it."""
    for where, text in _texts(raw, ""):
        if kind := find_secret(text):
            raise RecipeError(
                f"Recipe {redact(origin)!r} cannot be used: {redact(where)} holds {kind}. Take it out, and give it through the environment "
                "(HF_TOKEN, AWS_SECRET_ACCESS_KEY, WANDB_API_KEY ..., or what the driver of the URL reads), or a Prefect Secret block."
            )


def _texts(value: Any, where: str) -> Iterator[tuple[str, str]]:
    """Every text of a tree, names of maps too, with its place."""
    if isinstance(value, str):
        yield where, value
    elif isinstance(value, Mapping):
        for name, item in value.items():
            place = f"{where}.{name}" if where else str(name)
            yield f"a name in {where or 'it'}", str(name)
            yield from _texts(item, place)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item, where)


def _read(name_or_path: str, depth: int = 0) -> dict[str, Any]:
    path = _find(name_or_path)
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"Recipe file {path} is not valid YAML: {' '.join(str(error).split())}.") from None
    except OSError as error:
        raise RecipeError(f"Recipe file {path} cannot be read ({error.strerror}).") from None
    if not isinstance(raw, dict):
        raise RecipeError(f"Recipe file {path} must hold a map of settings, not {type(raw).__name__}.")
    parent = raw.pop("extends", None)
    if parent is None:
        return raw
    if not isinstance(parent, str):
        raise RecipeError(f"Recipe file {path}: `extends` must be the name or the path of one recipe, not {parent!r}.")
    if depth:
        raise RecipeError(f"Recipe file {path} extends {parent!r}, but is itself extended: one level is allowed.")
    beside = path.parent / (parent if _is_path(parent) else f"{parent}.yaml")
    return _merge(_read(str(beside) if os.path.isfile(beside) else parent, depth + 1), raw)


def _find(name_or_path: str) -> Any:
    known = {
        spelling: name for name in recipe_names() for spelling in (name, name.replace("/", "-"))
    }  # FOLDER-NAME: as the recipe itself says
    if name_or_path in known:
        return _shipped() / f"{known[name_or_path]}.yaml"
    if _is_path(name_or_path):
        path = Path(name_or_path)
        if not os.path.isfile(path):  # unlike Path.is_file, no error for a name that is too long
            raise RecipeError(f"There is no recipe file {name_or_path}. `pesc recipes` lists the ones that ship with the package.")
        return path
    close = difflib.get_close_matches(name_or_path, recipe_names(), n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise RecipeError(f"There is no recipe {name_or_path!r}.{hint} Known: {', '.join(recipe_names())}; or give the path of a YAML file.")


def _is_path(text: str) -> bool:
    return text.endswith((".yaml", ".yml")) or os.sep in text


def _parse_override(text: str) -> dict[str, Any]:
    path, equals, value = text.partition("=")
    if not equals or not path.strip():
        raise RecipeError(f"Override {text!r} must look like train.learning_rate=2e-4.")
    try:
        parsed: Any = yaml.safe_load(value)
    except yaml.YAMLError:
        raise RecipeError(f"Override {text!r}: the value {value!r} is not valid YAML.") from None
    for key in reversed(path.strip().split(".")):
        parsed = {key: parsed}
    return parsed


def _sentence(error: ValidationError, prefix: str = "") -> str:
    """Pydantic's errors as one sentence of `field: what is wrong`."""
    parts = []
    for item in error.errors():
        field = ".".join([prefix, *map(str, item["loc"])] if prefix else map(str, item["loc"]))
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            message = "there is no such setting"
        got = (
            "" if isinstance(item["input"], dict | list) or item["type"] in {"missing", "extra_forbidden"} else f" (got {item['input']!r})"
        )
        parts.append(f"{field}: {message}{got}" if field else message)
    return "; ".join(parts)
