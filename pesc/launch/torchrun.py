"""The command line that starts the ranks of one node."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from pesc.errors import RecipeError
from pesc.stage import Execution

DEFAULT_PORT = 29500


def build_argv(module: str, arguments: Sequence[str], execution: Execution, processes_per_node: int) -> list[str]:
    """`python -m torch.distributed.run ... -m MODULE ARG...`.

    One node rendezvous on a free port; several meet at `execution.master`.  No restarts: those belong to whoever ran the stage,
    where they are visible.  Raises RecipeError when several nodes have no master or this node's rank is out of range.
    """
    head = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes_per_node}", "--max-restarts=0"]
    return [*head, *_rendezvous(execution), "-m", module, *arguments]


def _rendezvous(execution: Execution) -> list[str]:
    if execution.num_nodes == 1:
        return ["--standalone"]
    if execution.master is None:
        raise RecipeError(f"execution.num_nodes is {execution.num_nodes}, so execution.master must say host:port of node 0.")
    if execution.node_rank >= execution.num_nodes:
        raise RecipeError(f"execution.node_rank is {execution.node_rank}, but must be below execution.num_nodes ({execution.num_nodes}).")
    host, _, port = execution.master.rpartition(":")
    if not host:
        host, port = execution.master, str(DEFAULT_PORT)
    if not port.isdigit():
        raise RecipeError(f"execution.master is {execution.master!r}, but must be host:port.")
    return [f"--nnodes={execution.num_nodes}", f"--node-rank={execution.node_rank}", f"--master-addr={host}", f"--master-port={port}"]
