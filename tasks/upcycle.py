"""The task of `upcycle`: dense to sparse."""

from tasks.execution import stage_task

upcycle = stage_task("upcycle")
