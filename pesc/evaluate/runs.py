"""Evaluations of several runs side by side: `pesc compare RUN RUN…`.

RUN is one of
    RECIPE                 a shipped recipe or a YAML file: what its plan finds in the store
    RECIPE@TIME            an earlier run of a recipe, by its record in the store; the start of the time is enough
    DIGEST                 an `evaluate` or `report` object of the store, at least eight digits
    DIRECTORY              results.json and samples.jsonl of one evaluation

Reads results and samples, builds nothing. Arms are called RUN:ARM; each is compared with the first run's arm of the same name, or all
with `control`. Runs that asked other items, or whose results are gone, are named and left out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pesc.errors import EvaluationError
from pesc.evaluate.baselines import load_baselines
from pesc.evaluate.comparison import RULES, Comparison, compare
from pesc.evaluate.records import parse_address
from pesc.evaluate.report import benchmark_names, in_reading_order
from pesc.evaluate.results import BenchmarkResult, Sample, read_result, read_samples
from pesc.evaluate.tables import paired_table, results_table, verdict_lines
from pesc.markdown import markdown_table
from pesc.plan import make_plan
from pesc.recipe import load_recipe
from pesc.store import Manifest, Store

FEWEST_DIGITS = 8


@dataclass
class Run:
    """One RUN: where its evaluations lie, by (arm, benchmark), and what is missing."""

    name: str
    folders: dict[tuple[str, str], Path] = field(default_factory=dict)
    objects: dict[tuple[str, str], str] = field(default_factory=dict)
    """Digest of each, where it comes from a store."""
    missing: list[str] = field(default_factory=list)

    def add(self, store: Store, manifest: Manifest) -> None:
        """Take one `evaluate` result of the store."""
        arm, _, benchmark = parse_address(manifest.address)[1].partition("/")
        self.folders[arm, benchmark] = store.open(manifest.ref)
        self.objects[arm, benchmark] = manifest.output.digest


def find_run(argument: str, store: Store) -> Run:
    """What a RUN means.  Raises EvaluationError (or RecipeError) for one that is not there or has no evaluation."""
    directory = Path(argument).expanduser()
    if directory.is_dir():
        run = _from_directory(argument, directory)
    elif re.fullmatch(rf"[0-9a-f]{{{FEWEST_DIGITS},64}}", argument):
        run = _from_digest(argument, store)
    elif "@" in argument:
        run = _from_record(argument, store)
    else:
        run = _from_recipe(argument, store)
    if not run.folders:
        raise EvaluationError(
            f"{argument} has no evaluation in the store {store.root}: run `pesc run {argument.partition('@')[0]} --until evaluate` first, or name "
            "another store with --store."
        )
    return run


def _from_directory(argument: str, directory: Path) -> Run:
    if not (directory / "samples.jsonl").is_file():
        raise EvaluationError(
            f"{argument} has no samples.jsonl, so its items cannot be paired: give the directory of one evaluation (results.json and samples.jsonl)."
        )
    return Run(argument, {("", read_result(directory).task): directory})


def _from_digest(argument: str, store: Store) -> Run:
    run = Run(argument[:12])
    found = {m.output.digest: m for stage in ("evaluate", "report") for m in store.manifests(stage) if m.output.digest.startswith(argument)}
    if len(found) != 1:
        many = "several objects start" if found else "no evaluation and no report starts"
        raise EvaluationError(f"In the store {store.root}, {many} with {argument}; `pesc plan RECIPE` shows what there is.")
    manifest = next(iter(found.values()))
    if manifest.key.stage == "evaluate":
        run.add(store, manifest)
        return run
    by_digest = {m.output.digest: m for m in store.manifests("evaluate")}
    for address, digest in manifest.key.inputs.items():
        if parse_address(address)[0] == "evaluate":
            _take(run, store, address, by_digest.get(digest))
    return run


def _from_record(argument: str, store: Store) -> Run:
    recipe, _, time = argument.rpartition("@")
    records = sorted((store.root / "runs" / recipe).glob("*.json")) if re.fullmatch(r"[\w.-]+", recipe) else []
    found = [path for path in records if path.stem.startswith(time)] if time else records
    if len(found) != 1:
        there = ", ".join(path.stem for path in records[-5:]) or "none"
        many = f"{len(found)} runs start" if found else "no run starts"
        raise EvaluationError(f"Of the recipe {recipe!r}, {many} with {time!r} in the store {store.root}. Its latest: {there}.")
    run = Run(f"{recipe}@{found[0].stem}")
    for address, fingerprint in json.loads(found[0].read_text(encoding="utf-8")).items():
        if parse_address(address)[0] == "evaluate":
            _take(run, store, address, store.find("evaluate", fingerprint))
    return run


def _from_recipe(argument: str, store: Store) -> Run:
    recipe = load_recipe(argument)
    run = Run(recipe.name)
    for action in make_plan(recipe, store):
        if action.node.stage.name == "evaluate":
            _take(run, store, action.address, action.manifest)
    return run


def _take(run: Run, store: Store, address: str, manifest: Manifest | None) -> None:
    """An evaluation under the address that the run knows it by, or a hole."""
    if manifest is None or store.find(manifest.key.stage, manifest.fingerprint) is None:
        run.missing.append(address)
    else:
        run.add(store, manifest.model_copy(update={"address": address}))


def compare_runs(runs: Sequence[Run], control: str | None = None, systems: Sequence[str] = ()) -> dict[str, Any]:
    """Everything that `pesc compare` shows: comparison, names of benchmarks and systems, the runs, and the rules.

    `control` is a RUN:ARM. Raises EvaluationError for one that is not there, for two runs of one name, or damaged results.
    """
    if repeated := {run.name for run in runs if [other.name for other in runs].count(run.name) > 1}:
        raise EvaluationError(f"{min(repeated)} is named twice: give each run once, an earlier one as RECIPE@TIME.")
    measured: dict[tuple[str, str], BenchmarkResult] = {}
    answers: dict[tuple[str, str], list[Sample]] = {}
    for run in runs:
        for (arm, benchmark), folder in run.folders.items():
            result = read_result(folder)
            key = _label(run, arm, len(runs)), _benchmark(benchmark, arm, result, measured)
            measured[key], answers[key] = result, list(read_samples(folder))
    baselines = load_baselines()
    measured = in_reading_order(measured, baselines)
    labels = list(dict.fromkeys(_label(run, arm, len(runs)) for run in runs for arm, _ in run.folders))
    if control is not None and control not in labels:
        raise EvaluationError(f"--control {control} is none of the arms that are compared: {', '.join(labels)}.")
    comparison = compare(measured, answers, labels, control or "", systems, baselines)
    if control is None:
        comparison = _against_the_first(comparison, runs, measured, answers)
    return {
        "schema_version": 1, "title": f"{' against '.join(run.name for run in runs)}", "control_arm": control or f"the same arm of {runs[0].name}",
        "systems": {system: baselines.systems[system].name for system in systems}, "names": benchmark_names(measured, baselines),
        "comparison": comparison.model_dump(mode="json"), "rules": list(RULES),
        "runs": [{"run": run.name, "objects": {"/".join(key): digest for key, digest in run.objects.items()}, "missing": run.missing} for run in runs],
    }  # fmt: skip


def _label(run: Run, arm: str, count: int) -> str:
    return run.name if not arm else arm if count == 1 else f"{run.name}:{arm}"


def _benchmark(benchmark: str, arm: str, result: BenchmarkResult, known: Mapping[tuple[str, str], BenchmarkResult]) -> str:
    """A bare directory knows no name of its benchmark: it takes that of the same task in the runs before it."""
    if arm:
        return benchmark
    return next((name for (_, name), other in known.items() if other.task == result.task), benchmark)


def _against_the_first(
    whole: Comparison,
    runs: Sequence[Run],
    measured: Mapping[tuple[str, str], BenchmarkResult],
    answers: Mapping[tuple[str, str], list[Sample]],
) -> Comparison:
    """The comparison with each arm paired with the first run's arm of the same name."""
    paired, means, problems = [], [], []
    for arm, label, control in _pairs(runs):
        if control is None:
            problems.append(
                f"{label} has no counterpart: {runs[0].name} has no arm {arm!r}. Name what to compare it with: --control RUN:ARM."
            )
            continue
        two = {key: result for key, result in measured.items() if key[0] in (label, control)}
        part = compare(two, answers, (label, control), control, (), load_baselines())
        paired, means, problems = paired + list(part.paired), means + list(part.paired_means), problems + list(part.not_paired)
        shared = {benchmark for who, benchmark in two if who == label} & {benchmark for who, benchmark in two if who == control}
        if not shared:
            problems.append(f"{label} and {control} have no benchmark in common.")
    return whole.model_copy(update={"paired": tuple(paired), "paired_means": tuple(means), "not_paired": tuple(problems)})


def _pairs(runs: Sequence[Run]) -> Iterator[tuple[str, str, str | None]]:
    """Arm, its label, and the label of the first run's arm to compare it with."""
    first, count = runs[0], len(runs)
    arms = list(dict.fromkeys(arm for arm, _ in first.folders))
    for run in runs[1:]:
        for arm in dict.fromkeys(arm for arm, _ in run.folders):
            same = arm if arm in arms else arms[0] if "" in (arm, arms[0]) and len(arms) == 1 else None
            yield arm, _label(run, arm, count), None if same is None else _label(first, same, count)


def runs_markdown(results: Mapping[str, Any]) -> str:
    """What `pesc compare` prints."""
    comparison = results["comparison"]
    parts = [f"# {results['title']}", "\n".join(f"- {line}" for line in verdict_lines(results)), results_table(results)]
    if comparison["paired"]:
        parts += [f"## Against {results['control_arm']}, on the same items", paired_table(results)]
    parts += comparison["not_paired"]
    parts += [f"{run['run']} has no result of {', '.join(run['missing'])}." for run in results["runs"] if run["missing"]]
    objects = [[run["run"], key, f"`{digest[:12]}`"] for run in results["runs"] for key, digest in run["objects"].items()]
    parts += ["## Where the numbers come from", markdown_table(["run", "arm/benchmark", "object"], objects)] if objects else []
    parts += ["## How to read this", "\n".join(f"- {rule}" for rule in results["rules"])]
    return "\n\n".join(filter(None, parts)) + "\n"


def write_comparison(results: Mapping[str, Any], out: Path) -> list[Path]:
    """Write compare.md and results.json into `out`; returns their paths.  Raises EvaluationError when that is not possible."""
    from pesc.store.disk import write_atomic

    texts = {"results.json": json.dumps(results, indent=2, sort_keys=True, ensure_ascii=False) + "\n", "compare.md": runs_markdown(results)}
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            write_atomic(out / name, text.encode())
    except OSError as error:
        raise EvaluationError(f"The comparison cannot be written to {out} ({error.strerror}): give another directory with --out.") from None
    return [out / name for name in texts]
