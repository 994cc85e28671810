"""Each action as a flow run of its stage's deployment, on whatever worker takes it.

    runner = Dispatched("demo", ["train.seed=1"], store=None, deployments=chosen_deployments(None))
    run_chain(load_recipe("demo", ["train.seed=1"]), open_store(None), selection, runner)

Key contracts
- An action that the store has starts no worker.
- A child gets the recipe, its overrides, the instance and the store's place, and derives everything else: its inputs come from recipe and
  store. When it has ended well, its result is looked up in the store, under the name that the recipe gives it.
- A child is linked under the task run of its action, is called like it (`train[pesc] demo 3f2a91bc`), and bears the parent's tags.
- A child's failure is the parent's: same class, same sentence. What is worth another try, the child has tried; a worker that was lost with
  its child is another try here.
- Whatever ends the parent in an orderly way ends its children; `hooks.on_cancellation` does it once more from outside. The children
  of a parent that was killed go on, and the next run finds their results.
- A server that does not answer is waited for.

Never: builds anything here. The parent needs no GPU and holds none.
"""

from __future__ import annotations

import contextlib
import copy
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, TypeVar
from uuid import UUID

import httpx
from prefect import get_run_logger
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import FlowRun
from prefect.context import TaskRunContext
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.runtime import flow_run
from prefect.settings import PREFECT_API_URL

from flows.chain import CHILD_TAG
from flows.children import Pickup, cancel, cancel_children, children_of, error_of
from pesc.build import Job, OpenShards, Outcome
from pesc.errors import InterruptedStageError, PescError, RecipeError, StoreError, WorkerLostError
from pesc.pipeline import Node, build_graph, stage_named
from pesc.plan import Plan
from pesc.stage import Progress
from pesc.store import Manifest, Store
from pesc.store.changes import changes_between
from tasks.patience import impatient

T = TypeVar("T")
ROLE_TAGS = {"pipeline", "stage", "maintenance"}
"""Tags that say what a deployment is; a child has its own."""
FIRST_LOOK_SECONDS, LAST_LOOK_SECONDS = 0.5, 5.0
"""Between two looks at a child: soon at first, for short stages."""
SERVER_SECONDS = 2.0
"""Between two tries to reach a server that does not answer."""
Place = tuple[str | None, str | None]
"""Work pool and queue."""
ADVICE = "Start the deployment pipeline/dispatched, with the same parameters, in place of this one: its queue is for runs that wait."
VISIBLE_SECONDS = 30.0
"""How long a result of another machine may take to be seen here: a network file system remembers for a while that something was not there."""


class Dispatched:
    """Has each job built by a flow run of its stage's deployment.  Used as it is for one job, and as a crew for several at once."""

    tried_again = (WorkerLostError,)

    def __init__(self, recipe: str, overrides: Sequence[str], store: str | None, deployments: Mapping[str, str]) -> None:
        self._given: dict[str, Any] = {"recipe": recipe, "overrides": list(overrides), "store": store}
        self._deployments = deployments
        self._starting, self._stopped = threading.Lock(), threading.Event()
        self._children: set[str] = set()
        self._nodes: Mapping[str, Node] = {}
        self._recipe = ""

    def prepare(self, plan: Plan) -> None:
        """Raises RecipeError when a deployment that will be needed is not there, or this run would be in its way."""
        if (flow_run.get_run_count() or 1) > 1:  # Prefect's Retry: the children of the first time are ours as well
            parent = UUID(flow_run.get_id())
            self._children |= {str(child.id) for child in self._ask(lambda client: children_of(client, parent))}
        self._nodes, self._recipe = build_graph(plan.recipe).by_address, plan.recipe.name
        needed = dict.fromkeys(self._deployments[a.node.stage.name] for a in plan if a.status == "RUN")
        places = {name: self._ask(lambda client, name=name: _place_of(client, name)) for name in needed}
        self._check_place({name: place for name, place in places.items() if place})
        if missing := [name for name, place in places.items() if place is None]:
            raise RecipeError(
                f"The Prefect server at {PREFECT_API_URL.value()} has no deployment {', '.join(missing)}, which would build a part of "
                f"{plan.recipe.name}. Make them with `python -m deployments.bootstrap`, or name others "
                "with the parameter `deployments`."
            )

    def _check_place(self, places: Mapping[str, Place]) -> None:
        """Raises RecipeError when this run would hold a GPU while it waits; warns when its children need the same slots as it."""
        mine: Place = self._ask(lambda client: _own_place(client, UUID(flow_run.get_id())))
        if mine[0] is None:  # started by hand, not by a worker
            return
        on_gpu = {name for stage, name in self._deployments.items() if stage_named(stage).wants_gpu and not name.endswith("/cpu")}
        if there := [name for name, place in places.items() if name in on_gpu and place[0] == mine[0]]:
            raise RecipeError(
                f"This run waits for others and would hold a worker of the pool {mine[0]!r} meanwhile, where {', '.join(there)} is to run: {ADVICE}"
            )
        if there := [name for name, place in places.items() if place == mine]:
            get_run_logger().warning(
                "This run and %s share the queue %s/%s: where its worker or the queue has a limit, they may wait for one another for ever. %s",
                ", ".join(there), *mine, ADVICE,
            )  # fmt: skip

    def build(self, store: Store, job: Job, _on_progress: Callable[[Progress], None], _shards: OpenShards) -> Outcome:
        """Start a child for the job, wait for it, and open its result.  What interrupts that ends the child."""
        started = time.monotonic()
        try:
            child = self._start(job)
            self._wait_for(child, job.address)
        except PescError:
            raise
        except BaseException:  # cancelled, Ctrl-C: also a child that was asked for and of which no answer has come yet
            self._end(lambda client: cancel_children(client, UUID(flow_run.get_id())))
            raise
        return Outcome(job.address, self._result(store, job, child).ref, "hit", time.monotonic() - started)  # built there, opened here

    def made(self, manifest: Manifest) -> bool:
        """Whether a child has built it."""
        return manifest.prefect_run in self._children

    # -- as a crew: every task's thread has its own child --------------------------------------------------------------------

    def crew(self, _store: Store, _slots: int) -> Dispatched:
        """The same, to be stopped on its own."""
        crew = copy.copy(self)
        crew._stopped = threading.Event()
        return crew

    def __enter__(self) -> Dispatched:
        return self

    def __exit__(self, kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None) -> None:
        self._stopped.set()

    def turn(self) -> None:
        """The main thread has nothing to do but to be there for signals."""
        time.sleep(0.1)

    def wait(self, seconds: float) -> bool:
        """Wait, unless the run is stopped."""
        return not self._stopped.wait(seconds)

    # -- one child -------------------------------------------------------------------------------------------------------------

    def _start(self, job: Job) -> FlowRun:
        context, name = TaskRunContext.get(), self._deployments[job.key.stage]
        node = self._nodes[job.address]
        holes = [address for input_name, address in node.inputs.items() if input_name not in job.inputs]
        parameters = {**self._given, "instance": node.instance or None, "refresh": job.refresh, "without": holes or None}
        own = [CHILD_TAG, f"recipe:{self._recipe}"]  # the second is how the UI finds everything of a recipe
        tags = list(dict.fromkeys([*own, *(tag for tag in flow_run.get_tags() if tag not in ROLE_TAGS)]))
        key = f"{context.task_run.id}-{context.task_run.run_count}" if context else None  # of this try: what was sent twice starts once

        def start(_client: SyncPrefectClient) -> FlowRun:
            with self._starting:  # Prefect counts the children of a flow run without a lock
                child = run_deployment(
                    name, parameters=parameters, timeout=0, flow_run_name=job.label, tags=tags, idempotency_key=key, as_subflow=True
                )
            assert isinstance(child, FlowRun)
            return child

        try:
            child = self._ask(start)
        except (ObjectNotFound, PrefectHTTPStatusError) as error:
            raise RecipeError(f"{job.address} cannot be dispatched: the Prefect server refuses a run of {name} ({error}).") from error
        self._children.add(str(child.id))
        self._name_stand_in(child, f"{job.address} by {name}")
        get_run_logger().info("%s is flow run %s of %s.", job.address, child.id, name)
        return child

    def _name_stand_in(self, child: FlowRun, text: str) -> None:
        """Prefect shows a child in its parent by a task run, and gives that a name of two random words."""
        with contextlib.suppress(httpx.HTTPError), impatient():
            if child.parent_task_run_id:
                get_client(sync_client=True).set_task_run_name(child.parent_task_run_id, text)

    def _wait_for(self, child: FlowRun, address: str) -> None:
        """Raises the error of a child that does not end well."""
        started, pickup = time.monotonic(), Pickup(address)
        while True:
            run = self._ask(lambda client: client.read_flow_run(child.id))
            if run.state and run.state.is_final():
                if not run.state.is_completed():
                    raise error_of(address, run)
                return
            if complaint := self._ask(lambda client, run=run: pickup.complaint(run, client)):
                get_run_logger().warning("%s", complaint)
            elapsed = time.monotonic() - started
            self._pause(min(LAST_LOOK_SECONDS, FIRST_LOOK_SECONDS + elapsed / 20), address, child)

    def _pause(self, seconds: float, address: str, child: FlowRun | None = None) -> None:
        if self._stopped.wait(seconds):
            if child:
                self._end(lambda client: cancel(client, child.id))
            raise InterruptedStageError(f"The run was stopped while {address} was under way; run it again to go on.")

    def _end(self, cancel_some: Callable[[SyncPrefectClient], object]) -> None:
        """Cancel children; the hook does it when this cannot."""
        try:
            with impatient():
                cancel_some(get_client(sync_client=True))
        except Exception as error:
            get_run_logger().warning("What this run has started could not be cancelled (%s: %s).", type(error).__name__, error)

    def _result(self, store: Store, job: Job, child: FlowRun) -> Manifest:
        end = time.monotonic() + VISIBLE_SECONDS
        store.forget(job.key.stage, job.fingerprint)  # what the remote had before the child
        while (manifest := store.find(job.key.stage, job.fingerprint)) is None:
            _refuse_other_result(store, job, child)
            if time.monotonic() > end:
                raise StoreError(
                    f"Flow run {child.name!r} has ended well, but its result is not in {store.root}: its worker has another store. Give all of "
                    "them the same PESC_STORE, or one PESC_REMOTE."
                )
            time.sleep(1.0)
        return manifest

    def _ask(self, question: Callable[[SyncPrefectClient], T]) -> T:
        """The server's answer, however long it is away."""
        said = False
        while True:
            try:
                with impatient():
                    return question(get_client(sync_client=True))
            except (httpx.TransportError, PrefectHTTPStatusError) as error:
                if isinstance(error, PrefectHTTPStatusError) and error.response.status_code < 500:
                    raise
                if not said:
                    get_run_logger().warning("The Prefect server does not answer (%s); waiting for it.", error or type(error).__name__)
                said = True
                self._pause(SERVER_SECONDS, "an action")


def _refuse_other_result(store: Store, job: Job, child: FlowRun) -> None:
    """Raises StoreError when a child has built something else than its parent meant."""
    made = (m for m in store.manifests(job.key.stage) if m.prefect_run == str(child.id) and m.fingerprint != job.fingerprint)
    if other := next(made, None):
        difference = "; ".join(changes_between(other.key, job.key)) or "no difference in the key"
        raise StoreError(
            f"Flow run {child.name!r} built {job.address} as {other.fingerprint[:8]} instead of {job.fingerprint[:8]} ({difference}): its worker has "
            "another recipe, or another version of the code."
        )


def _place_of(client: SyncPrefectClient, deployment: str) -> Place | None:
    """Pool and queue of a deployment; None when there is no such deployment."""
    try:
        found = client.read_deployment_by_name(deployment)
    except ObjectNotFound:
        return None
    return found.work_pool_name, found.work_queue_name


def _own_place(client: SyncPrefectClient, run: UUID) -> Place:
    found = client.read_flow_run(run)
    return found.work_pool_name, found.work_queue_name
