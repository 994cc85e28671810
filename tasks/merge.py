"""The task of `merge`: fold the LoRA, prove it."""

from tasks.execution import stage_task

merge = stage_task("merge")
