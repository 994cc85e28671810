"""What the server does by itself: a run whose process is gone, or that never began, is marked Crashed, and failures are told to somebody.

The first is needed on every self-hosted server: a flow run whose machine dies stays Running for ever, or Pending when it dies before the
run has begun, and holds its slot of a queue with a limit.  The second exists where PESC_WEBHOOK_URL is set when bootstrap runs: the
address is kept in a block, as a secret.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import ClassVar

from prefect.events.actions import ChangeFlowRunState, SendNotification
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture

from deployments.fleet import BootstrapError, Fleet
from deployments.server import Json, Server, Thing

ZOMBIES = "pesc: a run without a sign of life is Crashed"
UNBEGUN = "pesc: a run that a worker took and that does not begin is Crashed"
FAILURES = "pesc: tell of a run that failed or crashed"
BLOCK = "pesc-notices"
MISSED_HEARTBEATS = 3

WITHOUT_PROCESS = (
    "Completed", "Failed", "TimedOut", "Crashed", "Cancelled", "Paused", "Suspended", "Scheduled", "Late", "AwaitingRetry", "Resuming"
)  # fmt: skip
"""States in which a run has ended or has no process, so that nobody has to give a sign of life.

`prefect.flow-run.*` in their place would also take Running and Cancelling for a sign of life, and a run that dies after one of these (in its
first minutes, or while it is being cancelled) would never be found.  A state of another name that is final does no harm: the server
does not let a run out of a final state.
"""


def automation_things(fleet: Fleet) -> list[Thing]:
    """The automations, and the block of the notices where an address is told."""
    things: list[Thing] = [Automation(ZOMBIES, _fields(zombie_automation(fleet.heartbeat_seconds)))]
    pools = sorted(name for name, pool in fleet.pools.items() if pool.type != "slurm")
    if fleet.pending_seconds and pools:
        things.append(Automation(UNBEGUN, _fields(unbegun_automation(fleet.pending_seconds, pools))))
    if url := os.environ.get("PESC_WEBHOOK_URL"):
        if not url.startswith(("http://", "https://")):
            raise BootstrapError("PESC_WEBHOOK_URL is no web address: it begins with https://.")
        things += [Webhook(BLOCK, _webhook_fields(url), secret=frozenset({"secrets"})), FailureNotices(FAILURES, {})]
    return things


def zombie_automation(heartbeat_seconds: int) -> AutomationCore:
    """After a heartbeat, another one or a state without a process within three heartbeats; else Crashed."""
    within = timedelta(seconds=MISSED_HEARTBEATS * heartbeat_seconds)
    return AutomationCore(
        name=ZOMBIES,
        description="The process or its machine is gone. Finished stages and checkpoints are kept: run it again to go on.",
        trigger=EventTrigger(
            match={"prefect.resource.id": "prefect.flow-run.*"},  # type: ignore[arg-type]
            for_each={"prefect.resource.id"},
            after={"prefect.flow-run.heartbeat"},
            expect={"prefect.flow-run.heartbeat", *(f"prefect.flow-run.{name}" for name in WITHOUT_PROCESS)},
            posture=Posture.Proactive,
            threshold=1,
            within=within,
        ),
        actions=[
            ChangeFlowRunState(
                state="CRASHED",  # type: ignore[arg-type]
                message=f"No sign of life for {within.total_seconds():.0f} s: the worker or its machine is gone. "
                "Finished stages and checkpoints are kept: run it again to go on.",
            )
        ],
    )


def unbegun_automation(seconds: int, pools: list[str]) -> AutomationCore:
    """A run of these pools that a worker has taken (Pending) comes to another state within this time; else Crashed."""
    return AutomationCore(
        name=UNBEGUN,
        description="The worker that took it is gone, or cannot start it. A run in a queue of Slurm's is not meant.",
        trigger=EventTrigger(
            match={"prefect.resource.id": "prefect.flow-run.*"},  # type: ignore[arg-type]
            match_related={"prefect.resource.role": "work-pool", "prefect.resource.name": pools},  # type: ignore[arg-type]
            for_each={"prefect.resource.id"},
            after={"prefect.flow-run.Pending"},
            expect={f"prefect.flow-run.{name}" for name in ("Running", "Retrying", "Cancelling", *WITHOUT_PROCESS)},
            posture=Posture.Proactive,
            threshold=1,
            within=timedelta(seconds=seconds),
        ),
        actions=[
            ChangeFlowRunState(
                state="CRASHED",  # type: ignore[arg-type]
                message=f"A worker took this run, and then it gave no sign of life for {seconds} s: the worker is gone, or its image or its machine "
                "cannot be had. Look at the worker's log and run it again.",
            )
        ],
    )


def failure_automation(block_id: str) -> AutomationCore:
    """A notice for each of our runs that fails or crashes, with the sentence that says what to do."""
    return AutomationCore(
        name=FAILURES,
        description="Sent to PESC_WEBHOOK_URL.",
        trigger=EventTrigger(
            match={"prefect.resource.id": "prefect.flow-run.*"},  # type: ignore[arg-type]
            match_related={"prefect.resource.id": "prefect.tag.pesc", "prefect.resource.role": "tag"},  # type: ignore[arg-type]
            for_each={"prefect.resource.id"},
            expect={"prefect.flow-run.Failed", "prefect.flow-run.Crashed"},
            posture=Posture.Reactive,
            threshold=1,
            within=timedelta(0),
        ),
        actions=[
            SendNotification(
                block_document_id=block_id,  # type: ignore[arg-type]
                subject="{{ flow_run.state.name }}: {{ flow_run.name }}",
                body="{{ flow.name }}/{{ deployment.name }}: {{ flow_run.state.message }}\n{{ flow_run|ui_url }}",
            )
        ],
    )


def _fields(automation: AutomationCore) -> Json:
    """What is compared: without the numbers that the server gives, and with sets in order."""
    fields = automation.model_dump(mode="json", include={"name", "description", "trigger", "actions"})
    fields["trigger"] = {name: value for name, value in fields["trigger"].items() if name != "id"}
    for name in ("after", "expect", "for_each"):
        fields["trigger"][name] = sorted(fields["trigger"][name])
    return fields


class Automation(Thing):
    """An automation, found by its name.  Whether it is enabled belongs to the user."""

    kind: ClassVar[str] = "automation"

    def read(self, server: Server) -> Json | None:
        """The automation of this name."""
        found = self._found(server)
        return _fields(AutomationCore.model_validate(found)) if found else None

    def make(self, server: Server) -> None:
        """Make it, enabled."""
        server.post("automations/", {"enabled": True, **self.wanted})

    def change(self, server: Server, fields: Json) -> None:
        """Write it anew, on or off as it was."""
        found = self._found(server)
        assert found is not None
        server.put(f"automations/{found['id']}", {**self.wanted, "enabled": found["enabled"]})

    def _found(self, server: Server) -> Json | None:
        found = server.post("automations/filter", {"automations": {"name": {"any_": [self.name]}}})
        return found[0] if found else None


class FailureNotices(Automation):
    """The automation of the notices; it names the block by the number that the server has given it."""

    def read(self, server: Server) -> Json | None:
        """The automation of this name, when there is a block that it can name."""
        block = Webhook.document(server)
        if block is None:
            return None
        self.wanted = _fields(failure_automation(block["id"]))
        return super().read(server)

    def make(self, server: Server) -> None:
        """Make it, for the block that there is by now."""
        self.read(server)
        super().make(server)


def _webhook_fields(url: str) -> Json:
    return {
        "name": BLOCK,
        "url": "{{ url }}",
        "method": "POST",
        "json_data": {"text": "{{ subject }}\n{{ body }}", "content": "{{ subject }}\n{{ body }}"},
        "secrets": {"url": url},
    }


class Webhook(Thing):
    """The block with the address; what it sends is understood by Slack, Mattermost and Teams (`text`) and Discord (`content`)."""

    kind: ClassVar[str] = "block"
    _TYPE: ClassVar[str] = "custom-webhook"

    @classmethod
    def document(cls, server: Server) -> Json | None:
        """The block as the server has it."""
        return server.get(f"block_types/slug/{cls._TYPE}/block_documents/name/{BLOCK}?include_secrets=true")

    def read(self, server: Server) -> Json | None:
        """The block's fields."""
        found = self.document(server)
        return found["data"] if found else None

    def make(self, server: Server) -> None:
        """Make it, for the newest schema of its type."""
        block_type = server.get(f"block_types/slug/{self._TYPE}")
        if block_type is None:
            raise BootstrapError(f"The Prefect server has no blocks of the type {self._TYPE}: is it another version than this client?")
        schemas = server.post("block_schemas/filter", {"block_schemas": {"block_type_id": {"any_": [block_type["id"]]}}, "limit": 1})
        server.post(
            "block_documents/",
            {"name": self.name, "block_type_id": block_type["id"], "block_schema_id": schemas[0]["id"], "data": self.wanted},
        )

    def change(self, server: Server, fields: Json) -> None:
        """Change what it sends, or where."""
        found = self.document(server)
        assert found is not None
        server.patch(f"block_documents/{found['id']}", {"data": fields, "merge_existing_data": True})
