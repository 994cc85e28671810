"""Deployments: which flow runs where, for a Prefect server.

    prefect server start                                                       # a server, with its UI on port 4200
    export PREFECT_API_URL=http://127.0.0.1:4200/api PESC_HOME=$PWD PESC_STORE=$PWD/store
    python -m deployments.bootstrap                                            # everything that it needs; as often as you like
    python -m deployments.worker --pool cpu --work-queue default --work-queue maintenance
    python -m deployments.worker --pool cpu --work-queue orchestrate           # parents of dispatched pipelines
    python -m deployments.worker --pool gpu --limit 1                          # on each GPU node
    prefect deployment run pipeline/gpu --param recipe=camelidae-8x7b
    prefect deployment run evaluate/gpu --param recipe=demo --param instance=pesc/gsm8k --param refresh=true

What it is
    prefect.yaml      every deployment: `pipeline` (inline, dispatched, nightly, weekly), each stage on CPUs and GPUs, the care of the store
    fleet.yaml        work pools, queues, limits around them; fleet.py what each setting means
    bootstrap.py      makes all of it on a server; declared.py, pools.py, automations.py its parts, server.py the API and what differs
    worker.py         a worker that lets its runs save before it stops
    work_pools/       what a run is started with, by type of pool: process, docker, kubernetes, slurm; with GPUs
    docker/           Dockerfile (targets cpu and gpu), compose.yaml (PostgreSQL, server, workers)
    systemd/          units for server and workers
    slurm/train.sbatch, kubernetes/pytorchjob.yaml      training on several nodes, without Prefect

Key contracts
- What bootstrap makes is as the files say, field by field: it writes what differs and nothing else; `--check` names it and ends with 1.
  What is on or off (schedules, automations, pools and queues that are paused) is decided when it is made and belongs to the user after.
  Things of other names are left alone.
- A fleet is changed by a file of its own over fleet.yaml (`--fleet`), never in the code.
- The pool says what a stage wants: `gpu` for train, merge, evaluate, routing and heldout, `cpu` for the rest, and for all of them with small models.
- A parent that dispatches runs in the queue `orchestrate` of the pool `cpu`: it waits, so it needs a worker that nothing else can fill.
- PESC_HOME (the checkout on the workers) and PESC_STORE (the store, the same path for all workers of a pool) are read when deploying and
  stored in the deployments; a worker then needs neither variable. In our image they are /opt/pesc and /store.
- The server refuses parameters that a flow does not have, at every depth (`prefect deploy` leaves those of the top level to the worker).
- Schedules have a slug, are inactive until somebody turns them on, and do not start while their last run goes on.
- Secrets are in the environment of workers and server, in Secret blocks, in Secrets of Kubernetes, or in the block of the notices; bootstrap refuses
  a fleet file or a job variable that holds one.

What has been tried, and what has not
- Against real servers on SQLite and PostgreSQL, with process workers: bootstrap, schedules, refusals, notices, zombies, stopping.
- docker: hadolint and Compose's own parser accept the files, and docker-py would send what it should; no image was built.
- kubernetes: the Job that Prefect's worker makes is valid for Kubernetes 1.37; no cluster has seen it.
- Remotes: directories and S3's protocol (moto's server). gs:// never: no Google bucket, nor anything that speaks its protocol, has seen it.
- systemd: `systemd-analyze verify` accepts the units; they were not booted.

Pitfalls
- `prefect worker start` kills its runs when it is stopped, and they stay Running; deployments.worker does not. Either way a run is resumed
  by running it again.
- A worker with `--limit` that serves `orchestrate` and `default` both can be full of parents that wait for a child that no worker takes.
- `{{ $NAME }}` of a variable that is not set stays as it is after `prefect deploy`: PESC_HOME is then read on the worker; without PESC_STORE
  every run fails at once and says so. bootstrap refuses instead.
- The type of a work pool cannot be changed; bootstrap says so and does not delete it.
- SQLite serves one machine; with several workers give the server PostgreSQL (PREFECT_API_DATABASE_CONNECTION_URL).
- A run that is waiting in a pool that nobody serves waits for ever: `prefect work-pool ls`, `prefect worker ls` say who is there.
"""
