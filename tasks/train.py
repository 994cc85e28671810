"""The task of `train`: distributed QLoRA.  Another try, after a preemption, resumes from the last checkpoint."""

from tasks.execution import stage_task

train = stage_task("train")
