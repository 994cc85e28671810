import subprocess
import sys

import pytest

from pesc.moe.config import PescConfig


def test_block_round_trips():
    config = PescConfig(16, 4, 64, scaling=0.25, seed=7)
    assert PescConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_experts", 0),
        ("num_experts", 2.0),
        ("top_k", 9),
        ("top_k", True),
        ("adapter_dim", -1),
        ("scaling", 0),
        ("seed", -1),
        ("dispatch", "x"),
    ],
)
def test_an_impossible_value_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=f"pesc.{field}"):
        PescConfig.from_dict({field: value})


def test_an_unknown_field_is_refused():
    with pytest.raises(ValueError, match="topk"):
        PescConfig.from_dict({"topk": 2})


def test_configs_import_without_torch():
    code = "import sys, pesc.moe.config, pesc.models.config; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
