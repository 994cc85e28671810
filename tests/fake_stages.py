"""Builders that do in a millisecond what the real ones do in minutes: read inputs, write bytes that depend on config and inputs.

They stand in for the real builders where the store, the plan and the runner are under test.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from pesc import pipeline
from pesc.errors import DataError
from pesc.stage import BuildResult, StageContext

CALLS: list[str] = []
"""Addresses built, in order."""
FAIL_AT: set[str] = set()
"""Addresses whose builder fails after writing half of its output."""


def build(ctx: StageContext) -> BuildResult:
    """Write one file that names the inputs' bytes and the settings that matter."""
    CALLS.append(ctx.address)
    config = ctx.config.model_dump(mode="json")
    if "near_duplicate_threshold" in config:  # a setting that changes the key but, within a decade, not the bytes
        config["near_duplicate_threshold"] = round(config["near_duplicate_threshold"])
    seen = {name: (path / "data.json").read_text() for name, path in ctx.inputs.items()}
    (ctx.out / "data.json").write_text(json.dumps({"config": config, "inputs": seen}, sort_keys=True))
    (ctx.out / "nested").mkdir()
    (ctx.out / "nested" / "constant.bin").write_bytes(b"\0" * 64)
    (ctx.work / "log.txt").write_text(f"building {ctx.address}\n")
    ctx.progress(1, 1)
    if ctx.address in FAIL_AT:
        raise DataError(f"{ctx.address} failed as asked: row 3 of data.json has no answer. Give it one.")
    return BuildResult(metrics={"rows": len(seen)})


def install(monkeypatch) -> None:
    """Replace every stage's builder."""
    CALLS.clear()
    FAIL_AT.clear()
    for name, stage in list(pipeline._BY_NAME.items()):
        monkeypatch.setitem(pipeline._BY_NAME, name, replace(stage, builder="tests.fake_stages:build", isolated=False, preflight=""))


def tiny_recipe_dict(folder: Path) -> dict:
    """A complete recipe over two local files."""
    for name in ("base", "rows"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "data.json").write_text(f'"{name}"')
    return {
        "name": "tiny",
        "base": "base",
        "sources": {"base": {"uri": str(folder / "base")}, "rows": {"uri": str(folder / "rows")}},
        "dedup": {"datasets": {"rows": {"source": "rows", "domain": "general"}}},
        "mix": {"total": 10, "weights": {"general": 1}},
        "evaluate": {"benchmarks": {"quiz": {"task": "arc_easy", "metric": "acc"}}},
        "arms": {"pesc": {"method": "pesc"}, "qlora": {"method": "qlora"}},
    }
