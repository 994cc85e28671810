"""Two ranks by transformers' own tensor parallelism compute what one computes; router and bank are whole on each."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers.integrations.tensor_parallel import ALL_PARALLEL_STYLES

from pesc.models.export import export_remote_code
from pesc.models.factory import MAIN_TYPES, architecture
from tests.models.builders import make_sparse, tokens

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("model_type", MAIN_TYPES)
def test_the_plan_is_the_dense_one_and_names_modules_that_are_there(model_type):
    classes, model = architecture(model_type), make_sparse(model_type)
    plan = classes.config.base_model_tp_plan
    added = {"layers.*.mlp.router", "layers.*.mlp.adapters"} if "replicate" in ALL_PARALLEL_STYLES else set()
    assert plan.keys() - classes.dense_config.base_model_tp_plan.keys() == added
    assert classes.dense_config.base_model_tp_plan.items() <= plan.items()
    modules = dict(model.model.named_modules())
    assert all(name.replace("*", "1") in modules for name in plan)


@pytest.mark.slow
@pytest.mark.parametrize("trust", ["no", "yes"])
def test_two_ranks_compute_what_one_computes(tmp_path, trust):
    model = make_sparse()
    model.save_pretrained(tmp_path / "native")
    directory = tmp_path / "native"
    if trust == "yes":
        directory = tmp_path / "exported"
        directory.mkdir()
        export_remote_code(tmp_path / "native", directory)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    command += ["tests.models.tensor_parallel_program", str(directory), trust, str(tmp_path / "out.pt")]
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    result = torch.load(tmp_path / "out.pt")
    assert result["module"].startswith("transformers_modules" if trust == "yes" else "pesc.models")
    with torch.no_grad():
        assert (result["logits"] - model(tokens()).logits).abs().max() < 2e-5
    shapes, whole = result["shapes"], model.state_dict()
    halved = [name for name in shapes if shapes[name] != tuple(whole[name].shape)]
    assert [name for name in halved if "layers.0.mlp" in name] == [
        f"model.layers.0.mlp.{part}_proj.weight" for part in ("gate", "up", "down")
    ]
