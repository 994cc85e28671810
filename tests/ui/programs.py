"""The project's flows with builders that take seconds, as a worker finds them: what the pictures of the Prefect UI are taken of.

tests.ui.programs.pipeline, .train, .gc ...      (deploy these in place of flows.pipeline.pipeline and its like)

The data stages are the real ones.  Training writes the files and events of a real one, a step each PESC_TEST_STEP_SECONDS; a benchmark's
score is the next number of the file PESC_TEST_SCORES.  Whatever else is asked for is a fake that takes a millisecond.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path

from pesc import pipeline as table
from pesc.errors import DataError
from pesc.stage import BuildResult, StageContext
from tests.evaluate.builders import make_result, make_samples

STEPS = 12
DOMAINS = ("code", "general")


def build_training(ctx: StageContext) -> BuildResult:
    """What a training leaves behind, without a model."""
    import numpy as np
    from safetensors.numpy import save_file

    seconds, events = float(os.environ.get("PESC_TEST_STEP_SECONDS", "0")), ctx.work / "events.jsonl"
    history, looks = [], []
    for step in range(STEPS + 1):
        loss = 2.4 / (1 + step) ** 0.2
        look = {"step": step, "loss": loss, "domains": {name: {"loss": loss + n, "tokens": 9} for n, name in enumerate(DOMAINS)}}
        looks.append(look)
        _append(events, {"event": "evaluation", **look})
        if step:
            experts = {"max": [0.3 + step / 90, 0.4], "min": [0.1, 0.2], "entropy": [0.9, 0.95], "dead": [0, 0]}
            history.append({"step": step, "loss": loss, "balance": 1.0 + 1 / step, "experts": experts})
            _append(events, {"event": "step", **history[-1], "tokens_per_second": 900.0 + step, "memory_bytes": 3.4e9})
        ctx.progress(step, STEPS, message="training", loss=loss, held_out=loss)
        time.sleep(seconds)
    save_file({f"model.layers.{n}.mlp.router.weight": np.zeros((4, 8), np.float32) for n in (0, 1)}, ctx.out / "bank.safetensors")
    record = {"config": {"method": ctx.config.method}, "trainable": [{"group": "router", "tensors": 2, "parameters": 64}], "facts": {}}
    (ctx.out / "training.json").write_text(json.dumps(record))
    for name, lines in (("history.jsonl", history), ("held_out.jsonl", looks)):
        (ctx.out / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return BuildResult(metrics={"steps": STEPS, "loss": history[-1]["loss"], "peak_memory_bytes": 3_400_000_000})


def _append(path: Path, event: dict) -> None:
    with path.open("a") as stream:
        stream.write(json.dumps(event) + "\n")


def build_evaluation(ctx: StageContext) -> BuildResult:
    """The next score of the file, so many of 100 right; 50 when there are none."""
    from pesc.evaluate.results import write_results

    right, arm = 50, ctx.address.partition("[")[2].partition("/")[0]
    scores = Path(os.environ["PESC_TEST_SCORES"])
    if arm == "pesc" and scores.exists():
        left = json.loads(scores.read_text())
        right = left[0]
        scores.write_text(json.dumps(left[1:] or left))
    correct = [1] * right + [0] * (100 - right)
    write_results(ctx.out, make_result(correct, task=ctx.config.task, settings=ctx.config), make_samples(correct, ctx.config.task))
    return BuildResult(metrics={"acc": right / 100})


def build_upcycle(ctx: StageContext) -> BuildResult:
    """Nothing; fails with a sentence when PESC_TEST_FAIL is there."""
    if os.path.exists(os.environ.get("PESC_TEST_FAIL", "")):
        raise DataError(
            "The model's file model-00002.safetensors ends after 3 of 9 MB. Download it again: pesc run RECIPE --refresh download[base]."
        )
    return build_nothing(ctx)


def build_nothing(ctx: StageContext) -> BuildResult:
    """A name."""
    (ctx.out / "data.json").write_text(json.dumps(ctx.address))
    return BuildResult(metrics={"tensors": 3})


def install() -> None:
    """Put the builders in their places."""
    builders = {
        "upcycle": "tests.ui.programs:build_upcycle", "train": "tests.ui.programs:build_training", "merge": "tests.ui.programs:build_nothing",
        "evaluate": "tests.ui.programs:build_evaluation", "routing": "tests.tasks.test_routing:build_routing",
    }  # fmt: skip
    for name, builder in builders.items():
        table._BY_NAME[name] = replace(table._BY_NAME[name], builder=builder, isolated=False, preflight="")


install()

from flows.maintenance import fsck, gc  # noqa: E402, F401  (found here by the deployments)
from flows.pipeline import pipeline  # noqa: E402, F401
from flows.stages import evaluate, train  # noqa: E402, F401
