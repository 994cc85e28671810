"""What would stop a recipe's benchmarks, found before anything is downloaded or trained.

    python -m pesc.evaluate.preflight < QUESTION.json        (the child of `check`: lm-eval's index takes some seconds and much memory)

Looked at: that lm-eval has each task and measures what the recipe shows of it, packages, numbers of examples, files named without a
source, items that neither a source nor the hub can give, the sandbox of this machine, and, once the dense model is there, chat templates.

Not looked at: the rows themselves and whether the hub answers.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pesc.errors import EvaluationError, PescError
from pesc.evaluate.config import BenchmarkConfig
from pesc.launch.supervise import child_environment

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

    from pesc.recipe import Recipe

TIMEOUT_SECONDS = 600


def check(recipe: Recipe, base: Path | None = None) -> list[str]:
    """Sentences, one a fault, in the order of the benchmarks; empty when nothing is known to stop them.

    base: directory of the dense model, where it is there already.  Takes seconds; runs in a child, so that the caller imports no torch.
    Raises EvaluationError when the check itself fails.
    """
    question = {
        "benchmarks": {name: row.model_dump(mode="json") for name, row in recipe.evaluate.benchmarks.items()},
        "methods": {name: arm.method for name, arm in recipe.arms.items()},
        "chat_template": recipe.tokenize.chat_template,
        "base": str(base.resolve()) if base else None,
    }
    done = subprocess.run(
        [sys.executable, "-m", "pesc.evaluate.preflight"],
        input=json.dumps(question), capture_output=True, text=True, env=child_environment(), timeout=TIMEOUT_SECONDS,
    )  # fmt: skip
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise EvaluationError(f"The benchmarks of this recipe could not be checked ({last}); is lm-eval installed as constraints.txt says?")
    return json.loads(done.stdout)


def find_faults(question: Mapping[str, Any]) -> list[str]:
    """The child's part of `check`."""
    configs = {name: BenchmarkConfig.model_validate(row) for name, row in question["benchmarks"].items()}
    faults: list[str] = []
    runs_code: list[str] = []
    for name, config in configs.items():
        try:
            settings = _settings(config)
            faults += [f"evaluate.benchmarks.{name}: {fault}" for fault in _faults_of(config, settings)]
        except PescError as error:
            faults.append(f"evaluate.benchmarks.{name}: {error}")
            continue
        runs_code += [name] if any(task.get("unsafe_code") for task in settings) else []
    faults += _sandbox_faults(runs_code)
    faults += _template_faults(question, [name for name, config in configs.items() if config.apply_chat_template])
    return faults


def _settings(config: BenchmarkConfig) -> list[dict[str, Any]]:
    """The YAML of every leaf of the task.  Raises EvaluationError for an unknown task, one that runs code unguarded, a missing package."""
    from lm_eval.tasks._yaml_loader import load_yaml

    from pesc.evaluate.task_index import explained, find_task, leaves_of, refuse_unguarded_code

    manager: TaskManager = find_task(config.task)
    leaves = leaves_of(manager, config.task)
    refuse_unguarded_code(manager, leaves)
    paths = [path for name in leaves if (path := manager.task_index[name].yaml_path) and manager.task_index[name].kind.name != "PY_TASK"]
    folders: set[Path] = set()
    for path in paths:
        if Path(path).parent not in folders:  # its functions are the neighbours' functions
            folders.add(Path(path).parent)
            with explained(config.task, local=False):
                load_yaml(path, resolve_func=True)
    return [load_yaml(path, resolve_func=False) for path in paths]


def _faults_of(config: BenchmarkConfig, settings: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    if config.files and config.source is None:
        yield "it names files but no source; set its source."
    if config.source is not None and not config.files:
        yield f"it names the source {config.source!r} but no files in it; set files (split: file)."
    if config.source is None:
        yield from _hub_faults(config, settings)
    metrics = {entry["metric"] for task in settings for entry in task.get("metric_list") or ()}
    if metrics and config.metric is not None and config.metric not in metrics:
        yield f"task {config.task} does not measure {config.metric!r}; it measures {', '.join(sorted(metrics))}."
    filters = list(dict.fromkeys(entry["name"] for task in settings for entry in task.get("filter_list") or [{"name": "none"}]))
    if settings and config.filter is not None and config.filter not in filters:
        yield f"task {config.task} has no filter {config.filter!r}; it has {', '.join(filters)}."
    if config.filter is None and len(filters) > 1:
        yield f"task {config.task} has the filters {', '.join(filters)}; set filter to one of them."
    if config.num_fewshot and any(task.get("num_fewshot") == 0 for task in settings):
        yield f"task {config.task} is always asked without examples; set num_fewshot to 0 or null."


def _hub_faults(config: BenchmarkConfig, settings: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Without a source, items come from the hub, or from what an earlier use of it left in the cache."""
    paths = sorted({str(task["dataset_path"]) for task in settings if task.get("dataset_path")})
    if not paths:
        yield "the task reads its items from files; set source and files (split test)."
    if os.environ.get("HF_HUB_OFFLINE", "").upper() not in {"1", "ON", "YES", "TRUE"}:
        return
    from datasets import config as datasets_config
    from huggingface_hub import constants

    for path in paths:
        prepared = Path(datasets_config.HF_DATASETS_CACHE) / path.replace("/", "___").lower()
        fetched = Path(constants.HF_HUB_CACHE) / f"datasets--{path.replace('/', '--')}"
        if not prepared.exists() and not fetched.exists():
            yield f"its items are {path} on the hub, but HF_HUB_OFFLINE is set and the cache has none of them; give it a source with files."


def _sandbox_faults(names: Sequence[str]) -> Iterator[str]:
    if names:
        from pesc.evaluate.sandbox import require_isolation

        try:
            require_isolation()
        except EvaluationError as error:
            yield f"evaluate.benchmarks.{', '.join(names)}: {error}"


def _template_faults(question: Mapping[str, Any], names: Sequence[str]) -> Iterator[str]:
    """Arms whose model will have no chat template: the base as it came, or trained with the base's own."""
    if not names or question["base"] is None or _has_template(Path(question["base"])):
        return
    for arm, method in question["methods"].items():
        if method == "dense" or question["chat_template"] == "model":
            places = ", ".join(f"evaluate[{arm}/{name}]" for name in names)
            yield f"{places}: apply_chat_template is on, but the model of arm {arm} has no chat template; leave these out, or the arm."


def _has_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").exists():
        return True
    try:
        return bool(json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")).get("chat_template"))
    except (OSError, ValueError):
        return False


def main() -> int:
    """Read the question from standard input, write the faults to standard output, and everything that libraries print to stderr."""
    with contextlib.redirect_stdout(sys.stderr):
        faults = find_faults(json.load(sys.stdin))
    print(json.dumps(faults))
    return 0


if __name__ == "__main__":
    sys.exit(main())
