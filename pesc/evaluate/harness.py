"""`evaluate[ARM/BENCHMARK]`: one lm-eval task of one model.

    inputs   model (a Hugging Face directory, sparse or dense), data (optional: the files of the task's items)
    out      results.json (pesc.evaluate.results.BenchmarkResult), samples.jsonl (one item a line)
    work     journal of finished answers, so that an interrupted evaluation goes on where it was

lm-eval builds the prompts, scores and aggregates; this module chooses the items, sets the seeds, and turns what lm-eval returns into
a typed result without times, hosts or paths.

Pitfalls: lm-eval's `simple_evaluate` collects the machine's description on each call (some seconds), hence `evaluate`; it applies
`limit` to each subtask of a group; log-likelihoods in bf16 differ in their last digits between machines and batch sizes, hence
rounded to four decimals.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import logging
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pesc.errors import EvaluationError
from pesc.evaluate.config import BenchmarkConfig
from pesc.evaluate.results import BenchmarkResult, Measurement, ModelFacts, Sample, TaskResult, write_results
from pesc.evaluate.task_index import OWN_TASKS, load_tasks
from pesc.moe.tuning import export_choices
from pesc.provenance import slow_bfloat16_sentence
from pesc.remote_code import refuse_own_code
from pesc.stage import BuildResult, StageContext

if TYPE_CHECKING:
    from lm_eval.tasks.manager import TaskDict

    from pesc.evaluate.language_model import JournaledLM
    from pesc.evaluate.served_model import ServedLM

logger = logging.getLogger(__name__)
JOURNAL = "answers.jsonl"
PATIENCE_SECONDS = 30
"""Shortest alarm while formulas are compared."""
BOOTSTRAP_ITERATIONS = 1000
"""Resamples for the standard error of metrics that have no closed form."""


def build(ctx: StageContext) -> BuildResult:
    """Run the benchmark and write results.json and samples.jsonl.  Raises EvaluationError."""
    config: BenchmarkConfig = ctx.config
    started = time.perf_counter()
    generated = ctx.work / "tasks"
    shutil.rmtree(generated, ignore_errors=True)
    with offline(config.source is not None):
        loaded = load_tasks(config, ctx.inputs.get("data"), generated)
        apply_settings(config, loaded)
        _require_sandbox(loaded)
        _require_chat_template(config, ctx.inputs["model"])
        with contextlib.closing(_engine(ctx)) as model:
            loading = time.perf_counter() - started
            raw = evaluate_tasks(config, model, loaded)
    result, samples = summarise(config, loaded, raw, model.facts(), _template_digest(config, model), model.marks)
    result = result.model_copy(update={"engine_version": model.engine_version})
    _warn_of_marks(ctx.address, result)
    write_results(ctx.out, result, samples)
    seconds = time.perf_counter() - started
    logger.info("%s: %s %.4f over %d items in %.1f s", ctx.address, result.metric, result.value, result.num_items, seconds)
    metrics = {
        "value": result.value, "stderr": result.stderr, "items": result.num_items, "seconds": round(seconds, 2), "loading_seconds": round(loading, 2),
        "dispatch": export_choices(),
        "items_per_second": round(result.num_items / max(seconds - loading, 1e-9), 3), **model.measurements(),
    }  # fmt: skip
    metrics |= {"truncated": result.num_truncated, "cut_prompts": result.num_cut_prompts}
    engine = {"engine": result.engine_version} if result.engine_version else {}
    return BuildResult(metrics=metrics, provenance={"lm_eval": result.lm_eval_version, "task_hash": result.task_hash, **engine})


@contextlib.contextmanager
def offline(active: bool) -> Iterator[None]:
    """While active, nothing contacts the hub, also when its client was imported before."""
    if not active:
        yield
        return
    names = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    loaded = [module for name in ("huggingface_hub.constants", "datasets.config") if (module := sys.modules.get(name))]
    flags = [(module, module.HF_HUB_OFFLINE) for module in loaded if hasattr(module, "HF_HUB_OFFLINE")]
    for module, _ in flags:
        module.HF_HUB_OFFLINE = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})
        for module, value in flags:
            module.HF_HUB_OFFLINE = value  # type: ignore[attr-defined]


def apply_settings(config: BenchmarkConfig, loaded: TaskDict) -> None:
    """Few-shot count, seed of the examples, and longest generation, as `simple_evaluate` applies them."""
    for task in loaded["tasks"].values():
        fixed = task.get_config("num_fewshot")
        if config.num_fewshot is not None and fixed != 0:
            task.set_config(key="num_fewshot", value=config.num_fewshot)
        elif fixed is None:
            task.set_config(key="num_fewshot", value=0)
        if config.max_gen_toks is not None and task.get_config("output_type") == "generate_until":
            task.set_config(key="generation_kwargs", value={"max_gen_toks": config.max_gen_toks}, update=True)
        task.set_fewshot_seed(seed=config.seed)


def _require_sandbox(loaded: TaskDict) -> None:
    """Code tasks fail before the model is loaded, not after an hour of generation."""
    if any(task.get_config("unsafe_code") for task in loaded["tasks"].values()):
        from pesc.evaluate.sandbox import require_isolation

        require_isolation()


def _require_chat_template(config: BenchmarkConfig, model: Path) -> None:
    """Read from the tokenizer alone, before the weights."""
    if not config.apply_chat_template:
        return
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(model), trust_remote_code=False)
    except (OSError, ValueError, KeyError):
        return  # loading the model says what is wrong with it
    if not tokenizer.chat_template:
        raise EvaluationError(
            "apply_chat_template is on, but the model's tokenizer has no chat template; turn it off or add chat_template.jinja to the model."
        )


def _engine(ctx: StageContext) -> JournaledLM | ServedLM:
    """What answers.  With several processes they have answered already, and what is given finds their answers."""
    if ctx.config.engine == "vllm":
        return serve_model(ctx)
    if ctx.execution.evaluate_processes > 1:
        from pesc.evaluate.rank import answer_in_processes

        answer_in_processes(ctx)
    return load_model(ctx, ctx.work / JOURNAL, ctx.work.glob("answers-*.jsonl"))


def serve_model(ctx: StageContext) -> ServedLM:
    """The model behind vLLM's server, with its journal.  One server answers, whatever `evaluate_processes` says: it batches by itself."""
    from pesc.evaluate.served_model import load_served_model
    from pesc.models import register
    from pesc.settings import vllm_python

    register()
    ctx.work.mkdir(parents=True, exist_ok=True)
    return load_served_model(
        ctx.inputs["model"], device=ctx.execution.device, dtype=ctx.config.dtype, batch_size=ctx.execution.evaluate_batch_size,
        seed=ctx.config.seed, python=vllm_python(), work=ctx.work, on_progress=_reporter(ctx),
    )  # fmt: skip


def _reporter(ctx: StageContext) -> Callable[[int, int, str], None]:
    names = {"loglikelihood": "scored", "loglikelihood_rolling": "scored", "generate_until": "generated"}

    def report(done: int, total: int, kind: str) -> None:
        ctx.progress(done, total, unit="requests", message=f"{ctx.config.task}: {names[kind]}")

    return report


def load_model(ctx: StageContext, journal: Path, others: Iterable[Path] = (), share: tuple[int, int] = (0, 1)) -> JournaledLM:
    """The model with its journal.  others: journals that are only read.  share: see `JournaledLM`."""
    from pesc.evaluate.journal import Journal
    from pesc.evaluate.language_model import load_language_model
    from pesc.models import register
    from pesc.models.placement import choose_device

    register()
    refuse_own_code(ctx.inputs["model"])
    ctx.work.mkdir(parents=True, exist_ok=True)
    device, benchmark = choose_device(ctx.execution.device), ctx.address.rpartition("/")[2].rstrip("]")
    warning = slow_bfloat16_sentence(f"evaluate.benchmarks.{benchmark}.dtype")
    if warning and device == "cpu" and ctx.config.dtype == "bfloat16":
        logger.warning(warning)
    return load_language_model(
        ctx.inputs["model"], device=device if share == (0, 1) or device == "cpu" else f"cuda:{share[0]}", dtype=ctx.config.dtype,
        batch_size=ctx.execution.evaluate_batch_size, journal=Journal(journal, sorted(others)), on_progress=_reporter(ctx), share=share,
    )  # fmt: skip


def evaluate_tasks(config: BenchmarkConfig, model: JournaledLM | ServedLM, loaded: TaskDict) -> Mapping[str, Any]:
    """lm-eval's answer.  Raises EvaluationError for settings that lm-eval refuses."""
    import numpy as np
    from lm_eval.evaluator import evaluate
    from lm_eval.utils import set_torch_seed

    random.seed(config.seed)
    np.random.seed(config.seed)
    set_torch_seed(config.seed)
    try:
        with patient_mathematics():
            raw = evaluate(
                model, loaded, limit=config.limit, bootstrap_iters=BOOTSTRAP_ITERATIONS, log_samples=True,
                apply_chat_template=config.apply_chat_template, fewshot_as_multiturn=config.apply_chat_template,
                confirm_run_unsafe_code=set(loaded["tasks"]) <= OWN_TASKS,
            )  # fmt: skip
    except AssertionError as error:  # lm-eval states its limits with assert: prompts that leave no room, too many examples
        raise EvaluationError(
            f"lm-eval cannot run {config.task} with these settings: {str(error).strip() or 'an assertion failed'}"
        ) from error
    assert raw is not None, "lm-eval returns nothing only on ranks other than 0"
    return raw


@contextlib.contextmanager
def patient_mathematics() -> Iterator[None]:
    """While active, what compares formulas (sympy, for lm-eval's tasks and for math_verify) may take longer than its five seconds.

    Those limits are alarms of the wall clock: on a busy machine an answer could be wrong that is right on an idle one.  Comparisons
    that have no end still end.
    """
    alarm = signal.alarm
    signal.alarm = lambda seconds: alarm(max(seconds, PATIENCE_SECONDS) if seconds else 0)
    try:
        yield
    finally:
        signal.alarm = alarm


def _warn_of_marks(address: str, result: BenchmarkResult) -> None:
    """A word in the log where at least one item in twenty is not what it seems."""
    for count, what in (
        (result.num_truncated, "generations ended at their longest length, unfinished: raise max_gen_toks"),
        (result.num_cut_prompts, "prompts were longer than the model's positions and lost their beginning: use fewer examples"),
    ):
        if count >= 0.05 * result.num_items:
            logger.warning("%s: %d of %d %s", address, count, result.num_items, what)


def _template_digest(config: BenchmarkConfig, model: JournaledLM | ServedLM) -> str | None:
    template = model.tokenizer.chat_template
    return hashlib.sha256(str(template).encode()).hexdigest() if config.apply_chat_template else None


def summarise(
    config: BenchmarkConfig,
    loaded: TaskDict,
    raw: Mapping[str, Any],
    model: ModelFacts,
    template: str | None,
    marks: Mapping[tuple[str, int], tuple[bool, bool]],
) -> tuple[BenchmarkResult, list[Sample]]:
    """lm-eval's answer as a typed result and samples.  Raises EvaluationError when the configured metric is not among it.

    marks: (task, number of the item) -> (truncated, prompt cut), of the items that have a mark.
    """
    tasks = tuple(_task_result(name, raw) for name in sorted(loaded["tasks"]))
    measurements = _measurements(raw["results"].get(config.task), raw["higher_is_better"].get(config.task)) or _pool(tasks)
    chosen = _choose(config, measurements)
    samples = [
        _sample(name, loaded["tasks"][name], entry, chosen, marks.get((name, entry["doc_id"]), (False, False)))
        for name in sorted(loaded["tasks"])
        for entry in raw["samples"][name]
        if entry["filter"] == chosen.filter
    ]
    digest = tasks[0].task_hash if len(tasks) == 1 else hashlib.sha256("".join(task.task_hash for task in tasks).encode()).hexdigest()
    binary = all(sample.correct is not None for sample in samples)
    kwargs = next((task.get_config("generation_kwargs") for task in loaded["tasks"].values() if task.OUTPUT_TYPE == "generate_until"), None)
    result = BenchmarkResult(
        task=config.task, task_version=str(raw["versions"].get(config.task, tasks[0].version)), metric=chosen.metric, filter=chosen.filter,
        value=chosen.value, stderr=chosen.stderr, higher_is_better=chosen.higher_is_better, num_items=sum(task.num_items for task in tasks),
        num_available=sum(task.num_available for task in tasks), num_correct=sum(sample.correct or 0 for sample in samples) if binary else None,
        num_fewshot=max(task.num_fewshot for task in tasks), limit=config.limit, task_hash=digest, chat_template_sha256=template,
        generation=kwargs, num_truncated=sum(sample.truncated for sample in samples),
        num_cut_prompts=sum(sample.prompt_cut for sample in samples), measurements=measurements, tasks=tasks, model=model, settings=config,
        lm_eval_version=importlib.metadata.version("lm_eval"),
    )  # fmt: skip
    return result, samples


def _task_result(name: str, raw: Mapping[str, Any]) -> TaskResult:
    entries = raw["samples"][name]
    chained = "".join(entry["doc_hash"] + entry["prompt_hash"] + entry["target_hash"] for entry in entries)
    counts = raw["n-samples"][name]
    return TaskResult(
        task=name, version=str(raw["versions"].get(name)), task_hash=hashlib.sha256(chained.encode()).hexdigest(), num_items=counts["effective"],
        num_available=counts["original"], num_fewshot=raw["n-shot"][name], output_type=raw["configs"][name]["output_type"],
        measurements=_measurements(raw["results"][name], raw["higher_is_better"][name]),
    )  # fmt: skip


def _measurements(values: Mapping[str, Any] | None, directions: Mapping[str, Any] | None) -> tuple[Measurement, ...]:
    """lm-eval's {"acc,none": v, "acc_stderr,none": s} as records, in its order."""
    found = []
    for key, value in (values or {}).items():
        metric, comma, filter_name = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        stderr = (values or {}).get(f"{metric}_stderr,{filter_name}")
        better = (directions or {}).get(metric)
        found.append(
            Measurement(
                metric=metric,
                filter=filter_name,
                value=float(value),
                stderr=float(stderr) if isinstance(stderr, int | float) else None,
                higher_is_better=better is not False,
            )
        )
    return tuple(found)


def _pool(tasks: Sequence[TaskResult]) -> tuple[Measurement, ...]:
    """Measurements of a tag (lm-eval does not aggregate those): the mean over items."""
    pooled = []
    for first in tasks[0].measurements:
        same = [(t.num_items, m) for t in tasks for m in t.measurements if (m.metric, m.filter) == (first.metric, first.filter)]
        if len(same) < len(tasks):
            continue
        total = sum(count for count, _ in same)
        value = sum(count * m.value for count, m in same) / total
        errors = [(count, m.stderr) for count, m in same if m.stderr is not None]
        stderr = sum((count * error / total) ** 2 for count, error in errors) ** 0.5 if len(errors) == len(same) else None
        pooled.append(first.model_copy(update={"value": value, "stderr": stderr}))
    return tuple(pooled)


def _choose(config: BenchmarkConfig, measurements: Sequence[Measurement]) -> Measurement:
    names = [m.metric for m in measurements]
    wanted = config.metric or ("acc_norm" if "acc_norm" in names else next(iter(names), None))
    named = [m for m in measurements if m.metric == wanted]
    found = [m for m in named if config.filter in (None, m.filter)]
    if len(found) == 1:
        return found[0]
    if not named:
        there = ", ".join(dict.fromkeys(m.metric for m in measurements)) or "none"
        raise EvaluationError(f"Task {config.task} does not measure {wanted!r}; set evaluate.benchmarks.*.metric to one of: {there}.")
    filters = ", ".join(m.filter for m in named)
    raise EvaluationError(
        f"Metric {wanted} of task {config.task} comes with the filters {filters}; set evaluate.benchmarks.*.filter to one of them."
    )


def _sample(name: str, task: Any, entry: Mapping[str, Any], chosen: Measurement, marks: tuple[bool, bool]) -> Sample:
    question = task.doc_to_text(entry["doc"])
    choices = task.doc_to_choice(entry["doc"]) if task.OUTPUT_TYPE == "multiple_choice" else ()
    value: Any = entry.get(chosen.metric)
    value = value.item() if hasattr(value, "item") else value  # a numpy scalar
    score = float(value) if isinstance(value, bool | int | float) else None
    generated = task.OUTPUT_TYPE == "generate_until"
    return Sample(
        task=name, doc_id=entry["doc_id"], doc_hash=entry["doc_hash"], prompt_hash=entry["prompt_hash"], target_hash=entry["target_hash"],
        question=question if isinstance(question, str) else "", choices=tuple(map(str, choices)), target=_plain(entry["target"]),
        responses=tuple(_response(answer) for answers in entry["resps"] for answer in answers),
        outcome=_plain(entry["filtered_resps"]) if generated else None, score=score, correct=1 if score == 1 else 0 if score == 0 else None,
        truncated=marks[0], prompt_cut=marks[1],
    )  # fmt: skip


def _response(answer: Any) -> Any:
    """A generated text, or a log-likelihood rounded to what is the same on each run."""
    if isinstance(answer, list | tuple) and answer and isinstance(answer[0], float):
        return [round(answer[0], 4), bool(answer[1])]
    return _plain(answer)


def _plain(value: Any) -> Any:
    """The value as JSON holds it."""
    return json.loads(json.dumps(value, default=str, ensure_ascii=False))
