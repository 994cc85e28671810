"""A sparse model trains as the dense one does: dispatch, gradient checkpointing, LoRA, the stock Trainer."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import pesc.models
from pesc.moe.balance import RouterRecorder
from pesc.moe.config import DISPATCH_MODES
from pesc.moe.layer import set_dispatch, sparse_parameters
from tests.models.builders import PROJECTIONS, make_sparse, tokens

pesc.models.register()


def test_every_dispatch_gives_the_same_logits():
    model = make_sparse()
    results = {}
    for mode in DISPATCH_MODES:
        set_dispatch(model, mode)
        with torch.no_grad():
            results[mode] = model(tokens()).logits
    for mode, logits in results.items():
        assert torch.allclose(logits, results["dense"], atol=1e-5), mode


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "starcoder2"])
def test_gradient_checkpointing_gives_the_same_gradients_with_a_balance_loss(model_type):
    gradients = {}
    for recompute in (False, True):
        model = make_sparse(model_type).train()
        if recompute:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        mask = torch.ones(2, 12).long()
        mask[0, 9:] = 0
        with RouterRecorder(model) as recorder:
            loss = model(tokens(), attention_mask=mask, labels=tokens()).loss
        (loss + recorder.balance_loss(mask)).backward()
        assert len(recorder.logits) == 2
        gradients[recompute] = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, gradient in gradients[False].items():
        assert gradient is not None, name
        assert torch.allclose(gradient, gradients[True][name], atol=1e-6), name


def test_lora_wraps_the_seven_projections_and_nothing_of_the_bank():
    model = get_peft_model(make_sparse(), LoraConfig(r=4, target_modules=PROJECTIONS, task_type="CAUSAL_LM"))
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trainable) == 2 * 2 * len(PROJECTIONS)
    assert not any("router" in name or "adapters." in name for name in trainable)
    for _, parameter in sparse_parameters(model):
        parameter.requires_grad_()
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    assert all(parameter.grad is not None for _, parameter in sparse_parameters(model))


def test_an_adapter_is_saved_and_loaded_and_merging_keeps_the_bank(tmp_path):
    torch.manual_seed(0)
    lora = LoraConfig(r=4, target_modules=PROJECTIONS, task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(make_sparse(), lora).eval()
    make_sparse().save_pretrained(tmp_path / "model")
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), tmp_path / "adapter").eval()
    with torch.no_grad():
        expected = model(input_ids=tokens()).logits
        assert torch.equal(again(input_ids=tokens()).logits, expected)
        with again.disable_adapter():
            assert not torch.allclose(again(input_ids=tokens()).logits, expected, atol=0.1)

    merged = again.merge_and_unload()
    assert type(merged) is type(make_sparse())
    with torch.no_grad():
        assert torch.allclose(merged(tokens()).logits, expected, atol=1e-4)
    for (name, one), (_, other) in zip(sparse_parameters(merged), sparse_parameters(make_sparse()), strict=True):
        assert torch.equal(one, other), name


def test_lora_on_every_linear_layer_finds_the_dense_projections_alone():
    model = get_peft_model(make_sparse(), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    wrapped = {name.rpartition(".")[2] for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert wrapped == set(PROJECTIONS)


def test_the_first_step_moves_up_alone_and_the_second_moves_the_rest():
    """At the start `up` is zero, so that router and `down` have a zero gradient: what a check for frozen parts must know."""
    model = make_sparse(trained=False).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for step in range(2):
        optimizer.zero_grad()
        model(tokens(), labels=tokens()).loss.backward()
        moved = {name.rsplit(".mlp.")[1]: bool(parameter.grad.any()) for name, parameter in sparse_parameters(model)}
        assert moved == {"adapters.up": True, "adapters.down": step == 1, "router.weight": step == 1}
        optimizer.step()


def test_the_stock_trainer_trains_it(tmp_path):
    """transformers' own Trainer, with checkpointing: nothing of this package is in the loop."""
    model = make_sparse(trained=False)
    rows = [{"input_ids": tokens(1, 12, seed)[0], "labels": tokens(1, 12, seed)[0]} for seed in range(8)]
    arguments = TrainingArguments(
        tmp_path,
        max_steps=6,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        gradient_checkpointing=True,
        report_to=[],
        logging_steps=1,
        use_cpu=True,
    )
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
