"""The task of `evaluate`: one benchmark of one arm."""

from tasks.execution import stage_task

evaluate = stage_task("evaluate")
