"""What a recipe's results cost: time, GPU-hours, dollars at typical prices, and energy where it was measured.

From the manifests of what the store has; nothing is guessed: a GPU whose price is not known has none, and energy that was not
measured says so.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pesc.devices import PRICES_OF, device_of
from pesc.pipeline import stage_named
from pesc.plan import PlannedAction
from pesc.store import Manifest


@dataclass(frozen=True)
class Cost:
    """Of one action.  dollars: from and to, None without a GPU of a known price; kilowatt_hours: of the GPUs, None when not measured."""

    address: str
    seconds: float
    gpus: int
    gpu: str
    dollars: tuple[float, float] | None
    kilowatt_hours: float | None

    @property
    def gpu_hours(self) -> float:
        """Hours times GPUs."""
        return self.seconds * self.gpus / 3600


def cost_of(manifest: Manifest) -> Cost:
    """The cost of one result.  Training uses the GPUs of all its ranks, any other stage that wants one uses one."""
    names: list[str] = (manifest.environment.get("hardware") or {}).get("gpus") or []
    execution, stage = manifest.execution, manifest.key.stage
    count = 0
    if names and stage_named(stage).wants_gpu and execution.get("device") != "cpu":
        count = int(execution.get("num_nodes") or 1) * int(execution.get("num_processes") or len(names)) if stage == "train" else 1
    name = names[0].partition(",")[0] if count else ""
    device = device_of(name) if name else None
    hours = manifest.seconds * count / 3600
    joules = (manifest.energy or {}).get("joules")
    return Cost(
        manifest.address, manifest.seconds, count, name, (hours * device.price[0], hours * device.price[1]) if device else None,
        joules / 3.6e6 if joules is not None else None,
    )  # fmt: skip


def costs_of(actions: Iterable[PlannedAction]) -> list[Cost]:
    """The costs of a plan's results that are there."""
    return [cost_of(action.manifest) for action in actions if action.manifest]


def cost_rows(costs: Iterable[Cost]) -> list[list[str]]:
    """A row an action and one of the sums, as text: action, time, GPUs, GPU-hours, dollars, energy."""
    costs = list(costs)
    rows = [[c.address, time_text(c.seconds), f"{c.gpus} × {c.gpu}" if c.gpus else "–", *_amounts(c)] for c in costs]
    priced, measured = [c.dollars for c in costs if c.dollars], [c.kilowatt_hours for c in costs if c.kilowatt_hours is not None]
    whole = Cost(
        "together", sum(c.seconds for c in costs), 1, "", (sum(d[0] for d in priced), sum(d[1] for d in priced)) if priced else None,
        sum(measured) if measured else None,
    )  # fmt: skip
    hours = sum(c.gpu_hours for c in costs)
    return [*rows, ["together", time_text(whole.seconds), "", f"{hours:.2f}" if hours else "–", *_amounts(whole)[1:]]]


def _amounts(cost: Cost) -> list[str]:
    dollars = f"{cost.dollars[0]:.2f} – {cost.dollars[1]:.2f}" if cost.dollars else "–"
    energy = f"{cost.kilowatt_hours:.3f}" if cost.kilowatt_hours is not None else "not measured"
    return [f"{cost.gpu_hours:.2f}" if cost.gpus else "–", dollars, energy]


HEAD = ("action", "took", "GPUs", "GPU-hours", "dollars", "kWh of the GPUs")
NOTE = f"Dollars at typical on-demand prices of {PRICES_OF}. Energy is the GPUs' own count, of this machine; what was not measured is not guessed."


def time_text(seconds: float) -> str:
    """`41 s`, `12.5 min` or `3.1 h`."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
