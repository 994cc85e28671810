"""What other stages recorded, read for the report: training, merge proof, data counts.

Tolerant on purpose: a stage that is absent, or records less, leaves its part of the page out; it never stops the report.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pesc.errors import EvaluationError
from pesc.heldout.results import HeldOutResult
from pesc.heldout.results import read_result as read_losses
from pesc.routing.results import RoutingResult, read_result

logger = logging.getLogger(__name__)
REMOVALS = {
    "malformed": "not a conversation", "filter_short_answer": "answer too short", "filter_too_long": "too long", "filter_refusal": "refusal",
    "filter_ngram_loop": "repeats itself", "filter_unclosed_code": "code fence left open", "filter_copied_prompt": "copies the prompt",
    "exact": "exact duplicate", "near": "near duplicate", "contaminated": "in a benchmark", "group_cap": "over the cap of its group",
}  # fmt: skip
"""Counts of a dedup object's stats.json, in the order of the steps, and what the page calls them; other filters go by their names."""


@dataclass(frozen=True)
class Training:
    """One arm's run: settings, what was trained, and a line a step (history.jsonl)."""

    method: str
    settings: Mapping[str, Any]
    trainable: tuple[Mapping[str, Any], ...]
    facts: Mapping[str, Any]
    history: tuple[Mapping[str, Any], ...] = ()
    held_out: tuple[Mapping[str, Any], ...] = ()
    """A line a look at the held-out blocks (held_out.jsonl)."""

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Steps and values of one measurement, where it is there."""
        found = [(line["step"], line[key]) for line in self.history if isinstance(line.get(key), int | float) and "step" in line]
        return [step for step, _ in found], [float(value) for _, value in found]

    def held_out_series(self, domain: str) -> tuple[list[int], list[float]]:
        """Steps and held-out losses of one domain, where they are known."""
        found = [(line["step"], (line["domains"].get(domain) or {}).get("loss")) for line in self.held_out]
        known = [(step, float(loss)) for step, loss in found if loss is not None]
        return [step for step, _ in known], [loss for _, loss in known]

    @property
    def domains(self) -> list[str]:
        """The domains of the held-out blocks, by name."""
        return sorted({name for line in self.held_out for name in line["domains"]})

    @property
    def expert_load(self) -> Mapping[str, Any] | None:
        """The experts' load of all steps by layer: {"steps": [S], "max"|"entropy": [S][L]}; None for dense arms."""
        lines = [line for line in self.history if isinstance(line.get("experts"), Mapping) and line["experts"].get("max")]
        if not lines:
            return None
        keys = [key for key in ("max", "min", "entropy", "dead") if all(key in line["experts"] for line in lines)]
        return {"steps": [line["step"] for line in lines], **{key: [line["experts"][key] for line in lines] for key in keys}}


@dataclass(frozen=True)
class Records:
    """Everything found beside the evaluations."""

    training: dict[str, Training] = field(default_factory=dict)
    proofs: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    dedup: Mapping[str, Any] | None = None
    mix: Mapping[str, Any] | None = None
    tokenize: Mapping[str, Any] | None = None
    routing: dict[str, RoutingResult] = field(default_factory=dict)
    losses: dict[str, HeldOutResult] = field(default_factory=dict)
    """Of the final models, on the held-out rows, by arm."""


def parse_address(address: str) -> tuple[str, str]:
    """`stage[instance]` as (stage, instance); the instance is "" for a stage that runs once."""
    match = re.fullmatch(r"([\w-]+)(?:\[([^\]]+)\])?", address)
    return (match[1], match[2] or "") if match else (address, "")


def address_order(address: str) -> tuple[str, ...]:
    """To sort by: stage, arm, benchmark, so that an arm comes before its further runs (`pesc`, `pesc-s2`)."""
    stage, instance = parse_address(address)
    return (stage, *instance.split("/"))


def read_records(inputs: Mapping[str, Path]) -> Records:
    """Records of all inputs of a report, by their addresses."""
    training, proofs, stats, routing, losses = {}, {}, {}, {}, {}
    for address, folder in sorted(inputs.items(), key=lambda item: address_order(item[0])):
        stage, instance = parse_address(address)
        if stage == "train" and (found := read_training(folder)):
            training[instance] = found
        elif stage == "merge" and (proof := read_json(folder / "proof.json")):
            proofs[instance] = proof
        elif stage in {"dedup", "mix", "tokenize"}:
            stats[stage] = read_json(folder / "stats.json")
        elif stage == "routing" and (seen := read_routing(folder)):
            routing[instance] = seen
        elif stage == "heldout" and (measured := _read_losses(folder)):
            losses[instance] = measured
    return Records(training, proofs, stats.get("dedup"), stats.get("mix"), stats.get("tokenize"), routing, losses)


def read_json(path: Path) -> Mapping[str, Any] | None:
    """A JSON map, or None (with a warning) where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        logger.warning("the report leaves out %s: %s", path.name, type(error).__name__)
        return None
    return value if isinstance(value, dict) else None


def read_routing(folder: Path) -> RoutingResult | None:
    """A routing object; None (with a warning) when it cannot be read."""
    try:
        return read_result(folder)
    except (OSError, ValueError) as error:
        logger.warning("the report leaves out the routing: %s", type(error).__name__)
        return None


def _read_losses(folder: Path) -> HeldOutResult | None:
    try:
        return read_losses(folder)
    except EvaluationError as error:
        logger.warning("the report leaves out held-out losses: %s", error)
        return None


def read_training(folder: Path) -> Training | None:
    """A train object; None (with a warning) when it has no record."""
    record = read_json(folder / "training.json")
    if record is None:
        return None
    config = record.get("config") or {}
    facts = {key: value for key, value in (record.get("facts") or {}).items() if not key.startswith("held_out")}
    history, held_out = _read_lines(folder / "history.jsonl"), _read_lines(folder / "held_out.jsonl")
    return Training(str(config.get("method", "")), config, tuple(record.get("trainable") or ()), facts, history, held_out)


def _read_lines(path: Path) -> tuple[Mapping[str, Any], ...]:
    if not path.is_file():
        return ()
    return tuple(json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip())


def data_funnel(dedup: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """One entry a data set: name, domain, read, kept, removed {reason: rows} (reasons with rows only)."""
    funnel = []
    for name, counts in sorted(((dedup or {}).get("datasets") or {}).items()):
        others = {key: key.removeprefix("filter_").replace("_", " ") for key in sorted(counts) if key.startswith("filter_")}
        known = {label: counts[key] for key, label in {**others, **REMOVALS}.items() if counts.get(key)}
        rest = counts.get("read", 0) - counts.get("kept", 0) - sum(known.values())
        removed = {**known, **({"other reasons": rest} if rest > 0 else {})}
        funnel.append(
            {
                "name": name,
                "domain": counts.get("domain", ""),
                "read": counts.get("read", 0),
                "kept": counts.get("kept", 0),
                "removed": removed,
            }
        )
    return funnel
