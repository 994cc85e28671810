"""The task of `routing`: how a sparse arm's experts are used."""

from tasks.execution import stage_task

routing = stage_task("routing")
