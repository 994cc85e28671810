"""The task of `dedup`: one schema, filters, exact and near duplicates, decontamination."""

from tasks.execution import stage_task

dedup = stage_task("dedup")
