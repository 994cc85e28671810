"""The Prefect flows: the whole pipeline, each stage alone, and the care of the store.

What it is
    pipeline.py      `python -m flows.pipeline demo`; the flow `pipeline`, in one process or dispatched
    stages.py        one flow a stage: rerun it alone; upstream results are found through recipe and store
    maintenance.py   gc, fsck and push
    chain.py         the loop that all of them share: resolve an action, call its task, hand its result on
    dispatch.py      each action as a flow run of its stage's deployment, on a worker of its own
    children.py      the flow runs that a run has started: how they failed, that nobody takes them up, how to end them
    naming.py        names of flow runs: stage, recipe, fingerprint
    parameters.py    typed parameters: every setting of a recipe, optional, with its bounds, in the UI's form
    hooks.py         one clear line when a run fails, crashes or is cancelled; the end of its children
    console.py       what a terminal shows
    server.py        Prefect's temporary server: patience, no telemetry, a database that it can read

Key contracts
- The same words as the command line: only, start (`--from`), until, refresh; patterns are stages or addresses.
- Upstream results are derived from recipe and store; nobody pastes identifiers, and no dispatched run is given one.
- A PescError reaches Prefect as it is, so the failed state shows the sentence that a terminal would, on whatever worker it was raised.
- Where an action is built is decided by the `Runner` that the chain is given (tasks/runner.py), and by nothing else.
- Tasks run one after another in the main thread; `execution.parallel_benchmarks` benchmarks of an arm at the same time.
- A benchmark that fails leaves a hole: the rest is run, the report shows it, and the flow run fails at its end.
- What concerns the whole recipe (plan, history, cost, the record of the run) is shown and recorded by the parent alone.

Never: wraps the chain in a Prefect transaction (one late failure would undo the record of every finished stage), retries a flow
(finished stages are hits anyway: run it again).
"""
