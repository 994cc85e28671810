"""Deployments: which flow runs where, for a Prefect server.

    prefect server start                                                       # a server, with its UI on port 4200
    export PREFECT_API_URL=http://127.0.0.1:4200/api PESC_HOME=$PWD PESC_STORE=$PWD/store
    prefect work-pool create cpu --type process
    prefect work-pool create gpu --type process
    prefect --no-prompt deploy --all --prefect-file deployments/prefect.yaml   # from the root of the checkout
    prefect worker start --pool cpu                                            # on any machine
    prefect worker start --pool gpu --limit 1                                  # on each GPU node
    prefect deployment run pipeline/gpu --param recipe=camelidae-8x7b
    prefect deployment run evaluate/gpu --param recipe=demo --param instance=pesc/gsm8k --param refresh=true

What it is
    prefect.yaml                  every deployment: `pipeline`, one a stage, the care of the store
    slurm/train.sbatch            training on several nodes of a Slurm cluster, without Prefect
    kubernetes/pytorchjob.yaml    the same as a PyTorchJob of Kubeflow's training operator

Key contracts
- The pool says what a stage wants: `gpu` for train, merge, evaluate and routing, `cpu` for the rest.
- PESC_HOME (the checkout on the workers) and PESC_STORE (the store, the same path for all of them) are read when deploying and stored
  in the deployments; a worker then needs neither variable.
- Schedules have a slug, so that deploying again updates them, and are inactive until somebody turns them on.

Pitfalls
- `{{ $NAME }}` of a variable that is not set stays as it is: PESC_HOME is then read on the worker; without PESC_STORE every run fails
  at once and says so.
- SQLite serves one machine; with several workers give the server PostgreSQL (PREFECT_API_DATABASE_CONNECTION_URL).
- A process worker started with `nohup ... &` ignores the first SIGTERM; run it under systemd or another supervisor.
"""
