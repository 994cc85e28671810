"""The Prefect tasks: one thin file a stage around the same body that `pesc run` uses.

What it is
    cluster.py      a stage's shards on Dask or Ray
    table.py        stage name -> task
    execution.py    the shared body: call a task on a job, show how far it is and what came of it
    runner.py       who builds what a task is for: this machine, or (flows/dispatch.py) a flow run elsewhere
    retries.py      which failures are tried again
    patience.py     how long a server that does not answer is waited for
    policy.py       Prefect's cache key and record, tied to the store
    states.py       the final states of task runs: what a job waits for, what a failed one leaves behind
    secrets.py      tokens from the environment or Prefect's Secret blocks, and nowhere else
    reporting/      plans, progress, manifests and reports as artifacts of the Prefect UI
    download.py ... report.py    one task each

Key contracts
- The store is the one truth. Prefect's cache record lies inside the action's directory, is removed when the store misses the action,
  and is written when the store has it. A task is `Cached` exactly when the store has the result.
- A task returns an `ArtifactRef` of under 1 KB, never data.
- A stage's processes are started by the main thread alone (`pesc.launch`): only it receives a cancellation. So a stage's task is called
  directly; benchmarks that run at the same time are submitted to threads, which hand their jobs to the main thread and wait
  (`runner.py`). A stage's shards may be submitted to a cluster's task runner (`cluster.py`).
- A failure is tried again for its class alone: trouble of a network, or a machine that was taken away.
- A view of the UI that cannot be written is a warning, and is not waited for while something is being built.
- Where the store is, is decided at each call and never at import.

Never: mathematics, data, or a decision about what runs; those are in `pesc`.

Pitfalls
- Prefect logs a failing cache key and goes on uncached, so the policy is total.
- `retry_condition_fn` must be a plain function: Prefect 3.8 takes any other callable for "never".
"""
