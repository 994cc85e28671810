"""Simulated benchmarks for the error rates of verdicts: arms whose true difference is known, answered through real samples and results."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from pesc.evaluate.baselines import Baselines
from pesc.evaluate.comparison import Comparison, compare
from pesc.evaluate.results import Sample
from tests.evaluate.builders import make_result, make_samples

SHARE = 0.6
"""How many questions the control has right, in truth."""


@lru_cache(maxsize=32)
def _pool(task: str, count: int) -> tuple[list[Sample], list[Sample]]:
    """Every question of a benchmark answered wrong, and answered right: made once, drawn from in each repetition."""
    return make_samples([0] * count, task), make_samples([1] * count, task)


def draw_pairs(rng: np.random.Generator, count: int, discordant: float, difference: float) -> tuple[np.ndarray, np.ndarray]:
    """Right or wrong of arm and control: `discordant` of the questions only one has right, the arm `difference` more of them."""
    both = SHARE - (discordant - difference) / 2
    shares = [both, (discordant + difference) / 2, (discordant - difference) / 2, 1 - both - discordant]
    kinds = rng.choice(4, size=count, p=shares)
    return np.isin(kinds, (0, 1)).astype(int), np.isin(kinds, (0, 2)).astype(int)


def compare_once(
    seed: int, sizes: dict[str, int], *, difference: float, discordant: float = 0.1, system_correlation: float = 0.0
) -> Comparison:
    """One repetition through the real `compare`: arm against control on the same items, and both against a published system.

    The system's true share is the control's; its published figure is what it scored on its own draw of the same questions, of which
    it shares `system_correlation` with the control.
    """
    rng = np.random.default_rng(seed)
    results, answers, figures = {}, {}, []
    for task, count in sizes.items():
        arm, control = draw_pairs(rng, count, discordant, difference)
        copied = rng.random(count) < system_correlation
        system = np.where(copied, control, rng.random(count) < SHARE)
        for name, right in (("arm", arm), ("control", control)):
            wrong_samples, right_samples = _pool(task, count)
            results[name, task] = make_result(right.tolist(), task=task)
            answers[name, task] = [(right_samples if r else wrong_samples)[index] for index, r in enumerate(right.tolist())]
        value = round(100 * float(system.mean()), 1)
        figures.append(
            {
                "system": "x",
                "benchmark": task,
                "value": value,
                "shots": 5,
                "metric": "accuracy",
                "source": "a simulation",
                "date": "2024-01",
            }
        )
    rows = {task: {"name": task, "items": count, "tasks": [task]} for task, count in sizes.items()}
    baselines = Baselines.model_validate({"benchmarks": rows, "systems": {"x": {"name": "X", "kind": "open"}}, "figures": figures})
    return compare(results, answers, ("arm", "control"), "control", ("x",), baselines)
