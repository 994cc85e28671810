"""One factory gives the sparse twin of every dense decoder that fits, and says why another does not."""

import copy
import json
import pickle
import subprocess
import sys

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import pesc.models
from pesc.errors import ModelError
from pesc.models.factory import MAIN_TYPES, architecture, architecture_of, is_sparse, sparse_config
from pesc.moe.config import PescConfig
from pesc.moe.layer import sparse_parameters
from tests.models.builders import dense_config, fill_bank, save_dense, save_sparse, tokens

pesc.models.register()

QUICK = ["cohere", "olmo3", "starcoder2"]
"""Parallel attention and MLP; norms after the blocks; biases and an MLP of another shape."""

SLOW = [
    "apertus",
    "arcee",
    "bitnet",
    "cohere2",
    "cwm",
    "diffllama",
    "doge",
    "ernie4_5",
    "exaone4",
    "gemma",
    "gemma3n_text",
    "gemma4_text",
    "gemma4_unified_text",
    "glm",
    "glm4",
    "granite_swa",
    "helium",
    "hunyuan_v1_dense",
    "hyperclovax",
    "internlm3",
    "iquestcoder",
    "jais2",
    "minicpm3",
    "ministral",
    "ministral3",
    "modernbert-decoder",
    "nanochat",
    "nemotron",
    "olmo",
    "persimmon",
    "phi",
    "qwen3_5_text",
    "seed_oss",
    "smollm3",
    "stablelm",
    "vaultgemma",
    "youtu",
]

CONVERTED = ["olmo_hybrid"]
"""Fits, but its files hold other tensors than the model, which transformers converts at loading: upcycling a directory is refused."""

KNOWN = [
    *(pytest.param(name, id=name) for name in (*MAIN_TYPES, *QUICK)),
    *(pytest.param(name, id=name, marks=pytest.mark.slow) for name in SLOW),
]

REFUSED = {
    "bert": "does not hold a BertModel as `model`",
    "bart": "does not hold a BartModel as `model`",
    "deepseek_v3": "experts or adapters of its own .`mlp.experts`",
    "gemma3": "made of parts .*its text part is a 'gemma3_text'",
    "gpt2": "does not hold a GPT2Model as `model`",
    "granitemoe": "has no `mlp` .*block_sparse_moe",
    "jetmoe": "experts or adapters of its own",
    "lfm2": "has no `mlp` .it has self_attn, feed_forward",
    "mixtral": "experts or adapters of its own .`mlp.experts`",
    "olmoe": "experts or adapters of its own .`mlp.experts`",
    "opt": "OPTModel has no list `layers`",
    "qwen3_moe": "experts or adapters of its own .`mlp.experts`",
    "t5": "no causal LM and base model of its own",
    "not_a_model": "this transformers does not know it",
}


def _skip_where_unknown(model_type):
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {model_type}")


@pytest.mark.parametrize("model_type", KNOWN)
def test_the_crafted_model_is_the_dense_model_exactly(tmp_path, model_type):
    """Through files, in both types: 0.0, not close; and a bank that is not at its start does change the logits."""
    _skip_where_unknown(model_type)
    for dtype in (torch.float32, torch.bfloat16):
        save_dense(tmp_path / f"{dtype}/dense", model_type, dtype)
        save_sparse(tmp_path / f"{dtype}/dense", tmp_path / f"{dtype}/sparse")
        dense = AutoModelForCausalLM.from_pretrained(tmp_path / f"{dtype}/dense", dtype=dtype)
        sparse, loading = AutoModelForCausalLM.from_pretrained(tmp_path / f"{dtype}/sparse", dtype=dtype, output_loading_info=True)
        assert not any(loading.values()), loading
        assert type(sparse) is architecture(model_type).causal_lm
        assert type(sparse.model) is architecture(model_type).model
        assert sparse.config.model_type == f"pesc_{model_type}"
        assert sum(1 for _ in sparse_parameters(sparse)) == 3 * dense.config.num_hidden_layers
        with torch.no_grad():
            expected = dense(tokens()).logits
            assert (sparse(tokens()).logits - expected).abs().max().item() == 0.0
            assert (fill_bank(sparse)(tokens()).logits - expected).abs().max().item() > 0.01


@pytest.mark.parametrize("model_type", CONVERTED)
def test_a_type_whose_files_hold_other_tensors_is_refused_by_upcycling(tmp_path, model_type):
    _skip_where_unknown(model_type)
    save_dense(tmp_path / "dense", model_type)
    with pytest.raises(ModelError, match="lacks the tensor"):
        save_sparse(tmp_path / "dense", tmp_path / "sparse")


@pytest.mark.parametrize("model_type", REFUSED)
def test_what_does_not_fit_is_refused_with_the_reason(model_type):
    with pytest.raises(ModelError, match=rf"no sparse form of model_type '{model_type}', because .*{REFUSED[model_type]}"):
        architecture(model_type)


@pytest.mark.slow
def test_every_causal_lm_of_transformers_is_in_the_table_or_refused():
    found, names = set(), {}
    for model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        try:
            classes = architecture(model_type)
        except ModelError:
            continue
        found.add(model_type)
        for cls in (classes.config, classes.model, classes.causal_lm):
            assert names.setdefault(cls.__name__, cls) is cls, "two types share a class name: one would not pickle"
    assert found <= {*MAIN_TYPES, *QUICK, *SLOW, *CONVERTED}, "put the new types in the table"


def test_a_layer_that_a_config_makes_into_experts_is_refused():
    """The type fits by default, one of its settings does not."""
    config = sparse_config(dense_config("doge", is_moe=True, num_experts=4), PescConfig(4, 2, 8))
    with pytest.raises(ModelError, match=r"'doge', because with this config.json a DogeDecoderLayer has experts"):
        architecture("doge").causal_lm(config)


FRESH = """
import pickle, sys, torch
assert type(pickle.load(sys.stdin.buffer)).__name__ == "PescHeliumConfig"  # before anything of this package was imported
import pesc.models
pesc.models.register()
assert not any("starcoder2.modeling" in name for name in sys.modules), "registering loads every model"
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
config = AutoConfig.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert type(config).__name__ == "PescStarcoder2Config" and type(config) is type(model.config), type(config)
assert type(AutoModel.from_config(config)).__name__ == "PescStarcoder2Model"
assert AutoTokenizer.from_pretrained(sys.argv[1])("a").input_ids == [64], AutoTokenizer.from_pretrained(sys.argv[1])("a")
torch.save(model(torch.arange(9)[None]).logits, sys.argv[2])
"""


@pytest.mark.slow
def test_a_type_beyond_the_main_ones_loads_in_a_fresh_process_that_only_registers(tmp_path):
    save_dense(tmp_path / "dense", "starcoder2")
    save_sparse(tmp_path / "dense", tmp_path / "sparse")
    command = [sys.executable, "-c", FRESH, str(tmp_path / "sparse"), str(tmp_path / "logits.pt")]
    blob = pickle.dumps(sparse_config(dense_config("helium"), PescConfig(4, 2, 8)))
    done = subprocess.run(command, input=blob, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert torch.equal(torch.load(tmp_path / "logits.pt"), dense(torch.arange(9)[None]).logits)


def test_a_config_can_be_made_by_type_before_anyone_asked_for_the_classes():
    config = AutoConfig.for_model("pesc_helium", hidden_size=32, pesc={"num_experts": 4})
    assert type(config) is architecture("helium").config
    assert config.pesc["num_experts"] == 4
    with pytest.raises(ModelError, match="no sparse form of model_type 'gpt2'"):
        AutoConfig.for_model("pesc_gpt2")


@pytest.mark.parametrize("model_type", ["qwen3", "starcoder2", "iquestcoder"])
def test_classes_pickle_by_name(model_type):
    _skip_where_unknown(model_type)
    classes = architecture(model_type)
    for cls in (classes.causal_lm, classes.model, classes.config):
        assert pickle.loads(pickle.dumps(cls)) is cls
    assert architecture(f"pesc_{model_type}") is classes
    assert architecture("llama").model.__name__ == "PescLlamaModel"  # a type that borrows Llama's base model has a name of its own


PUBLISHED = {
    "Camelidae-8x7B": (
        "llama",
        dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32000),
        PescConfig(8, 2, 512),
        7_813_206_016,
    ),
    "Camelidae-8x13B": (
        "llama",
        dict(hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40, vocab_size=32000),
        PescConfig(8, 2, 512),
        14_695_224_320,
    ),
    "Camelidae-8x34B": (
        "llama",
        dict(
            hidden_size=7168, intermediate_size=20480, num_hidden_layers=60, num_attention_heads=56, num_key_value_heads=8, vocab_size=64000
        ),
        PescConfig(8, 2, 512),
        37_915_573_248,
    ),
    "Qwen2idae-16x14B": (
        "qwen2",
        dict(
            hidden_size=5120,
            intermediate_size=13696,
            num_hidden_layers=40,
            num_attention_heads=40,
            num_key_value_heads=40,
            vocab_size=152064,
        ),
        PescConfig(16, 4, 512),
        17_526_010_880,
    ),
    "sparsetral-16x7B": (
        "mistral",
        dict(
            hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, vocab_size=32000
        ),
        PescConfig(16, 4, 512),
        9_391_312_896,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_those_of_the_published_models(name):
    model_type, shape, settings, expected = PUBLISHED[name]
    classes = architecture(model_type)
    with torch.device("meta"):
        model = classes.causal_lm(sparse_config(classes.dense_config(**shape), settings))
    assert sum(parameter.numel() for parameter in model.parameters()) == expected


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
ROPE = {
    "theta of Yi": {"rope_theta": 5e6},
    "linear": {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 4.0}},
    "llama3": {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
    "yarn": {"rope_theta": 1e4, "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}},
}


def _with_rope(directory, rope, style):
    """Write RoPE settings into a config.json: `old` as transformers 4 did, at the top level, or `new`, in `rope_parameters`."""
    path = directory / "config.json"
    fields = json.loads(path.read_text())
    del fields["rope_parameters"]
    scaling = rope.get("rope_scaling", {})
    if style == "old":
        fields |= rope
    else:
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        fields["rope_parameters"] = {"rope_theta": rope["rope_theta"], **scaling, "rope_type": kind}
    path.write_text(json.dumps(fields))


@pytest.mark.parametrize("style", ["old", "new"])
@pytest.mark.parametrize("name", ROPE)
def test_rope_settings_are_honoured(tmp_path, name, style):
    save_dense(tmp_path / "dense")
    unscaled = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    _with_rope(tmp_path / "dense", ROPE[name], style)
    save_sparse(tmp_path / "dense", tmp_path / "sparse")
    dense, sparse = (AutoModelForCausalLM.from_pretrained(tmp_path / part) for part in ("dense", "sparse"))
    assert sparse.config.rope_parameters == dense.config.rope_parameters
    assert sparse.config.rope_parameters["rope_theta"] == ROPE[name]["rope_theta"]
    ids = tokens(length=64)
    with torch.no_grad():
        assert torch.equal(sparse(ids).logits, dense(ids).logits)
        assert not torch.equal(sparse(ids).logits, unscaled(ids).logits)
        sparse.save_pretrained(tmp_path / "again")
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "again")(ids).logits, dense(ids).logits)


def test_the_tokenizer_is_the_dense_models(tmp_path):
    save_dense(tmp_path / "dense")
    save_sparse(tmp_path / "dense", tmp_path / "sparse")
    dense, sparse = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("dense", "sparse"))
    assert type(dense) is type(sparse)
    assert dense("naïve <s>").input_ids == sparse("naïve <s>").input_ids
    assert dense.chat_template == sparse.chat_template


def test_a_model_without_the_block_is_refused():
    with pytest.raises(ModelError, match="no `pesc` block"):
        architecture("llama").causal_lm(architecture("llama").config(hidden_size=8, num_hidden_layers=1, num_attention_heads=1))
    with pytest.raises(ModelError, match="no `pesc` block"):
        AutoModel.from_config(architecture("llama").config(hidden_size=8, num_hidden_layers=1, num_attention_heads=1))
    assert is_sparse({"model_type": "pesc_llama"})
    assert not is_sparse(dense_config())


def test_a_wrong_block_is_refused_when_the_config_is_read():
    with pytest.raises(ValueError, match="topk"):
        architecture("llama").config(pesc={"topk": 2})


def test_a_mistral_with_layer_types_is_a_ministral_as_transformers_reads_it(tmp_path):
    """MistralModel knows no layer types: the sparse twin would be of another model than the dense one that loads."""
    layers = {"layer_types": ["sliding_attention", "full_attention"]}
    save_dense(tmp_path, "mistral", sliding_window=4)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert architecture_of(fields) is architecture("mistral")
    (tmp_path / "config.json").write_text(json.dumps(fields | layers))
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is architecture_of(fields | layers).dense_causal_lm
    assert architecture_of(fields | layers) is architecture("ministral")
    with pytest.raises(ModelError, match="set model_type to pesc_ministral"):
        architecture("mistral").config(**layers)


def test_a_mistral_with_layer_types_upcycles_to_the_model_that_transformers_loads(tmp_path):
    layers = {"layer_types": ["sliding_attention", "full_attention"]}
    save_dense(tmp_path / "dense", "mistral", sliding_window=4)
    path = tmp_path / "dense/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | layers))
    save_sparse(tmp_path / "dense", tmp_path / "sparse")
    ids = torch.arange(24)[None]
    dense, sparse = (AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32) for name in ("dense", "sparse"))
    assert type(sparse) is architecture("ministral").causal_lm
    assert torch.equal(dense(ids).logits, sparse(ids).logits)


def test_a_whole_model_pickles_and_copies():
    model = architecture("llama").causal_lm(sparse_config(dense_config("llama"), PescConfig(4, 2, 8))).eval()
    ids = torch.arange(9)[None]
    for again in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert torch.equal(again(ids).logits, model(ids).logits)
        assert type(again.model.layers[0].mlp) is type(model.model.layers[0].mlp)
