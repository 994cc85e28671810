"""The command line that starts the ranks of one node."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from pesc.errors import RecipeError
from pesc.launch.network import Place, find_place
from pesc.stage import Execution

DEFAULT_PORT = 29500
_LAST_CALL_SECONDS = 1  # nnodes is exact: nobody comes after the last
_READ_SECONDS = 60


def build_argv(
    module: str,
    arguments: Sequence[str],
    execution: Execution,
    processes_per_node: int,
    run_id: str = "pesc",
    place: Place | None = None,
) -> list[str]:
    """`python -m torch.distributed.run ... -m MODULE ARG...`.

    One node rendezvous on a free port; several meet at `execution.master` (c10d), each with this same command.  run_id: equal on all
    nodes of a run.  place: this node's, found when None.  No restarts: those belong to the stage, where they are visible.
    Raises RecipeError when several nodes have no master.
    """
    head = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes_per_node}", "--max-restarts=0"]
    return [*head, *_rendezvous(execution, run_id, place), "-m", module, *arguments]


def meeting_point(execution: Execution) -> tuple[str, int]:
    """Host and port of `execution.master`.  Raises RecipeError when it does not say them."""
    if execution.master is None:
        raise RecipeError(f"execution.num_nodes is {execution.num_nodes}, so execution.master must say host:port of one of them.")
    host, _, port = execution.master.rpartition(":")
    if not host:
        host, port = execution.master, str(DEFAULT_PORT)
    if not port.isdigit():
        raise RecipeError(f"execution.master is {execution.master!r}, but must be host:port.")
    return host, int(port)


def _rendezvous(execution: Execution, run_id: str, place: Place | None) -> list[str]:
    """The ranks of the nodes follow the order of their addresses, so that a node that comes back gets its old ranks."""
    if execution.num_nodes == 1:
        return ["--standalone"]
    host, port = meeting_point(execution)
    place = place or find_place(host, port)
    patience = execution.join_timeout
    conf = {"join_timeout": patience, "last_call_timeout": _LAST_CALL_SECONDS, "read_timeout": min(patience, _READ_SECONDS)}
    conf |= {} if place.hosts is None else {"is_host": int(place.hosts)}
    argv = [
        f"--nnodes={execution.num_nodes}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={host}:{port}",
        f"--rdzv-id={run_id}",
        f"--rdzv-conf={','.join(f'{name}={value}' for name, value in conf.items())}",
    ]
    address = execution.address or place.address
    return [*argv, f"--local-addr={address}"] if address else argv
