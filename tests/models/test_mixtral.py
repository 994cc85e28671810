"""A dense model as a Mixtral of copies of its FFN: against transformers' own classes, on disk and in memory."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralForCausalLM

from pesc.errors import ModelError
from pesc.models import mixtral
from pesc.models.config import UpcycleConfig
from pesc.models.tensor_files import TensorDirectory
from pesc.models.upcycle import build
from pesc.moe.balance import RouterRecorder, switch_loss
from pesc.moe.initial import draw_initial
from pesc.stage import StageContext
from tests.models.builders import save_dense, tokens

WHOLE = UpcycleConfig(kind="whole", num_experts=4, top_k=2, dtype="float32")


def upcycle(dense, out, config=WHOLE):
    out.mkdir()
    return build(StageContext("upcycle[full]", config, {"model": dense}, out, out)).metrics


def load(directory):
    model, report = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=tokens()).logits


@pytest.mark.parametrize(
    ("model_type", "changes"), [("llama", {}), ("llama", {"tie_word_embeddings": True, "head_dim": 16}), ("mistral", {"sliding_window": 6})]
)
def test_the_mixtral_is_the_dense_model_and_loads_with_stock_transformers(tmp_path, model_type, changes):
    dense = save_dense(tmp_path / "dense", model_type, **changes)
    upcycle(dense, tmp_path / "out")
    model = load(tmp_path / "out")
    assert type(model) is MixtralForCausalLM
    expected = logits(load(dense))
    torch.testing.assert_close(logits(model), expected, atol=2e-5 * expected.abs().max().item(), rtol=0)
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("ab").input_ids == AutoTokenizer.from_pretrained(dense)("ab").input_ids


def test_the_directory_is_what_transformers_would_save(tmp_path):
    """Names and shapes of a published Mixtral; it survives a load and a save unchanged."""
    upcycle(save_dense(tmp_path / "dense"), tmp_path / "out")
    model = load(tmp_path / "out")
    model.save_pretrained(tmp_path / "again")
    ours, theirs = TensorDirectory(tmp_path / "out"), TensorDirectory(tmp_path / "again")
    assert {name: spec.shape for name, spec in ours.specs.items()} == {name: spec.shape for name, spec in theirs.specs.items()}
    assert all(ours.read(name).float().equal(theirs.read(name)) for name in ours.files)
    pieces = mixtral.to_published(dict(model.named_parameters()))
    assert set(pieces) == set(ours.files)
    assert all(pieces[name].equal(ours.read(name).float()) for name in ours.files)


def test_routers_start_as_those_of_an_arm_with_adapters(tmp_path):
    upcycle(save_dense(tmp_path / "dense"), tmp_path / "out")
    found = TensorDirectory(tmp_path / "out").read("model.layers.1.block_sparse_moe.gate.weight")
    assert found.equal(draw_initial("layers.1.mlp.router.weight", (4, 32), 42))


def test_the_counts_are_those_of_the_model(tmp_path):
    metrics = upcycle(save_dense(tmp_path / "dense"), tmp_path / "out")
    model, ffn = load(tmp_path / "out"), 2 * 3 * 32 * 64
    assert metrics["total_parameters"] == model.num_parameters()
    assert metrics["added_parameters"] == 3 * ffn + 2 * 4 * 32
    assert metrics["active_parameters"] == metrics["total_parameters"] - 2 * ffn


def test_the_same_balance_loss_reads_its_routers(tmp_path):
    """Against switch_loss of logits computed by hand from the router's input; the gradient reaches every router."""
    upcycle(save_dense(tmp_path / "dense"), tmp_path / "out")
    model = load(tmp_path / "out")
    routers = mixtral.find_routers(model)
    inputs = {}
    for name, router in routers.items():
        router.register_forward_pre_hook(lambda _module, args, name=name: inputs.__setitem__(name, args[0].reshape(-1, 32)))
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[1, 7:] = False
    with RouterRecorder(model, routers) as recorder:
        model(input_ids=tokens())
    expected = sum(switch_loss((inputs[name] @ router.weight.T)[mask.flatten()], 2) for name, router in routers.items())
    found = recorder.balance_loss(mask)
    torch.testing.assert_close(found, expected)
    found.backward()
    assert all(router.weight.grad.any() for router in routers.values())
    assert [choices.sum().item() for choices in recorder.choices(mask).values()] == [2 * 19.0] * 2
    with pytest.raises(ValueError, match="the mask has shape"):
        recorder.balance_loss(mask[:1])


@pytest.mark.parametrize(
    ("model_type", "changes", "sentence"),
    [
        ("qwen2", {}, r"model_type qwen2\) has no whole-FFN upcycling.*llama and mistral.*or method pesc"),
        ("llama", {"attention_bias": True}, "has attention_bias, for which Mixtral has no place"),
    ],
)
def test_what_mixtral_cannot_hold_is_refused(tmp_path, model_type, changes, sentence):
    dense = save_dense(tmp_path / "dense", model_type, **changes)
    with pytest.raises(ModelError, match=sentence):
        upcycle(dense, tmp_path / "out")


def test_settings_of_adapters_do_not_fit():
    with pytest.raises(ValueError, match="adapter_dim is a setting of adapters"):
        UpcycleConfig(kind="whole", adapter_dim=64)


@pytest.mark.slow
@pytest.mark.parametrize("execution", [{"num_processes": 1, "gradient_checkpointing": "full"}, {"num_processes": 2, "zero_stage": 3}])
def test_a_real_run_trains_everything_and_merges(tmp_path, execution):
    """Upcycle, train under torchrun, merge; the published model is a stock Mixtral that has learnt."""
    from pesc.models import merge
    from pesc.models.config import MergeConfig
    from pesc.train import stage
    from tests.models.builders import save_blocks
    from tests.train import tiny

    upcycle(save_dense(tmp_path / "dense", hidden_size=64, tie_word_embeddings=True), tmp_path / "model")
    blocks = tiny.write_blocks(save_blocks(tmp_path / "blocks"), 8)
    config = tiny.settings(method="upcycle-full", learning_rate=5e-3, max_steps=5)
    context = tiny.make_context(tmp_path / "train", tmp_path / "model", blocks, config, execution)
    stage.build(context)
    lines = [json.loads(line) for line in (context.out / "history.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert all(len(line["experts"]["entropy"]) == 2 and line["balance"] > 0 for line in lines)
    groups = {row["group"]: row["tensors"] for row in json.loads((context.out / "training.json").read_text())["trainable"]}
    assert groups == {"bank": 4, "router": 2, "dense": 1 + 1 + 2 * 6}

    (tmp_path / "out").mkdir()
    inputs = {"model": tmp_path / "model", "adapter": context.out, "blocks": blocks}
    result = merge.build(StageContext("merge[full]", MergeConfig(), inputs, tmp_path / "out", tmp_path))
    start, merged = load(tmp_path / "model"), load(tmp_path / "out")
    moved = {
        name: not torch.equal(parameter, dict(start.named_parameters())[name].bfloat16().float())
        for name, parameter in merged.named_parameters()
    }
    assert all(moved.values()), [name for name, has in moved.items() if not has]
    assert result.metrics["trained_tensors"] == len(TensorDirectory(tmp_path / "model").files)
    ledger = json.loads((tmp_path / "out/ledger.json").read_text())["tensors"]
    assert {entry["name"] for entry in ledger} == set(TensorDirectory(tmp_path / "out").files)
    assert AutoTokenizer.from_pretrained(tmp_path / "out")
    assert merged.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2, do_sample=False).shape[1] <= 5

    _assert_a_lost_tensor_is_named(inputs, context.out)


def _assert_a_lost_tensor_is_named(inputs, trained):
    from safetensors.torch import load_file, save_file

    from pesc.models.merge import read_training
    from pesc.models.merge_whole import check_weights

    weights = load_file(trained / mixtral.WEIGHTS_NAME)
    name = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    save_file({key: tensor for key, tensor in weights.items() if key != name}, trained / mixtral.WEIGHTS_NAME)
    with pytest.raises(ModelError, match=rf"has lost {name}"):
        check_weights(inputs["model"], trained / mixtral.WEIGHTS_NAME, read_training(trained))
