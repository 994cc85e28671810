"""Finds an lm-eval task and, where a source is given, replaces its items by files.

A stock task keeps its prompt, its scoring and its few-shot rules; only where the rows come from changes. For that, one YAML file a
task is written to the stage's workspace: it includes the stock file and names `pesc.evaluate.tasks.rows.load_rows` as its data set.

Pitfalls: lm-eval drops overrides that are given to a group as data, and passes a group's own name down as each member's name; the
generated files avoid both. Indexing the stock tasks takes some seconds, so it is done once a process, and not at all for this package's
own tasks.
"""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from pesc.errors import EvaluationError, TransientEvaluationError
from pesc.evaluate.config import BenchmarkConfig
from pesc.evaluate.tasks import FOLDER

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks.manager import TaskDict

OWN_TASKS = frozenset(path.stem for path in FOLDER.glob("pesc_*.yaml"))
CONTAINERS = frozenset({"GROUP", "TAG"})
SPLIT_FIELDS = ("training_split", "validation_split", "test_split", "fewshot_split")


def load_tasks(config: BenchmarkConfig, data: Path | None, folder: Path) -> TaskDict:
    """The benchmark's tasks with their items, by lm-eval's TaskManager.

    data: object directory that holds `config.files`.  folder: an empty directory for generated YAML files.
    Raises EvaluationError for an unknown task, a missing file or package, items that cannot be fetched or do not fit the task.
    """
    manager = find_task(config.task)
    names = list(_members(manager, config.task))
    leaves = leaves_of(manager, config.task)
    refuse_unguarded_code(manager, leaves)
    files = _resolve_files(config, data)
    if files:
        folder.mkdir(parents=True, exist_ok=True)
        siblings = _siblings(manager, leaves)
        for name in names:
            text = _override(manager, name, files, config, siblings) if name in leaves else _include(manager, name)
            if text:
                (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
        manager = _open_manager([folder], stock=False)
    elif config.task in OWN_TASKS and not (manager.task_index[config.task].cfg or {}).get("dataset_path"):
        raise EvaluationError(f"Task {config.task} reads its items from files; set evaluate.benchmarks.*.source and .files (split test).")
    with explained(config.task, bool(files)), _quiet("lm_eval.api.task"):  # it advertises its command line for each task
        loaded = manager.load([config.task])
    _check_examples(config, loaded)
    return loaded


def find_task(task: str) -> TaskManager:
    """The index that has the task.  Raises EvaluationError with near names for an unknown one."""
    manager = _known_tasks(stock=task not in OWN_TASKS)
    if task not in manager.task_index:
        close = difflib.get_close_matches(task, manager.all_tasks, n=3)
        hint = f" Did you mean {' or '.join(close)}?" if close else ""
        own = ", ".join(sorted(OWN_TASKS))
        raise EvaluationError(f"lm-eval knows no task {task!r}.{hint} `lm_eval ls tasks` lists them; this package adds {own}.")
    return manager


@lru_cache(maxsize=2)
def _known_tasks(stock: bool) -> TaskManager:
    return _open_manager([FOLDER], stock)


def _open_manager(folders: list[Path], stock: bool) -> TaskManager:
    from lm_eval.tasks import TaskManager

    with _quiet("lm_eval.tasks"):
        return TaskManager(include_path=[str(folder) for folder in folders], include_defaults=stock)


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    log = logging.getLogger(name)
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


def _members(manager: TaskManager, name: str) -> Iterable[str]:
    """A task's own name, or the names of a group or tag and of everything in it."""
    entry = manager.task_index.get(name)
    if entry is None:
        return
    yield name
    members: Iterable[Any] = ()
    if entry.kind.name in CONTAINERS:
        members = sorted(entry.tags) if entry.kind.name == "TAG" else (entry.cfg or {}).get("task", ())
    for member in [members] if isinstance(members, str) else members:
        yield from _members(manager, member if isinstance(member, str) else str(member.get("task") or member.get("group")))


def leaves_of(manager: TaskManager, task: str) -> list[str]:
    """Names of the tasks of a group or tag, or the task's own."""
    return [name for name in _members(manager, task) if manager.task_index[name].kind.name not in CONTAINERS]


def refuse_unguarded_code(manager: TaskManager, names: Iterable[str]) -> None:
    """Raise EvaluationError for a task that runs model-written code outside this package's sandbox."""
    for name in names:
        if name not in OWN_TASKS and (manager.task_index[name].cfg or {}).get("unsafe_code"):
            own = f"pesc_{name}"
            instead = f"use {own}, which runs it in a sandbox" if own in OWN_TASKS else f"use one of {', '.join(sorted(OWN_TASKS))}"
            raise EvaluationError(f"Task {name} runs model-written code without any isolation; {instead}.")


def _resolve_files(config: BenchmarkConfig, data: Path | None) -> dict[str, str]:
    """Split -> absolute path pattern."""
    if config.source is None:
        if config.files:
            raise EvaluationError(f"Benchmark {config.task} names files but no source; set evaluate.benchmarks.*.source.")
        return {}
    if data is None or not config.files:
        raise EvaluationError(
            f"Benchmark {config.task} names the source {config.source!r} but no files in it; set evaluate.benchmarks.*.files (split: file)."
        )
    return {split: str(data / file) for split, file in config.files.items()}


def _siblings(manager: TaskManager, leaves: Iterable[str]) -> list[str]:
    """Names of all subsets of the data sets that the tasks read, those of other tasks too."""
    settings = [entry.cfg or {} for entry in manager.task_index.values()]
    paths = {(manager.task_index[name].cfg or {}).get("dataset_path") for name in leaves}
    return sorted({str(cfg["dataset_name"]) for cfg in settings if cfg.get("dataset_name") and cfg.get("dataset_path") in paths})


def _include(manager: TaskManager, name: str) -> str:
    """YAML of a group as it is; "" for a tag, which the tasks name themselves."""
    path = manager.task_index[name].yaml_path
    return yaml.safe_dump({"include": str(path)}) if path else ""


def _override(manager: TaskManager, name: str, files: Mapping[str, str], config: BenchmarkConfig, siblings: list[str]) -> str:
    """YAML of the stock task with its items taken from files."""
    entry = manager.task_index[name]
    if entry.kind.name == "PY_TASK":
        raise EvaluationError(f"Task {name} is written in Python and brings its own items; leave source and files out.")
    stock: dict[str, Any] = entry.cfg or {}
    subset = stock.get("dataset_name")
    paths = {split: pattern.replace("{subset}", str(subset)) for split, pattern in files.items()}
    for split, path in paths.items():
        if not Path(path).is_file():
            given = config.files[split].replace("{subset}", str(subset))
            raise EvaluationError(
                f"Source {config.source!r} has no file {given!r} ({split} of task {name}); correct evaluate.benchmarks.*.files or the source's include."
            )
    evaluated = stock.get("test_split") or stock.get("validation_split")
    if evaluated not in paths:
        raise EvaluationError(
            f"Task {name} is evaluated on its split {evaluated!r}, but evaluate.benchmarks.*.files has only {', '.join(paths)}."
        )
    override: dict[str, Any] = {field: stock[field] if stock.get(field) in paths else None for field in SPLIT_FIELDS if stock.get(field)}
    shots = dict(stock.get("fewshot_config") or {})
    if shots.get("split") and shots["split"] not in paths:
        override["fewshot_config"] = {key: value for key, value in shots.items() if key != "split"}
    override |= {"include": str(entry.yaml_path), "task": name, "dataset_path": "json", "dataset_name": None}
    override["dataset_kwargs"] = {"files": paths, "subset": subset, "siblings": siblings}
    return yaml.safe_dump(override, sort_keys=True) + "custom_dataset: !function pesc.evaluate.tasks.rows.load_rows\n"


def _may_pass(error: OSError) -> bool:
    """Whether it is the network's or the hub's trouble, and not a wrong name, a missing right or this machine's disk."""
    if isinstance(error, FileNotFoundError) or os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        return False
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return status == 429 or status >= 500
    return isinstance(error, (ConnectionError, TimeoutError)) or error.errno is None


@contextmanager
def explained(task: str, local: bool) -> Iterator[None]:
    """Turn what loading a task can raise into one sentence."""
    from jinja2 import UndefinedError

    try:
        yield
    except EvaluationError:
        raise
    except ImportError as error:
        raise EvaluationError(
            f"Task {task} needs a package that is not installed ({_first_line(error)}); pip install 'lm-eval[math]' covers the mathematics tasks."
        ) from error
    except (UndefinedError, KeyError, IndexError, TypeError, ValueError) as error:
        where = "the files given for it" if local else "its data set"
        raise EvaluationError(
            f"Task {task} cannot use the rows of {where} ({type(error).__name__}: {_first_line(error)}); compare their fields with the task's."
        ) from error
    except OSError as error:
        raise (TransientEvaluationError if _may_pass(error) else EvaluationError)(
            f"The items of task {task} cannot be fetched from the hub ({type(error).__name__}: {_first_line(error)}); "
            "connect this machine, or give the benchmark a source with files."
        ) from error


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__


def _check_examples(config: BenchmarkConfig, loaded: TaskDict) -> None:
    """Few-shot examples must not come from the questions themselves."""
    for name, task in loaded["tasks"].items():
        fixed = task.get_config("num_fewshot")
        wanted = fixed if config.num_fewshot is None or fixed == 0 else config.num_fewshot
        if config.num_fewshot and fixed == 0:
            raise EvaluationError(f"Task {name} is always asked without examples; set num_fewshot to 0 or null.")
        if not wanted:
            continue
        shots = getattr(task, "fewshot_cfg", None)
        has_own = shots is not None and (shots.split is not None or shots.samples is not None)
        if not (has_own or task.has_training_docs() or task.has_validation_docs()):
            raise EvaluationError(
                f"Task {name} has no examples for {wanted}-shot prompts in the given files; add its few-shot split to files, or set num_fewshot: 0."
            )
