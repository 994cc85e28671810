"""The task of `train`: distributed QLoRA.

A machine that is taken away is another try, which resumes from the last checkpoint. An error of the training itself is not: it would
fail in the same way again.
"""

from pesc.errors import PreemptedError
from tasks.execution import retry_on, stage_task

train = stage_task("train", retries=3, retry_delay_seconds=30, retry_condition_fn=retry_on(PreemptedError))
