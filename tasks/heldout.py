"""The task of `heldout`: the loss of an arm's final model on the held-out rows."""

from tasks.execution import stage_task

heldout = stage_task("heldout")
