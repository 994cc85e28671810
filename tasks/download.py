"""The task of `download`: fetch and pin one source.  Another try, after trouble of the network, resumes files that were cut off."""

from tasks.execution import stage_task

download = stage_task("download", delays_seconds=(5, 30))
