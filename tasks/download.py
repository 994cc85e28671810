"""The task of `download`: fetch and pin one source.

A network that fails is tried again, with growing pauses. A wrong name, a missing right or a wrong digest is not: nothing would change.
"""

from pesc.errors import TransientSourceError
from tasks.execution import retry_on, stage_task

download = stage_task(
    "download", retries=2, retry_delay_seconds=[5, 30], retry_jitter_factor=0.5, retry_condition_fn=retry_on(TransientSourceError)
)
