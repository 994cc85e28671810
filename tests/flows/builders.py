"""Builders of tests that need more than the fakes."""

from __future__ import annotations

import json

from pesc.stage import BuildResult, StageContext


def file_name(address: str) -> str:
    """`evaluate-pesc-quiz` for evaluate[pesc/quiz]."""
    return address.replace("[", "-").replace("/", "-").rstrip("]")


def build_report(ctx: StageContext) -> BuildResult:
    """The files that a report has."""
    (ctx.out / "report.md").write_text("| benchmark | pesc | qlora |\n| --- | --- | --- |\n| quiz | 61.0 | 60.5 |\n")
    (ctx.out / "report.html").write_text("<p>quiz</p>")
    (ctx.out / "results.json").write_text(json.dumps({"arms": list(ctx.inputs)}))
    return BuildResult()
