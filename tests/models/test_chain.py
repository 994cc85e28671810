"""What the real train stage leaves is what the real merge stage takes: upcycle, train under torchrun in 4 bit, merge, generate."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import pesc.models
from pesc.errors import ModelError
from pesc.models import merge
from pesc.models.config import MergeConfig
from pesc.models.proof import prove, read_prompts
from pesc.stage import StageContext
from tests.models.builders import PROJECTIONS, save_blocks, save_dense, save_sparse
from tests.train import tiny

pesc.models.register()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arm", "base", "balance"), [("pesc", "dequantized", "switch"), ("pesc", "original", "bias"), ("qlora", "original", "none")]
)
def test_a_real_run_merges(tmp_path, arm, base, balance):
    from pesc.train import stage

    model = save_dense(tmp_path / "dense", hidden_size=64, tie_word_embeddings=True)
    if arm == "pesc":
        model = save_sparse(model, tmp_path / "sparse")
    blocks = tiny.write_blocks(save_blocks(tmp_path / "blocks"), 8)
    config = tiny.settings(method=arm, quantization="nf4", compute_dtype="bfloat16", learning_rate=2e-2, balance={"kind": balance})
    context = tiny.make_context(tmp_path / "train", model, blocks, config, {"num_processes": 1})
    stage.build(context)

    (tmp_path / "out").mkdir()
    inputs = {"model": model, "adapter": context.out, "blocks": blocks}
    settings = MergeConfig.model_validate({"base": base})
    metrics = merge.build(StageContext("merge[test]", settings, inputs, tmp_path / "out", tmp_path)).metrics
    assert metrics["merged_tensors"] == 2 * len(PROJECTIONS)
    assert metrics["trained_tensors"] == {"switch": 6, "bias": 8, "none": 0}[balance]
    proof = json.loads((tmp_path / "out/proof.json").read_text())
    assert proof["logits"]["relative_rms_effect_of_training"] > proof["logits"]["relative_rms_difference"]
    merged, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(loading.values()), loading
    if balance == "bias":
        assert merged.config.pesc["bias_update_rate"] == 0.001
        trained = load_file(context.out / "bank.safetensors")
        for index, layer in enumerate(merged.model.layers):
            assert torch.equal(layer.mlp.router.bias_steps, trained[f"model.layers.{index}.mlp.router.bias_steps"])
            assert layer.mlp.router.bias_steps.any()
        shutil.copytree(tmp_path / "out", tmp_path / "spoilt")
        written = load_file(tmp_path / "spoilt/model.safetensors")
        for name in written:
            if name.endswith(".bias_steps"):
                written[name].zero_()
        save_file(written, tmp_path / "spoilt/model.safetensors", {"format": "pt"})
        parts = merge.read_parts(model, context.out, settings)
        with pytest.raises(ModelError, match=r"The merged .*router\.bias_steps is not the trained one"):
            prove(parts, tmp_path / "spoilt", read_prompts(blocks, 2), settings)
    assert merged.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2, do_sample=False).shape[1] <= 5
