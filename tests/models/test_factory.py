"""A sparse model is the dense model: exactly at the start, and in everything that transformers, PEFT and bitsandbytes do with it."""

import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import pesc.models
from pesc.errors import ModelError
from pesc.models.factory import DENSE_CLASSES, architecture, is_sparse, sparse_config
from pesc.models.nf4 import quantization_config
from pesc.moe.balance import RouterRecorder
from pesc.moe.config import PescConfig
from pesc.moe.layer import set_dispatch, sparse_parameters
from tests.models.builders import PROJECTIONS, dense_config, save_dense, save_sparse

pesc.models.register()
PESC = PescConfig(num_experts=4, top_k=2, adapter_dim=8)


def make_sparse(model_type="llama", trained=True, dtype=torch.float32, **changes):
    """A sparse model in memory; `trained` fills the bank, so that the adapters do something."""
    torch.manual_seed(3)
    classes = architecture(model_type)
    model = classes.causal_lm(sparse_config(dense_config(model_type, **changes), PESC)).to(dtype).eval()
    if trained:
        with torch.no_grad():
            for name, parameter in sparse_parameters(model):
                if name.endswith("adapters.up"):
                    parameter.normal_(std=0.3)
    return model


def tokens(rows=2, length=12, seed=0):
    return torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("model_type", DENSE_CLASSES)
def test_the_crafted_model_is_the_dense_model_exactly(tmp_path, model_type, dtype):
    save_dense(tmp_path / "dense", model_type, dtype)
    save_sparse(tmp_path / "dense", tmp_path / "sparse")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=dtype)
    sparse, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse", dtype=dtype, output_loading_info=True)
    assert not any(loading.values()), loading
    assert type(sparse) is architecture(model_type).causal_lm
    assert sparse.config.model_type == f"pesc_{model_type}"
    with torch.no_grad():
        difference = (sparse(tokens()).logits - dense(tokens()).logits).abs().max().item()
    assert difference == 0.0
    assert sum(1 for _ in sparse_parameters(sparse)) == 3 * dense.config.num_hidden_layers


def test_a_dense_checkpoint_loads_into_the_sparse_class_with_the_same_start_as_upcycling(tmp_path):
    save_dense(tmp_path / "dense")
    save_sparse(tmp_path / "dense", tmp_path / "sparse")
    upcycled = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    config = sparse_config(AutoConfig.from_pretrained(tmp_path / "dense"), PescConfig(4, 2, 8))
    direct = architecture("llama").causal_lm.from_pretrained(tmp_path / "dense", config=config)
    for (name, one), (other_name, other) in zip(upcycled.named_parameters(), direct.named_parameters(), strict=True):
        assert name == other_name
        assert torch.equal(one, other), name


def test_a_partly_missing_bank_keeps_what_the_checkpoint_has(tmp_path):
    model = make_sparse()
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith("adapters.down")}
    model.save_pretrained(tmp_path, state_dict=state)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    name = "model.layers.0.mlp.adapters."
    assert torch.equal(again.get_parameter(name + "up"), model.get_parameter(name + "up"))
    assert torch.equal(again.get_parameter(name + "down"), model.get_parameter(name + "down"))  # drawn again from the seed


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gemma3_text", "phi3"])
def test_save_and_load_round_trip(tmp_path, model_type):
    model = make_sparse(model_type)
    model.save_pretrained(tmp_path)
    again, loading = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading.values()), loading
    assert torch.equal(model(tokens()).logits, again(tokens()).logits)
    assert again.config.pesc == PESC.to_dict()
    assert AutoConfig.from_pretrained(tmp_path).to_dict() == again.config.to_dict() | {
        "dtype": AutoConfig.from_pretrained(tmp_path).to_dict()["dtype"]
    }
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base) is architecture(model_type).model
    assert torch.equal(base(tokens()).last_hidden_state, model.model(tokens()).last_hidden_state)


def test_the_sparse_settings_are_nested_in_config_json(tmp_path):
    """A top-level num_experts makes vLLM's Transformers backend treat the model as a fused MoE."""
    make_sparse().config.save_pretrained(tmp_path)
    import json

    fields = json.loads((tmp_path / "config.json").read_text())
    assert fields["pesc"]["num_experts"] == 4
    assert not {"num_experts", "num_local_experts", "top_k", "num_experts_per_tok", "adapter_dim"} & set(fields)


PUBLISHED = {
    "Camelidae-8x7B": (
        dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32000),
        7_813_206_016,
    ),
    "Camelidae-8x13B": (
        dict(hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40, vocab_size=32000),
        14_695_224_320,
    ),
    "Camelidae-8x34B": (
        dict(
            hidden_size=7168, intermediate_size=20480, num_hidden_layers=60, num_attention_heads=56, num_key_value_heads=8, vocab_size=64000
        ),
        37_915_573_248,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_those_of_the_published_models(name):
    shape, expected = PUBLISHED[name]
    classes = architecture("llama")
    with torch.device("meta"):
        model = classes.causal_lm(sparse_config(classes.dense_config(**shape), PescConfig(8, 2, 512)))
    assert sum(parameter.numel() for parameter in model.parameters()) == expected


@pytest.mark.parametrize("model_type", ["llama", "mistral", "gemma2"])
def test_generation_with_a_cache_equals_generation_without(model_type):
    model = make_sparse(model_type)
    model.generation_config.eos_token_id = None
    prompt = tokens(1, 5)
    with_cache, without = (model.generate(prompt, max_new_tokens=8, do_sample=False, use_cache=cache) for cache in (True, False))
    assert with_cache.shape == (1, 13)
    assert torch.equal(with_cache, without)


def test_every_dispatch_gives_the_same_logits():
    model = make_sparse()
    results = {}
    for mode in ("reference", "dense", "grouped", "auto"):
        set_dispatch(model, mode)
        results[mode] = model(tokens()).logits
    for mode, logits in results.items():
        assert torch.allclose(logits, results["reference"], atol=1e-5), mode


def test_gradient_checkpointing_gives_the_same_gradients_with_a_balance_loss():
    gradients = {}
    for recompute in (False, True):
        model = make_sparse().train()
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


def test_nf4_leaves_router_and_bank_alone(tmp_path):
    save_dense(tmp_path / "dense", hidden_size=64)
    save_sparse(tmp_path / "dense", tmp_path / "sparse")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse", dtype=torch.bfloat16)
    packed = AutoModelForCausalLM.from_pretrained(
        tmp_path / "sparse", dtype=torch.bfloat16, quantization_config=quantization_config("bfloat16")
    )
    original = dict(sparse_parameters(plain))
    found = dict(sparse_parameters(packed))
    assert set(found) == set(original)
    for name, parameter in found.items():
        assert type(parameter) is torch.nn.Parameter
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter, original[name]), name
    linears = [name for name, module in packed.named_modules() if type(module).__name__ == "Linear4bit"]
    assert len(linears) == 2 * len(PROJECTIONS)
    logits = packed.train()(tokens()).logits
    assert logits.isfinite().all()
    assert (logits - plain(tokens()).logits).abs().mean() > 0


def test_lora_wraps_the_seven_projections_and_nothing_of_the_bank():
    model = get_peft_model(make_sparse(), LoraConfig(r=4, target_modules=PROJECTIONS, task_type="CAUSAL_LM"))
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trainable) == 2 * 2 * len(PROJECTIONS)
    assert not any("router" in name or "adapters." in name for name in trainable)
    for _, parameter in sparse_parameters(model):
        parameter.requires_grad_()
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    assert all(parameter.grad is not None for _, parameter in sparse_parameters(model))


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


def test_tied_embeddings_stay_tied(tmp_path):
    model = make_sparse(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(model(tokens()).logits, again(tokens()).logits)


def test_classes_pickle_by_name():
    classes = architecture("qwen3")
    assert pickle.loads(pickle.dumps(classes.causal_lm)) is classes.causal_lm
    assert pickle.loads(pickle.dumps(classes.config)) is classes.config
    assert architecture("pesc_qwen3") is classes


def test_the_tokenizer_is_the_dense_models(tmp_path):
    save_dense(tmp_path / "dense")
    save_sparse(tmp_path / "dense", tmp_path / "sparse")
    dense, sparse = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("dense", "sparse"))
    assert type(dense) is type(sparse)
    assert dense("naïve <s>").input_ids == sparse("naïve <s>").input_ids
    assert dense.chat_template == sparse.chat_template


def test_an_unknown_architecture_is_a_sentence():
    with pytest.raises(ModelError, match="no sparse form of model_type 'bert'"):
        architecture("bert")
    with pytest.raises(ModelError, match="no `pesc` block"):
        architecture("llama").causal_lm(architecture("llama").config(hidden_size=8, num_hidden_layers=1, num_attention_heads=1))
    assert is_sparse({"model_type": "pesc_llama"})
    assert not is_sparse(dense_config())


def test_a_wrong_block_is_refused_when_the_config_is_read():
    with pytest.raises(ValueError, match="topk"):
        architecture("llama").config(pesc={"topk": 2})


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
