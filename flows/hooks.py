"""One clear line in the run's log when it ends badly: what happened and how to go on.

Prefect calls hooks with keywords; `on_cancellation` and `on_crashed` run in the worker's process, outside of the flow run.
"""

from __future__ import annotations

from typing import Any

from prefect import Flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun, State
from prefect.logging.loggers import flow_run_logger

from flows.children import cancel_children

GO_ON = "Finished stages and checkpoints are kept: run it again to go on."


def on_failure(flow: Flow[..., Any], flow_run: FlowRun, state: State) -> None:
    """A stage failed, or the recipe cannot be used."""
    flow_run_logger(flow_run, flow).error("%s failed: %s %s", flow_run.name, _message(state), GO_ON)


def on_crashed(flow: Flow[..., Any], flow_run: FlowRun, state: State) -> None:
    """The process ended: killed, out of memory, or the machine went away."""
    flow_run_logger(flow_run, flow).error(
        "%s crashed: %s The stage's processes end with it; its lock is free. %s", flow_run.name, _message(state), GO_ON
    )


def on_cancellation(flow: Flow[..., Any], flow_run: FlowRun, state: State) -> None:
    """Somebody cancelled the run.  It ends its children itself; this is for those that it could not tell any more."""
    log = flow_run_logger(flow_run, flow)
    log.warning("%s was cancelled. %s", flow_run.name, GO_ON)
    with get_client(sync_client=True) as client:
        for child in cancel_children(client, flow_run.id):
            log.warning("%s, which it had started, was cancelled with it.", child.name)


def _message(state: State) -> str:
    text = (state.message or state.name or "").removeprefix("Flow run encountered an exception: ")
    return text if text.endswith((".", "!", "?")) else f"{text}."


HOOKS: dict[str, Any] = {"on_failure": [on_failure], "on_crashed": [on_crashed], "on_cancellation": [on_cancellation]}
"""Options of every flow."""
