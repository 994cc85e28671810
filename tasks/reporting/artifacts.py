"""The one way in which an artifact is written: without secrets, and never at the cost of a run."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ParamSpec
from uuid import UUID

from prefect.artifacts import create_markdown_artifact, create_progress_artifact, create_table_artifact, update_progress_artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactUpdate
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId, ArtifactFilterKey
from prefect.client.schemas.sorting import ArtifactSort
from prefect.runtime import flow_run

from pesc.redaction import redact, redact_tree

logger = logging.getLogger(__name__)
P = ParamSpec("P")


def artifact_key(*parts: str) -> str:
    """A key that Prefect accepts: lower-case letters, digits and single dashes."""
    return re.sub(r"[^a-z0-9]+", "-", " ".join(parts).lower()).strip("-")


def best_effort(publish: Callable[P, None]) -> Callable[P, None]:
    """A view that cannot be written is a warning."""

    @functools.wraps(publish)
    def attempt(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            publish(*args, **kwargs)
        except Exception as error:
            logger.warning("%s: the Prefect UI will lack an artifact (%s: %s)", publish.__name__, type(error).__name__, error)

    return attempt


def write_markdown(key: str, text: str, description: str) -> UUID:
    """A new version of a page."""
    return _uuid(create_markdown_artifact(redact(text), key=key, description=redact(description)))


def rewrite_markdown(artifact: UUID, text: str, description: str) -> None:
    """Other words on a page that is there: no new version, and no event, which would hold the whole page again."""
    change = ArtifactUpdate(data=redact(text), description=redact(description)).model_dump(mode="json", exclude_unset=True)
    with get_client(sync_client=True) as client:
        client.request("PATCH", "/artifacts/{id}", json=change, path_params={"id": artifact})


def finish_markdown(key: str, text: str, description: str) -> None:
    """The last words on a page that this flow run has begun, as its newest version; a new one where it has not."""
    run = flow_run.get_id()
    mine = ArtifactFilter(key=ArtifactFilterKey(any_=[key]), flow_run_id=ArtifactFilterFlowRunId(any_=[UUID(run)])) if run else None
    with get_client(sync_client=True) as client:
        begun = client.read_artifacts(artifact_filter=mine, sort=ArtifactSort.CREATED_DESC, limit=1) if mine else []
    if begun:
        rewrite_markdown(begun[0].id, text, description)
    else:
        write_markdown(key, text, description)


def write_table(key: str, rows: Sequence[Mapping[str, Any]], description: str) -> None:
    """A new version of a table that can be searched."""
    create_table_artifact([dict(redact_tree(row)) for row in rows], key=key, description=redact(description))


def write_progress(key: str, percent: float, description: str) -> UUID:
    """A new bar."""
    return _uuid(create_progress_artifact(percent, key=key, description=redact(description)))


def move_progress(artifact: UUID, percent: float, description: str) -> None:
    """Another length of a bar that is there."""
    update_progress_artifact(artifact, percent, description=redact(description))


@best_effort
def tag_run(*tags: str) -> None:
    """Add tags to the flow run that is under way: what its deployment could not know."""
    run = flow_run.get_id()
    if run is not None:
        with get_client(sync_client=True) as client:
            client.update_flow_run(UUID(run), tags=sorted({*flow_run.get_tags(), *tags}))


def _uuid(value: Any) -> UUID:
    assert isinstance(value, UUID)  # the synchronous form of a call that Prefect types for both
    return value
