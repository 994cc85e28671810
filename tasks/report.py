"""The task of `report`: tables, plots, page."""

from tasks.execution import stage_task

report = stage_task("report")
