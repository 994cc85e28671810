"""One training run in Markdown: its numbers, and its curves as embedded SVG pictures, for a page that has no files of its own.

training_markdown(title, object, events)     a run that has ended
live_markdown(title, events, line)           a run that is under way, from its events alone
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pesc.data_uri import as_data_uri
from pesc.evaluate.records import Training, read_training
from pesc.markdown import markdown_table

_ROUTER = re.compile(r"layers\.(\d+)\..*(?:router|gate)\.weight$")
_LIVE_POINTS = 600
"""Of a curve that is drawn again and again."""


def training_markdown(title: str, folder: Path, events: Path) -> str:
    """folder: a train object; events: its events.jsonl, which need not exist.  Raises FileNotFoundError when it is no train object."""
    run = read_training(folder)
    if run is None:
        raise FileNotFoundError(f"{folder} has no training record")
    parts = [f"# {title}", markdown_table(["", ""], list(_facts(run, read_steps(events))))]
    if run.held_out:
        parts += [
            "## Held-out loss, nats per token",
            markdown_table(["domain", "before", "after"], list(_held_out_rows(run)), numbers=(1, 2)),
        ]
    parts += [f"![{label}]({as_data_uri(svg)})" for label, svg in _plots(run, folder).items()]
    return "\n\n".join(parts) + "\n"


def live_markdown(title: str, events: Path, line: str) -> str | None:
    """line: how far it is, in words.  None as long as there is nothing to draw."""
    steps, looks = read_steps(events), read_steps(events, "evaluation")
    run = Training("", {}, (), {}, history=tuple(_thinned(steps)), held_out=tuple(_thinned(looks)))
    drawn = _plots(run, None)
    if not drawn:
        return None
    parts = [f"# {title}", f"Under way: {line}"]
    if facts := list(_facts(run, steps)):
        parts.append(markdown_table(["", ""], [fact for fact in facts if fact[0] != "method"]))
    if run.held_out:
        parts += [
            "## Held-out loss, nats per token",
            markdown_table(["domain", "before", "now"], list(_held_out_rows(run)), numbers=(1, 2)),
        ]
    return "\n\n".join([*parts, *(f"![{label}]({as_data_uri(svg)})" for label, svg in drawn.items())]) + "\n"


def _thinned(lines: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """Some of them, evenly, the last among them."""
    every = -(-len(lines) // _LIVE_POINTS) or 1
    return lines[::-1][::every][::-1]


def read_steps(events: Path, kind: str = "step") -> list[Mapping[str, Any]]:
    """A run's events of a kind, one a step: of a step that a continued run did again, the last counts; torn lines are passed over."""
    steps: dict[int, Mapping[str, Any]] = {}
    lines = events.read_text(encoding="utf-8", errors="replace").splitlines() if events.is_file() else []
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and event.get("event") == kind:
            steps[event["step"]] = event
    return [steps[number] for number in sorted(steps)]


def _facts(run: Training, steps: Sequence[Mapping[str, Any]]) -> Iterator[list[str]]:
    losses, left_out = run.series("loss"), [line["step"] for line in run.history if "skipped" in line]
    yield ["method", run.method]
    if losses[1]:
        yield ["steps", f"{losses[0][-1]:,}"]
        yield ["loss of the first and the last step", f"{losses[1][0]:.4f} → {losses[1][-1]:.4f}"]
    if left_out:
        yield ["steps left out", ", ".join(map(str, left_out))]
    for group in run.trainable:
        if isinstance(group.get("parameters"), int):
            yield [f"trained: {group.get('group', '')}", f"{group['parameters']:,} parameters"]
    for key, label, scale, form in (
        ("tokens_per_second", "tokens/s (median step)", 1, ",.0f"),
        ("mfu", "MFU (median step)", 100, ".1f"),
        ("memory_bytes", "peak memory of rank 0, GB", 1e-9, ".2f"),
    ):
        values = [step[key] for step in steps if isinstance(step.get(key), int | float)]
        if values:
            value = max(values) if key == "memory_bytes" else statistics.median(values)
            yield [label, f"{value * scale:{form}}{' %' if key == 'mfu' else ''}"]


def _held_out_rows(run: Training) -> Iterator[list[str]]:
    for domain in run.domains:
        _, losses = run.held_out_series(domain)
        if losses:
            yield [domain, f"{losses[0]:.4f}", f"{losses[-1]:.4f}"]


def _plots(run: Training, folder: Path | None) -> dict[str, str]:
    from pesc.evaluate import plots

    arm = run.method or "training"
    colours = {arm: plots.ARM_COLOURS.get(arm, plots.SPARE_COLOURS[0])}
    drawn = {}
    if run.series("loss")[0]:
        drawn["training loss by step"] = plots.plot_training({arm: run}, colours)
    if run.domains:
        drawn["held-out loss by step and domain"] = plots.plot_held_out({arm: run}, colours)
    load, experts = run.expert_load, count_experts(folder) if folder else {}
    if load and len(experts) == len(load["max"][0]):
        drawn["share of the busiest expert by layer and step"] = plots.plot_expert_load(load, experts)
    return drawn


def count_experts(folder: Path) -> dict[int, int]:
    """Layer -> number of its experts, from the shapes of the trained routers."""
    from safetensors import safe_open

    counts = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118  (no iterator)
                if found := _ROUTER.search(name):
                    counts[int(found[1])] = file.get_slice(name).get_shape()[0]
    return dict(sorted(counts.items()))
