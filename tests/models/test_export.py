"""An exported directory loads in a process where this package does not exist, and computes the same."""

import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

import pesc.models
from pesc.errors import ModelError
from pesc.models.export import export_remote_code
from pesc.models.published import import_published
from pesc.moe.layer import sparse_parameters
from tests.models.builders import save_dense, save_sparse

pesc.models.register()

LOADER = """
import sys
sys.modules["pesc"] = None  # an import of it would fail
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
directory, logits = sys.argv[1:]
model, loading = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, output_loading_info=True)
assert not any(loading.values()), loading
assert type(model).__module__.startswith("transformers_modules"), type(model)
mlp = type(model.model.layers[0].mlp)
assert mlp.forward is mlp.__bases__[1].forward  # what vLLM reads to merge the projections
ids = AutoTokenizer.from_pretrained(directory, trust_remote_code=True)("hello there", return_tensors="pt").input_ids
torch.save((model(ids).logits.detach(), model.generate(ids, max_new_tokens=4, do_sample=False)), logits)
base = AutoModel.from_pretrained(directory, trust_remote_code=True)
assert base(ids).last_hidden_state.shape[:2] == ids.shape
model.save_pretrained(directory + "-saved")
"""


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_it_loads_without_this_package(tmp_path, model_type):
    save_dense(tmp_path / "dense", model_type)
    model = AutoModelForCausalLM.from_pretrained(save_sparse(tmp_path / "dense", tmp_path / "sparse"))
    with torch.no_grad():
        for name, parameter in sparse_parameters(model):
            if name.endswith("up"):
                parameter.normal_(std=0.3)
    model.save_pretrained(tmp_path / "trained")
    for path in (tmp_path / "sparse").glob("*token*"):
        os.link(path, tmp_path / "trained" / path.name)
    (tmp_path / "exported").mkdir()
    export_remote_code(tmp_path / "trained", tmp_path / "exported")

    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    (tmp_path / "load.py").write_text(LOADER)
    command = [sys.executable, str(tmp_path / "load.py"), str(tmp_path / "exported"), str(tmp_path / "result.pt")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    logits, generated = torch.load(tmp_path / "result.pt", weights_only=True)
    ids = generated[:, : logits.shape[1]]
    assert torch.equal(logits, model(ids).logits)


def test_the_code_is_one_file_that_imports_torch_and_transformers_alone(tmp_path):
    save_dense(tmp_path / "dense")
    save_sparse(tmp_path / "dense", tmp_path / "sparse")
    (tmp_path / "exported").mkdir()
    export_remote_code(tmp_path / "sparse", tmp_path / "exported")
    code = (tmp_path / "exported/modeling_pesc.py").read_text()
    imported = {line.split()[1].split(".")[0] for line in code.splitlines() if line.startswith(("import ", "from "))}
    assert imported - set(sys.stdlib_module_names) == {"torch", "transformers"}
    assert json.loads((tmp_path / "exported/config.json").read_text())["auto_map"]["AutoModel"] == "modeling_pesc.PescLlamaModel"
    weights = "model-00001-of-00001.safetensors"
    assert os.path.samefile(tmp_path / "exported" / weights, tmp_path / "dense/model.safetensors")


def test_a_dense_model_needs_no_export(tmp_path):
    save_dense(tmp_path / "dense")
    with pytest.raises(ModelError, match="needs no export"):
        export_remote_code(tmp_path / "dense", tmp_path)


GOLDEN_LOADER = """
import sys
sys.modules["pesc"] = None
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
directory, expected = sys.argv[1:]
model, loading = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, dtype=torch.float32, output_loading_info=True)
assert not any(loading.values()), loading
expected = load_file(expected)
with torch.no_grad():
    print((model(expected["input_ids"]).logits - expected["logits"]).abs().max().item())
"""


@pytest.mark.slow
def test_the_golden_checkpoint_computes_the_reference_logits_without_this_package(shared_data, tmp_path):
    golden = shared_data / "golden/camelidae-tiny"
    (tmp_path / "ours").mkdir()
    import_published(golden, tmp_path / "ours")
    (tmp_path / "exported").mkdir()
    export_remote_code(tmp_path / "ours", tmp_path / "exported")
    (tmp_path / "load.py").write_text(GOLDEN_LOADER)
    command = [sys.executable, str(tmp_path / "load.py"), str(tmp_path / "exported"), str(golden / "expected.safetensors")]
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert float(done.stdout) <= 5e-5
