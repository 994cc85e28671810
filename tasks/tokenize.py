"""The task of `tokenize`: chat template, assistant-only loss, packing."""

from tasks.execution import stage_task

tokenize = stage_task("tokenize")
