"""A worker in a process of its own: runs a recipe of fake stages, or pushes or pulls a store.

python -m tests.store.worker run STORE RECIPE.yaml          prints {address: [digest, how]}
python -m tests.store.worker push|pull STORE                everything
The environment: PESC_REMOTE; TRACE, a file that gets a line for each builder that begins; BUILD_SECONDS, how long each takes; THREADS and
PIECE of the transfer; LEASE_SECONDS.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

from pesc import mirror, pipeline
from pesc.recipe import load_recipe
from pesc.run import run_recipe
from pesc.stage import BuildResult, StageContext
from pesc.store import Store, lease, transfer
from tests import fake_stages


def build(ctx: StageContext) -> BuildResult:
    """The fake builder, slower, with a trace."""
    with open(os.environ["TRACE"], "a") as trace:
        trace.write(f"{ctx.address}\n")
    time.sleep(float(os.environ.get("BUILD_SECONDS", "0")))
    return fake_stages.build(ctx)


def main(what: str, store: Store, *rest: str) -> None:
    transfer.THREADS = int(os.environ.get("THREADS", transfer.THREADS))
    transfer.PIECE = int(os.environ.get("PIECE", transfer.PIECE))
    lease.LEASE_SECONDS = float(os.environ.get("LEASE_SECONDS", lease.LEASE_SECONDS))
    if what == "push":
        mirror.push(store, mirror.chosen(store, ()))
    elif what == "pull":
        mirror.pull(store, mirror.chosen(store, (), from_remote=True))
    else:
        for name, stage in list(pipeline._BY_NAME.items()):
            pipeline._BY_NAME[name] = replace(stage, builder="tests.store.worker:build", isolated=False, preflight="")
        outcomes = run_recipe(load_recipe(rest[0]), store)
        print(json.dumps({address: [outcome.ref.digest, outcome.how] for address, outcome in outcomes.items()}))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main(sys.argv[1], Store(Path(sys.argv[2])), *sys.argv[3:])
