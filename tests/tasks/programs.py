"""A flow whose shards sleep on a Dask cluster of two.

python -m tests.tasks.programs FOLDER
"""

from __future__ import annotations

import sys
from functools import partial

from prefect import flow

from pesc.stage import Execution
from tasks.cluster import open_shards
from tests.launch import shards


@flow(persist_result=False)
def napping(folder: str) -> None:
    """Two workers leave their pids in the folder and stay."""
    with open_shards(Execution(task_runner="dask", num_workers=2), "toy") as map_shards:
        list(map_shards(partial(shards.nap, folder=folder), [0, 1]))


if __name__ == "__main__":
    napping(sys.argv[1])
