"""The report's tables as text (Markdown).  Plain data in, str out: the CLI and the Prefect layer print the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pesc.markdown import markdown_table


def format_score(cell: Mapping[str, Any]) -> str:
    """`48.3 [46.1, 50.5]`."""
    if not cell["percent"]:
        return f"{cell['value']:.4g} [{cell['low']:.4g}, {cell['high']:.4g}]"
    return f"{cell['value']:.1f} [{cell['low']:.1f}, {cell['high']:.1f}]"


def is_limited(record: Mapping[str, Any]) -> bool:
    """True for a cell or a pair of which not every question was asked."""
    return record["num_items"] < record["num_available"]


def _setting_parts(cell: Mapping[str, Any]) -> dict[str, str]:
    items = f"{cell['num_items']:,}" + (f" of {cell['num_available']:,}" if is_limited(cell) else "") + " items"
    chat = "chat template" if cell["chat_template"] else "no chat template"
    return {"metric": cell["metric"], "shots": f"{cell['num_fewshot']}-shot", "items": items, "chat": chat}


def format_setting(cells: Sequence[Mapping[str, Any]]) -> str:
    """What all cells of a row share: `acc, 5-shot, 57 of 2,850 items`."""
    parts = [_setting_parts(cell) for cell in cells]
    shared = [parts[0][key] for key in parts[0] if len({part[key] for part in parts}) == 1]
    return ", ".join(text for text in shared if text != "no chat template")


def own_setting(cell: Mapping[str, Any], cells: Sequence[Mapping[str, Any]]) -> str:
    """What a cell does not share with the others of its row: `57 of 2,850 items`; empty when it shares all."""
    own = _setting_parts(cell)
    return ", ".join(text for key, text in own.items() if any(_setting_parts(other)[key] != text for other in cells))


def limit_mark(record: Mapping[str, Any]) -> str:
    """`‡` for a cell or a pair of which not every question was asked."""
    return "‡" if is_limited(record) else ""


def published_mark(figures: Sequence[Mapping[str, Any]]) -> str:
    """`†` for a published figure that no arm is comparable with, `(†)` where some arms are not."""
    fair = [figure["comparable"] for figure in figures]
    return "" if all(fair) else "(†)" if any(fair) else "†"


NOT_COMPARABLE = (
    "† measured in another way than the published figure, so it is context and no comparison; (†) in another way for some arms."
)
MOST_COLUMNS = 7
"""Of scores, beside one another in a table."""
LIMITED = "‡ not every question was asked."


def mark_notes(results: Mapping[str, Any]) -> list[str]:
    """What the marks of the tables mean, of those that occur."""
    cells = results["comparison"]["cells"]
    other = any(not figure["comparable"] for cell in cells for figure in cell["figures"])
    return [*([NOT_COMPARABLE] if other else []), *([LIMITED] if any(map(is_limited, cells)) else [])]


def format_signed(value: float) -> str:
    """`+1.2` or `−1.2`, with a real minus sign."""
    return f"{value:+.1f}".replace("-", "−")


def format_p(value: float | None) -> str:
    """A p-value with two digits."""
    return "–" if value is None else "< 0.001" if value < 0.001 else f"{value:.2g}"


def format_number(value: Any) -> str:
    """A setting or measurement for reading: 403,200, 1.914, yes, –."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def results_table(results: Mapping[str, Any]) -> str:
    """The headline table of a report's results.json, with what its marks mean.

    A row a benchmark, a column an arm, then the published figures († not comparable); ‡ where not every question was asked.  More than
    `MOST_COLUMNS` of arms and figures are rows, and benchmarks the columns.
    """
    comparison, names = results["comparison"], results["names"]
    systems = results["systems"]
    rows = []
    for benchmark in comparison["benchmarks"]:
        cells = {cell["arm"]: cell for cell in comparison["cells"] if cell["benchmark"] == benchmark}
        all_cells = list(cells.values())
        figures = {s: found for s in systems if (found := [f for cell in all_cells for f in cell["figures"] if f["system"] == s])}
        published = [f"{figures[s][0]['value']:.1f}{published_mark(figures[s])}" if s in figures else "–" for s in systems]
        measured = [_measured(cells[arm], all_cells) if arm in cells else "–" for arm in comparison["arms"]]
        rows.append([names.get(benchmark, benchmark), format_setting(all_cells), *measured, *published])
    head = ["benchmark", "setting", *comparison["arms"], *systems.values()]
    if is_wide(results):
        head, *rows = (list(column) for column in zip(head, *rows, strict=True))
        table = markdown_table(head, rows, numbers=range(1, len(head)))
    else:
        table = markdown_table(head, rows, numbers=range(2, len(head)))
    return "\n\n".join([table, *mark_notes(results)])


def _measured(cell: Mapping[str, Any], cells: Sequence[Mapping[str, Any]]) -> str:
    own = own_setting(cell, cells)
    return f"{format_score(cell)}{limit_mark(cell)}" + (f" ({own})" if own else "")


def paired_table(results: Mapping[str, Any]) -> str:
    """Arms against the control on the same items."""
    comparison, names = results["comparison"], results["names"]
    rows = [
        [
            f"{pair['arm']} − {pair['control']}", names.get(pair["benchmark"], pair["benchmark"]), format_items(pair),
            f"{format_signed(pair['difference'])} [{format_signed(pair['low'])}, {format_signed(pair['high'])}]",
            "–" if pair["only_arm"] is None else f"{pair['only_arm']} : {pair['only_control']}", format_p(pair["p_value"]), format_p(pair["p_adjusted"]),
            f"{pair['resolves']:.1f}", pair["verdict"],
        ]
        for pair in comparison["paired"]
    ]  # fmt: skip
    rows += [
        [
            f"{mean['arm']} − {mean['control']}", f"mean of {mean['benchmarks']}{'‡' if mean['limited'] else ''}", "",
            f"{format_signed(mean['difference'])} [{format_signed(mean['low'])}, {format_signed(mean['high'])}]", "", "", "",
            f"{mean['resolves']:.1f}", mean["verdict"],
        ]
        for mean in comparison["paired_means"]
    ]  # fmt: skip
    head = ["pair", "benchmark", "items", "difference in points", "only one right", "p", "p (Holm)", "resolves from", "verdict"]
    return markdown_table(head, rows, numbers=range(2, 8))


def replicated_table(results: Mapping[str, Any]) -> str:
    """Arms against the control over several training runs of both."""
    names = results["names"]
    rows = [
        [
            f"{pair['arm']} − {pair['control']}", f"{replicated_name(pair, names)}{limit_mark(pair)}", f"{pair['runs_arm']} and {pair['runs_control']}",
            f"{format_signed(pair['difference'])} [{format_signed(pair['low'])}, {format_signed(pair['high'])}]",
            f"{pair['spread_arm']:.1f} and {pair['spread_control']:.1f}", format_p(pair["p_value"]), format_p(pair["p_adjusted"]), pair["verdict"],
        ]
        for pair in results["comparison"]["replicated"]
    ]  # fmt: skip
    head = ["pair", "benchmark", "training runs", "difference in points", "spread from run to run", "p", "p (Holm)", "verdict"]
    return markdown_table(head, rows, numbers=range(2, 7))


def replicated_name(pair: Mapping[str, Any], names: Mapping[str, str]) -> str:
    """The benchmark's name, or `mean`."""
    return "mean" if pair["benchmark"] is None else names.get(pair["benchmark"], pair["benchmark"])


def format_items(pair: Mapping[str, Any]) -> str:
    """`1,319`, or `57 of 14,042‡`."""
    return f"{pair['num_items']:,} of {pair['num_available']:,}‡" if is_limited(pair) else f"{pair['num_items']:,}"


def verdict_lines(results: Mapping[str, Any]) -> list[str]:
    """One sentence an arm and system, and an arm and control: the verdict, what it rests on, and what could not have been seen.

    Against the control an arm that was trained several times is all its runs; each by itself stands in the tables.
    """
    return [
        *(f"{v['arm']} outperforms {v['name']}: {v['outperforms']} ({verdict_basis(v)})" for v in results["comparison"]["verdicts"]),
        *(f"{m['arm']} against {m['control']}: {m['verdict']} ({mean_basis(m)})" for m in headline_means(results)),
        *(f"{p['arm']} against {p['control']} over training runs: {p['verdict']} ({runs_basis(p)})" for p in run_means(results)),
    ]


def further_runs(replicates: Mapping[str, Sequence[str]]) -> set[str]:
    """Arms that are another arm trained again.  replicates: arm -> its further runs."""
    return {run for runs in replicates.values() for run in runs}


def headline_means(results: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Arms against the control on the same items, of the arms that have no mean over several runs."""
    left = further_runs(results.get("replicates", {})) | {pair["arm"] for pair in run_means(results)}
    return [mean for mean in results["comparison"]["paired_means"] if mean["arm"] not in left]


def is_wide(results: Mapping[str, Any]) -> bool:
    """Whether the headline table has arms as rows."""
    return len(results["comparison"]["arms"]) + len(results["systems"]) > MOST_COLUMNS


def run_means(results: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The means over benchmarks of the arms that were trained several times."""
    return [pair for pair in results["comparison"]["replicated"] if pair["benchmark"] is None]


def runs_basis(pair: Mapping[str, Any]) -> str:
    """`+1.2 [−0.3, +2.7] points, 3 and 3 runs that spread by 0.4 and 0.5 points`."""
    difference = f"{format_signed(pair['difference'])} [{format_signed(pair['low'])}, {format_signed(pair['high'])}]"
    spread = f"{pair['runs_arm']} and {pair['runs_control']} runs that spread by {pair['spread_arm']:.1f} and {pair['spread_control']:.1f} points"
    return f"{difference} points, {spread}{'; in part‡' if is_limited(pair) else ''}"


def verdict_basis(verdict: Mapping[str, Any]) -> str:
    """`mean difference +1.2 [−0.3, +2.7] over 3 figures, cannot resolve less than 2.1 points; yes on 1, …; 2 not comparable†`."""
    other = f"{_count(verdict['not_comparable'], 'figure')} not comparable†" if verdict["not_comparable"] else ""
    if verdict["difference"] is None:
        return f"nothing comparable: {other}"
    counts = f"yes on {verdict['yes']}, no on {verdict['no']}, cannot tell on {verdict['cannot_tell']}"
    difference = f"{format_signed(verdict['difference'])} [{format_signed(verdict['low'])}, {format_signed(verdict['high'])}]"
    mean = f"mean difference {difference} over {_count(verdict['counted'], 'figure')}, cannot resolve less than {verdict['resolves']:.1f} points"
    return "; ".join([mean, counts, *([other] if other else [])])


def mean_basis(mean: Mapping[str, Any]) -> str:
    """`+1.2 [−0.3, +2.7] points over 3 benchmarks, cannot resolve less than 2.1 points; 2 of 3 benchmarks in part‡`."""
    difference = f"{format_signed(mean['difference'])} [{format_signed(mean['low'])}, {format_signed(mean['high'])}]"
    text = f"{difference} points over {mean['benchmarks']} benchmarks, cannot resolve less than {mean['resolves']:.1f} points"
    return text + (f"; {mean['limited']} of {mean['benchmarks']} benchmarks in part‡" if mean["limited"] else "")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def figure_rows(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each published figure with every arm's distance to it: benchmark, published, arms, comparable, source.

    Arms that were asked with the same settings share a row.
    """
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for cell in results["comparison"]["cells"]:
        for figure in cell["figures"]:
            note = "".join(f"; {text}" for text in (figure["note"], *figure["caveats"]) if text)
            shots = "number of examples not published" if figure["shots"] is None else f"{figure['shots']}-shot"
            row = rows.setdefault(
                (cell["benchmark"], figure["system"], tuple(figure["reasons"]), tuple(figure["caveats"])),
                {
                    "benchmark": results["names"].get(cell["benchmark"], cell["benchmark"]),
                    "published": f"{figure['name']} {figure['value']:.1f}{published_mark([figure])}",
                    "arms": [], "comparable": "no: " + "; ".join(figure["reasons"]) if figure["reasons"] else "yes",
                    "source": f"{figure['source']} ({figure['date']}), {shots}{note}",
                },
            )  # fmt: skip
            row["arms"].append(
                {
                    "arm": cell["arm"],
                    "difference": format_signed(figure["difference"]) + limit_mark(cell),
                    "outperforms": figure["outperforms"],
                    "interval": f"{format_signed(figure['low'])} to {format_signed(figure['high'])}",
                    "resolves": f"{figure['resolves']:.1f}",
                }
            )
    return list(rows.values())


def report_markdown(results: Mapping[str, Any]) -> str:
    """The whole report as Markdown."""
    parts = [f"# {results['title']}", "\n".join(f"- {line}" for line in verdict_lines(results)), results_table(results)]
    if results["comparison"]["paired"]:
        parts += [f"## Against the control ({results['control_arm']}), on the same items", paired_table(results)]
    if results["comparison"]["replicated"]:
        parts += ["## Over several training runs", replicated_table(results)]
    parts += list(results["comparison"]["not_paired"])
    if rows := figure_rows(results):
        lines = [
            [
                r["benchmark"],
                r["published"],
                "; ".join(f"{a['arm']} {a['difference']} [{a['interval']}] ({a['outperforms']})" for a in r["arms"]),
                r["comparable"],
                r["source"],
            ]
            for r in rows
        ]
        head = ("benchmark", "published", "measured minus published (outperforms)", "comparable", "source")
        parts += ["## Against published figures", markdown_table(head, lines, numbers=(1,))]
    if results["training"]:
        facts = ("steps", "tokens", "loss_first", "loss_last")
        rows = [[arm, run["method"], *(format_number(run["facts"].get(key)) for key in facts)] for arm, run in results["training"].items()]
        parts += ["## Training", markdown_table(["arm", "method", "steps", "tokens", "first loss", "last loss"], rows, numbers=range(2, 6))]
    parts += ["## How to read this", "\n".join(f"- {rule}" for rule in results["rules"])]
    return "\n\n".join(parts) + "\n"
