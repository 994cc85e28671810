"""What the Prefect server knows of a flow run."""

from __future__ import annotations

import time
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId, FlowRunFilter


def task_states(flow_run_id: UUID, expected: int) -> dict[str, str]:
    """State name by address; task runs reach the server as events, so it waits until `expected` of them have ended."""
    with get_client(sync_client=True) as client:
        for _ in range(150):
            runs = client.read_task_runs(flow_run_filter=FlowRunFilter(id={"any_": [flow_run_id]}))
            if len(runs) >= expected and all(run.state and run.state.is_final() for run in runs):
                break
            time.sleep(0.1)
    return {run.name.split()[0]: run.state_name or "" for run in runs}


def task_messages(flow_run_id: UUID, expected: int) -> dict[str, str]:
    """State message by address."""
    task_states(flow_run_id, expected)
    with get_client(sync_client=True) as client:
        runs = client.read_task_runs(flow_run_filter=FlowRunFilter(id={"any_": [flow_run_id]}))
    return {run.name.split()[0]: (run.state.message if run.state else "") or "" for run in runs}


def run_name(flow_run_id: UUID) -> str:
    """The name that the UI shows."""
    with get_client(sync_client=True) as client:
        return client.read_flow_run(flow_run_id).name


def parents(flow_run_id: UUID, expected: int) -> dict[str, set[str]]:
    """Addresses by address: the arrows of the UI's graph."""
    task_states(flow_run_id, expected)
    with get_client(sync_client=True) as client:
        nodes = dict(client.request("GET", f"/flow_runs/{flow_run_id}/graph-v2").json()["nodes"])
    names = {run: node["label"].split()[0] for run, node in nodes.items()}
    return {names[run]: {names[parent["id"]] for parent in node["parents"]} for run, node in nodes.items()}


def artifacts(flow_run_id: UUID) -> dict[str, str]:
    """Text of a flow run's artifacts by key."""
    with get_client(sync_client=True) as client:
        answer = client.read_artifacts(artifact_filter=ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[flow_run_id])))
    return {artifact.key or artifact.type or "": str(artifact.data) for artifact in answer}


def logs(flow_run_id: UUID, wanted: str) -> list[str]:
    """Messages of a flow run's log, waiting until one holds `wanted`."""
    from prefect.client.schemas.filters import LogFilter, LogFilterFlowRunId

    messages: list[str] = []
    with get_client(sync_client=True) as client:
        for _ in range(100):
            records = client.read_logs(log_filter=LogFilter(flow_run_id=LogFilterFlowRunId(any_=[flow_run_id])), limit=200)
            messages = [record.message for record in records]
            if any(wanted in message for message in messages):
                break
            time.sleep(0.1)
    return messages
