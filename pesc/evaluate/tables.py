"""The report's tables as text (Markdown).  Plain data in, str out: the CLI and the Prefect layer print the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def format_score(cell: Mapping[str, Any]) -> str:
    """`48.3 [46.1, 50.5]`."""
    if not cell["percent"]:
        return f"{cell['value']:.4g} [{cell['low']:.4g}, {cell['high']:.4g}]"
    return f"{cell['value']:.1f} [{cell['low']:.1f}, {cell['high']:.1f}]"


def format_setting(cell: Mapping[str, Any]) -> str:
    """`acc, 5-shot, 57 of 2,850`."""
    items = f"{cell['num_items']:,}" + (f" of {cell['num_available']:,}" if cell["num_items"] < cell["num_available"] else "") + " items"
    return ", ".join([cell["metric"], f"{cell['num_fewshot']}-shot", items, *(["chat template"] if cell["chat_template"] else [])])


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


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; first column to the left, the others to the right."""
    cleaned = [[str(value).replace("|", "\\|").replace("\n", " ") for value in row] for row in rows]
    rule = [":--", *["--:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [list(head), rule, *cleaned])


def results_table(results: Mapping[str, Any]) -> str:
    """The headline table of a report's results.json: a row a benchmark, a column an arm, then the published figures († not comparable)."""
    comparison, names = results["comparison"], results["names"]
    systems = results["systems"]
    rows = []
    for benchmark in comparison["benchmarks"]:
        cells = {cell["arm"]: cell for cell in comparison["cells"] if cell["benchmark"] == benchmark}
        figures = {figure["system"]: figure for cell in cells.values() for figure in cell["figures"]}
        marks = {
            system: all(not f["comparable"] for cell in cells.values() for f in cell["figures"] if f["system"] == system)
            for system in figures
        }
        published = [f"{figures[s]['value']:.1f}{'†' if marks[s] else ''}" if s in figures else "–" for s in systems]
        measured = [format_score(cells[arm]) if arm in cells else "–" for arm in comparison["arms"]]
        rows.append([names.get(benchmark, benchmark), format_setting(next(iter(cells.values()))), *measured, *published])
    return markdown_table(["benchmark", "setting", *comparison["arms"], *systems.values()], rows)


def paired_table(results: Mapping[str, Any]) -> str:
    """Arms against the control on the same items."""
    comparison, names = results["comparison"], results["names"]
    rows = [
        [
            f"{pair['arm']} − {pair['control']}", names.get(pair["benchmark"], pair["benchmark"]), f"{pair['num_items']:,}",
            f"{format_signed(pair['difference'])} [{format_signed(pair['low'])}, {format_signed(pair['high'])}]",
            "–" if pair["only_arm"] is None else f"{pair['only_arm']} : {pair['only_control']}", format_p(pair["p_value"]), format_p(pair["p_adjusted"]),
        ]
        for pair in comparison["paired"]
    ]  # fmt: skip
    rows += [
        [
            f"{mean['arm']} − {mean['control']}", f"mean of {mean['benchmarks']}", "",
            f"{format_signed(mean['difference'])} [{format_signed(mean['low'])}, {format_signed(mean['high'])}]", "", "", "",
        ]
        for mean in comparison["paired_means"]
    ]  # fmt: skip
    return markdown_table(["pair", "benchmark", "items", "difference in points", "only one right", "p", "p (Holm)"], rows)


def verdict_lines(results: Mapping[str, Any]) -> list[str]:
    """`pesc outperforms GPT-3.5: cannot tell (yes on 0, no on 1, cannot tell on 2 benchmarks)`."""
    return [
        f"{v['arm']} outperforms {v['name']}: {v['outperforms']} (yes on {v['yes']}, no on {v['no']}, cannot tell on {v['cannot_tell']} benchmarks)"
        for v in results["comparison"]["verdicts"]
    ]


def figure_rows(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each published figure with every arm's distance to it: benchmark, published, arms, comparable, source.

    Arms that were asked with the same settings share a row.
    """
    rows: dict[tuple[str, str, tuple[str, ...]], dict[str, Any]] = {}
    for cell in results["comparison"]["cells"]:
        for figure in cell["figures"]:
            note = f"; {figure['note']}" if figure["note"] else ""
            shots = "number of examples not published" if figure["shots"] is None else f"{figure['shots']}-shot"
            row = rows.setdefault(
                (cell["benchmark"], figure["system"], tuple(figure["reasons"])),
                {
                    "benchmark": results["names"].get(cell["benchmark"], cell["benchmark"]), "published": f"{figure['name']} {figure['value']:.1f}",
                    "arms": [], "comparable": "no: " + "; ".join(figure["reasons"]) if figure["reasons"] else "yes",
                    "source": f"{figure['source']} ({figure['date']}), {shots}{note}",
                },
            )  # fmt: skip
            row["arms"].append(
                {"arm": cell["arm"], "difference": format_signed(figure["difference"]), "outperforms": figure["outperforms"]}
            )
    return list(rows.values())


def report_markdown(results: Mapping[str, Any]) -> str:
    """The whole report as Markdown."""
    parts = [f"# {results['title']}", *verdict_lines(results), results_table(results)]
    if any(not f["comparable"] for cell in results["comparison"]["cells"] for f in cell["figures"]):
        parts.append("† measured with other settings than the published figure; see below why.")
    if results["comparison"]["paired"]:
        parts += [f"## Against the control ({results['control_arm']}), on the same items", paired_table(results)]
    parts += list(results["comparison"]["not_paired"])
    if rows := figure_rows(results):
        lines = [
            [
                r["benchmark"],
                r["published"],
                "; ".join(f"{a['arm']} {a['difference']} ({a['outperforms']})" for a in r["arms"]),
                r["comparable"],
                r["source"],
            ]
            for r in rows
        ]
        head = ("benchmark", "published", "measured minus published (outperforms)", "comparable", "source")
        parts += ["## Against published figures", markdown_table(head, lines)]
    if results["training"]:
        facts = ("steps", "tokens", "loss_first", "loss_last")
        rows = [[arm, run["method"], *(format_number(run["facts"].get(key)) for key in facts)] for arm, run in results["training"].items()]
        parts += ["## Training", markdown_table(["arm", "method", "steps", "tokens", "first loss", "last loss"], rows)]
    parts += ["## How to read this", "\n".join(f"- {rule}" for rule in results["rules"])]
    return "\n\n".join(parts) + "\n"
