"""`report`: tables, plots and one self-contained page from everything that the other stages left.

    inputs   by address: evaluate[ARM/BENCHMARK] (at least one), train[ARM], merge[ARM], routing[ARM], heldout[ARM],
             dedup, mix, tokenize (each optional)
    out      results.json (all numbers), report.md, report.html (no network, no script), plots/*.svg and *.png

Runs without torch. The bytes depend on the inputs alone: no date, no host, seeded resampling, plots without ids that change.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pesc.errors import EvaluationError
from pesc.evaluate.baselines import Baselines, load_baselines
from pesc.evaluate.comparison import RULES, Comparison, compare
from pesc.evaluate.config import FilledReportConfig, ReportConfig
from pesc.evaluate.origins import evaluation, find_holes, find_origins, holes_sentence, origin_id, origins_markdown
from pesc.evaluate.question_tables import questions_markdown
from pesc.evaluate.questions import compare_losses
from pesc.evaluate.records import Records, data_funnel, parse_address, read_records
from pesc.evaluate.results import BenchmarkResult, Sample, read_result, read_samples
from pesc.evaluate.tables import further_runs, report_markdown, results_table
from pesc.figures import Drawing
from pesc.routing.results import RoutingResult
from pesc.routing.tables import routing_markdown
from pesc.stage import BuildResult, StageContext

__all__ = ["build", "results_table"]
logger = logging.getLogger(__name__)
KIND_ORDER = ("pesc", "qlora", "dense")
CLIP = 1200
"""Characters of a question or an answer shown on the page."""


def build(ctx: StageContext) -> BuildResult:
    """Write the report.  Raises EvaluationError when there is no evaluation, or a baseline is not known."""
    config: ReportConfig = ctx.config
    started = time.perf_counter()
    folders = {parse_address(address)[1]: path for address, path in ctx.inputs.items() if parse_address(address)[0] == "evaluate"}
    if not folders:
        raise EvaluationError("The report has no evaluation to show; run the evaluate stage of at least one arm first.")
    measured: dict[tuple[str, str], BenchmarkResult] = {}
    answers: dict[tuple[str, str], list[Sample]] = {}
    for done, (instance, folder) in enumerate(sorted(folders.items()), start=1):
        arm, _, benchmark = instance.partition("/")
        measured[arm, benchmark] = read_result(folder)
        answers[arm, benchmark] = list(read_samples(folder))
        ctx.progress(done, len(folders) + 1, unit="evaluations", message=instance)
    records, baselines = read_records(ctx.inputs), load_baselines()
    measured = in_reading_order(measured, baselines)
    kinds = arm_kinds(measured, records)
    comparison = compare(measured, answers, tuple(kinds), config.control_arm, config.baselines, baselines, config.replicates)
    results = collect(config, comparison, measured, records, kinds, baselines)
    expected = config.expected if isinstance(config, FilledReportConfig) else ()
    results["held_out"] = _held_out(config, records, tuple(kinds))
    results |= {"origins": find_origins(ctx.digests, results["names"]), "holes": find_holes(expected, measured)}
    plots = draw(comparison, records, first_runs(kinds, config.replicates), results)
    _write(ctx.out, results, plots, choose_samples(answers, comparison.benchmarks, kinds, config.samples_per_benchmark))
    ctx.progress(len(folders) + 1, len(folders) + 1, unit="evaluations", message="page written")
    verdicts = {f"{v.arm} vs {v.system}": v.outperforms for v in comparison.verdicts}
    metrics = {"seconds": round(time.perf_counter() - started, 2), "evaluations": len(folders), "outperforms": verdicts}
    return BuildResult(metrics=metrics | {"holes": [hole["address"] for hole in results["holes"]]})


def in_reading_order(measured: Mapping[tuple[str, str], BenchmarkResult], baselines: Baselines) -> dict[tuple[str, str], BenchmarkResult]:
    """Benchmarks in the order of the published figures, unknown ones last; within one, arms by name."""
    rows = list(baselines.benchmarks)

    def place(item: tuple[tuple[str, str], BenchmarkResult]) -> tuple[int, str, str]:
        (arm, benchmark), result = item
        row = result.settings.baseline or baselines.row_of_task(result.task)
        return rows.index(row) if row in rows else len(rows), benchmark, arm

    return dict(sorted(measured.items(), key=place))


def arm_kinds(measured: Mapping[tuple[str, str], BenchmarkResult], records: Records) -> dict[str, str]:
    """Arm -> pesc, qlora (dense and trained) or dense; sparse arms first."""
    kinds = {}
    for (arm, _), result in measured.items():
        kinds[arm] = "pesc" if result.model.kind == "pesc" else "qlora" if arm in records.training else "dense"
    return dict(sorted(kinds.items(), key=lambda item: (KIND_ORDER.index(item[1]), item[0])))


def collect(
    config: ReportConfig,
    comparison: Comparison,
    measured: Mapping[tuple[str, str], BenchmarkResult],
    records: Records,
    kinds: Mapping[str, str],
    baselines: Baselines,
) -> dict[str, Any]:
    """results.json: everything on the page as plain data."""
    models = {arm: next(r.model for (a, _), r in measured.items() if a == arm) for arm in kinds}
    names = benchmark_names(measured, baselines)
    training = {
        arm: {"method": run.method, "facts": dict(run.facts), "trainable": list(run.trainable), "settings": dict(run.settings)}
        | ({"held_out": [dict(run.held_out[0]), dict(run.held_out[-1])]} if run.held_out else {})
        for arm, run in records.training.items()
    }
    settings: list[dict[str, Any]] = []
    for (arm, benchmark), result in measured.items():
        entry = {"benchmark": benchmark, **_settings(result)}
        same = next((other for other in settings if {**other, "arms": None} == {**entry, "arms": None}), None)
        if same is None:
            settings.append(same := {**entry, "arms": []})
        same["arms"] = [name for name in kinds if name in (*same["arms"], arm)]
    return {
        "replicates": {arm: list(names) for arm, names in config.replicates.items()},
        "schema_version": 1, "title": config.title or "Sparse against dense", "control_arm": config.control_arm,
        "systems": {system: baselines.systems[system].name for system in config.baselines},
        "system_notes": {baselines.systems[s].name: baselines.systems[s].note for s in config.baselines if baselines.systems[s].note},
        "names": names, "arms": [{"arm": arm, "kind": kind, **models[arm].model_dump(mode="json", exclude={"kind"})} for arm, kind in kinds.items()],
        "comparison": comparison.model_dump(mode="json"), "training": training, "proofs": {arm: dict(proof) for arm, proof in records.proofs.items()},
        "funnel": data_funnel(records.dedup), "contamination": (records.dedup or {}).get("contamination"), "mix": records.mix, "tokenize": records.tokenize,
        "settings": settings, "rules": list(RULES), "routing": {arm: found.model_dump(mode="json") for arm, found in records.routing.items()},
    }  # fmt: skip


def _held_out(config: ReportConfig, records: Records, arms: Sequence[str]) -> dict[str, Any] | None:
    """The held-out losses and the answers to the pre-registered questions; None where there are neither."""
    trained = {arm: sum(group["parameters"] for group in run.trainable) for arm, run in records.training.items()}
    found = compare_losses(
        records.losses, [*arms, *(arm for arm in records.losses if arm not in arms)], config.replicates, trained, config.preregistration
    )
    return found.model_dump(mode="json") if found else None


def first_runs(kinds: Mapping[str, str], replicates: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """The arms that get curves and pictures of their own: all but further runs of another one."""
    further = further_runs(replicates)
    return {arm: kind for arm, kind in kinds.items() if arm not in further}


def benchmark_names(measured: Mapping[tuple[str, str], BenchmarkResult], baselines: Baselines) -> dict[str, str]:
    """What to call each benchmark; of two settings of one, the recipe's names tell them apart."""
    names = {benchmark: _row_name(result, baselines) or benchmark for (_, benchmark), result in measured.items()}
    taken = list(names.values())
    return {benchmark: f"{name} ({benchmark})" if taken.count(name) > 1 else name for benchmark, name in names.items()}


def _row_name(result: BenchmarkResult, baselines: Baselines) -> str | None:
    row = result.settings.baseline or baselines.row_of_task(result.task)
    return baselines.benchmarks[row].name if row in baselines.benchmarks else None


def _settings(result: BenchmarkResult) -> dict[str, Any]:
    kept = (
        "task",
        "task_version",
        "metric",
        "filter",
        "num_fewshot",
        "num_items",
        "num_available",
        "limit",
        "generation",
        "task_hash",
        "lm_eval_version",
    )
    chosen = result.model_dump(mode="json", include=set(kept))
    return {
        **{key: chosen[key] for key in kept},
        "chat_template": result.chat_template_sha256 is not None,
        "dtype": result.settings.dtype,
        "seed": result.settings.seed,
        **({"engine": result.engine_version} if result.engine_version else {}),
    }


def draw(comparison: Comparison, records: Records, kinds: Mapping[str, str], results: Mapping[str, Any]) -> dict[str, str]:
    """SVG of each plot that has something to show, by file stem."""
    from pesc.evaluate import plots
    from pesc.evaluate.question_plots import plot_questions
    from pesc.figures import svg_text
    from pesc.routing.plots import draw as draw_routing

    colours, names = plots.arm_colours(kinds), results["names"]
    comparison = comparison.model_copy(update={"arms": tuple(arm for arm in comparison.arms if arm in kinds)})
    drawn = {}
    if results["held_out"] and results["held_out"]["runs"]:
        drawn["questions"] = plot_questions(results["held_out"])
    if any(cell.percent for cell in comparison.cells):
        drawn["scores"] = plots.plot_scores(comparison, kinds, names)
        drawn["bars"] = plots.plot_bars(comparison, kinds, names)
    if radar := plots.plot_radar(comparison, kinds, names):
        drawn["radar"] = radar
    for arm in dict.fromkeys(pair.arm for pair in comparison.paired if pair.arm in kinds):
        drawn[f"differences-{arm}"] = plots.plot_differences(comparison, arm, colours[arm], names)
    runs = {arm: records.training[arm] for arm in kinds if arm in records.training and records.training[arm].series("loss")[0]}
    if runs:
        drawn["training"] = plots.plot_training(runs, colours)
    if looked := {arm: run for arm, run in runs.items() if run.domains}:
        drawn["held-out"] = plots.plot_held_out(looked, colours)
    for arm, run in runs.items():
        block = next((entry["pesc"] or {} for entry in results["arms"] if entry["arm"] == arm), {})
        if (load := run.expert_load) and block.get("num_experts"):
            drawn[f"routing-{arm}"] = plots.plot_expert_load(load, experts_by_layer(block, len(load["max"][0])))
    for arm, found in ((arm, found) for arm, found in records.routing.items() if arm in kinds):
        drawn |= {f"experts-{arm}-{name}": svg_text(figure) for name, figure in draw_routing(found).items()}
    if results["funnel"]:
        drawn["data"] = plots.plot_data(results["funnel"])
    return drawn


def experts_by_layer(block: Mapping[str, Any], sparse_layers: int) -> dict[int, int]:
    """Layer -> number of its experts, of the layers that have some; block: the `pesc` block of config.json."""
    counts = block.get("layer_experts") or [block["num_experts"]] * sparse_layers
    return {layer: count for layer, count in enumerate(counts) if count}


def choose_samples(
    answers: Mapping[tuple[str, str], Sequence[Sample]], benchmarks: Sequence[str], kinds: Mapping[str, str], count: int
) -> list[dict[str, Any]]:
    """`count` items a benchmark with every arm's answer: those that the arms disagree on first, in the order they were asked."""
    chosen = []
    for benchmark in benchmarks:
        by_arm = {arm: {s.key: s for s in answers[arm, benchmark]} for arm in kinds if (arm, benchmark) in answers}
        keys = list(next(iter(by_arm.values())))
        scores = {key: {found[key].score for found in by_arm.values() if key in found} for key in keys}
        for key in sorted(keys, key=lambda k: len(scores[k]) < 2)[:count]:
            found = {arm: items[key] for arm, items in by_arm.items() if key in items}
            first = next(iter(found.values()))
            chosen.append(
                {
                    "benchmark": benchmark,
                    "task": first.task,
                    "doc_id": first.doc_id,
                    "question": _clip(first.question),
                    "target": _clip(_target(first)),
                    "answers": [
                        {"arm": arm, "text": _clip(_answer(s)), "correct": s.correct, "score": s.score} for arm, s in found.items()
                    ],
                }
            )
    return chosen


def _clip(text: str) -> str:
    return text if len(text) <= CLIP else text[: CLIP // 2] + "\n…\n" + text[-CLIP // 2 :]


def _target(sample: Sample) -> str:
    if sample.choices and isinstance(sample.target, int) and 0 <= sample.target < len(sample.choices):
        return sample.choices[sample.target]
    return sample.target if isinstance(sample.target, str) else json.dumps(sample.target, ensure_ascii=False)


def _answer(sample: Sample) -> str:
    """The likeliest option with all log-likelihoods, or the generated text with what was made of it."""
    if sample.choices and len(sample.responses) >= len(sample.choices):
        values = [response[0] for response in sample.responses[: len(sample.choices)]]
        likeliest = sample.choices[values.index(max(values))]
        return f"{likeliest}   (log-likelihoods {', '.join(f'{value:.2f}' for value in values)})"
    text = "\n".join(str(response) for response in sample.responses)
    outcome = next(iter(_outcomes(sample.outcome)), None)
    return f"{text}\n→ {outcome['status']} {outcome['reason']}".rstrip() if outcome else text


def _outcomes(value: Any) -> Iterator[Mapping[str, str]]:
    """Sandbox verdicts, however deep lm-eval wrapped them."""
    if isinstance(value, Mapping) and "status" in value:
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _outcomes(item)


def _write(out: Path, results: dict[str, Any], plots: Mapping[str, str], samples: list[dict[str, Any]]) -> None:
    (out / "results.json").write_text(json.dumps(results, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
    (out / "report.md").write_text(_whole_markdown(results), encoding="utf-8")
    (out / "plots").mkdir(exist_ok=True)
    for name, svg in plots.items():
        (out / "plots" / f"{name}.svg").write_text(svg, encoding="utf-8")
        if isinstance(svg, Drawing):
            (out / "plots" / f"{name}.png").write_bytes(svg.png())
    (out / "report.html").write_text(render_page(results, plots, samples), encoding="utf-8")


def _count(value: float) -> str:
    """A number of parameters: 6.74 B, 134.5 M, 12.3 K, 640."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if value >= size:
            return f"{value / size:.2f} {unit}" if unit == "B" else f"{value / size:.1f} {unit}"
    return f"{value:g}"


def _whole_markdown(results: Mapping[str, Any]) -> str:
    """report.md: what is missing comes right after the title, where the numbers come from last."""
    title, _, rest = report_markdown(results).partition("\n\n")
    missing = holes_sentence(results)
    experts = routing_markdown({arm: RoutingResult.model_validate(found) for arm, found in results["routing"].items()})
    asked = questions_markdown(results["held_out"]) if results["held_out"] else ""
    parts = [
        title,
        *([f"**{missing}**"] if missing else []),
        *(text.rstrip("\n") for text in (asked, rest, experts, origins_markdown(results))),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _colours(kinds: Mapping[str, str], replicates: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """A colour an arm, as in the plots; further runs have that of their first."""
    from pesc.evaluate.plots import arm_colours

    colours = arm_colours(first_runs(kinds, replicates))
    unseen = dict.fromkeys(kinds, "#7f8790")
    return unseen | colours | {name: colours[arm] for arm, names in replicates.items() if arm in colours for name in names}


def render_page(results: Mapping[str, Any], plots: Mapping[str, str], samples: Sequence[Mapping[str, Any]]) -> str:
    """The self-contained HTML page."""
    from markupsafe import Markup

    from pesc.evaluate import question_tables, tables
    from pesc.figures import inline, page_environment
    from pesc.routing import tables as routing_tables

    environment = page_environment("pesc.evaluate")
    environment.filters |= {
        "score": tables.format_score, "setting": tables.format_setting, "p": tables.format_p, "thousands": lambda value: f"{value:,}",
        "millions": _count, "number": tables.format_number,
        "signed": tables.format_signed, "own_setting": tables.own_setting, "limit_mark": tables.limit_mark, "published_mark": tables.published_mark,
        "items": tables.format_items, "verdict_basis": tables.verdict_basis, "mean_basis": tables.mean_basis,
        "runs_basis": tables.runs_basis, "replicated_name": tables.replicated_name, "origin_id": origin_id,
        "total": lambda entry, key: sum(cell.get(key, 0) for cell in (entry.get("datasets") or {}).values()),
    }  # fmt: skip
    kinds = {entry["arm"]: entry["kind"] for entry in results["arms"]}
    inlined = {name: Markup(inline(svg, name, f"plot: {name}")) for name, svg in plots.items()}
    page = environment.get_template("report.html.j2")
    routing = {arm: RoutingResult.model_validate(found) for arm, found in results["routing"].items()}
    return page.render(
        r=results, plots=inlined, samples=samples, colours=_colours(kinds, results["replicates"]), figure_rows=tables.figure_rows(results),
        mark_notes=tables.mark_notes(results), evaluation=evaluation, keys={name: key for key, name in results["names"].items()},
        missing=holes_sentence(results), origins={entry["address"] for entry in results["origins"]}, routing=routing, routing_tables=routing_tables,
        question_tables=question_tables, further=further_runs(results["replicates"]),
        means=tables.headline_means(results), run_means=tables.run_means(results), is_wide=tables.is_wide(results),
    )  # fmt: skip
