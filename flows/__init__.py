"""The Prefect flows: the whole pipeline, each stage alone, and the care of the store.

What it is
    pipeline.py      `python -m flows.pipeline demo`; the flow `pipeline`
    stages.py        one flow a stage: rerun it alone; upstream results are found through recipe and store
    maintenance.py   gc and fsck
    chain.py         the loop that both kinds share: resolve an action, call its task, hand its result on
    parameters.py    typed parameters: every setting of a recipe, optional, with its bounds, in the UI's form
    hooks.py         one clear line when a run fails, crashes or is cancelled
    console.py       what a terminal shows
    server.py        Prefect's temporary server: patience, no telemetry, a database that it can read

Key contracts
- The same words as the command line: only, start (`--from`), until, refresh; patterns are stages or addresses.
- Upstream results are derived from recipe and store; nobody pastes identifiers.
- A PescError reaches Prefect as it is, so the failed state shows the sentence that a terminal would.
- Tasks run one after another in the main thread; `execution.parallel_benchmarks` benchmarks of an arm at the same time.
- A benchmark that fails leaves a hole: the rest is run, the report shows it, and the flow run fails at its end.

Never: wraps the chain in a Prefect transaction (one late failure would undo the record of every finished stage), retries a flow
(finished stages are hits anyway: run it again).
"""
