from __future__ import annotations

import pytest

from pesc.stage import Execution
from pesc.train.deepspeed import make_config
from tests.train.tiny import settings


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_deepspeed_takes_the_settings(stage, dtype):
    """Against DeepSpeed's own reader of settings."""
    from deepspeed.runtime.config import DeepSpeedConfig

    config = settings(compute_dtype=dtype, global_batch_size=12, micro_batch_size=3)
    made = make_config(config, Execution(zero_stage=stage), 1, "cpu")
    read = DeepSpeedConfig(made)
    assert (read.train_batch_size, read.train_micro_batch_size_per_gpu, read.gradient_accumulation_steps) == (12, 3, 4)
    assert read.zero_optimization_stage == stage
    assert read.bfloat16_config.enabled == (dtype == "bfloat16")
    assert read.gradient_clipping == 1.0


def test_accumulation_is_shared_by_the_ranks():
    made = make_config(settings(global_batch_size=16, micro_batch_size=2), Execution(), 4, "cpu")
    assert made["gradient_accumulation_steps"] == 2


def test_sums_are_kept_in_fp32():
    assert make_config(settings(compute_dtype="bfloat16"), Execution(zero_stage=2), 1, "cuda")["data_types"] == {"grad_accum_dtype": "fp32"}
