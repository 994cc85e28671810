"""Which task runs which stage."""

from __future__ import annotations

from tasks.dedup import dedup
from tasks.download import download
from tasks.evaluate import evaluate
from tasks.execution import StageTask
from tasks.heldout import heldout
from tasks.merge import merge
from tasks.mix import mix
from tasks.report import report
from tasks.routing import routing
from tasks.tokenize import tokenize
from tasks.train import train
from tasks.upcycle import upcycle

TASKS: dict[str, StageTask] = {
    stage.name: stage for stage in (download, dedup, mix, tokenize, upcycle, train, merge, evaluate, routing, heldout, report)
}  # fmt: skip
