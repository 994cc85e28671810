"""The task of `mix`: draw the mixture by quota."""

from tasks.execution import stage_task

mix = stage_task("mix")
