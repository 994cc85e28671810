"""The flows as tests deploy them: their builders do what files in the folder PESC_TEST_TRACE ask for.

    python -m tests.flows.deployed RECIPE STORE [UNTIL...]        the same without a server

    NAME is an action as a file name, `train-pesc`; the folder holds
    NAME.sleep      seconds that it takes
    NAME.fail       the class and the sentence that it fails with, `DataError: row 3 has no answer`
    NAME.once       the same, the first time only
    NAME.endless    training that takes for ever, in real processes (`tests.flows.programs`)
and is told NAME.N.started for the N-th time that it is built, holding the pid of the flow's process.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import replace
from pathlib import Path

from flows.children import Pickup
from flows.pipeline import pipeline
from flows.stages import dedup, download, evaluate, heldout, merge, mix, report, routing, tokenize, train, upcycle
from pesc import errors
from pesc import pipeline as table
from pesc.plan import Selection
from pesc.recipe import load_recipe
from pesc.run import run_recipe
from pesc.stage import BuildResult, StageContext
from pesc.store import Store
from tests import fake_stages
from tests.flows import builders, programs

__all__ = ["dedup", "download", "evaluate", "heldout", "merge", "mix", "pipeline", "report", "routing", "tokenize", "train", "upcycle"]


def build(ctx: StageContext) -> BuildResult:
    """What the folder asks for, and then what the fakes do."""
    folder, name = Path(os.environ["PESC_TEST_TRACE"]), builders.file_name(ctx.address)
    number = len(list(folder.glob(f"{name}.*.started"))) + 1
    (folder / f"{name}.{number}.started").write_text(str(os.getpid()))
    if (folder / f"{name}.sleep").exists():
        time.sleep(float((folder / f"{name}.sleep").read_text()))
    if (folder / f"{name}.endless").exists():
        return programs.build_for_ever(ctx)
    for path in (folder / f"{name}.once", folder / f"{name}.fail"):
        if path.exists():
            kind, _, sentence = path.read_text().partition(": ")
            if path.suffix == ".once":
                path.unlink()
            raise getattr(errors, kind)(sentence)
    return builders.build_report(ctx) if ctx.address == "report" else fake_stages.build(ctx)


def install() -> None:
    """Put the builder in place of every stage's."""
    for name, stage in list(table._BY_NAME.items()):
        table._BY_NAME[name] = replace(stage, builder="tests.flows.deployed:build", isolated=False, preflight="", sources=())


install()
Pickup.FIRST_SECONDS = 3.0

if __name__ == "__main__":
    run_recipe(load_recipe(sys.argv[1]), Store(sys.argv[2]), Selection(until=tuple(sys.argv[3:])))
