"""Tiny real models on disk: random weights, a real tokenizer, a real PEFT adapter after some real optimizer steps."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import pesc.models
from pesc.models.config import UpcycleConfig
from pesc.models.factory import architecture, sparse_config
from pesc.models.identity import model_digest
from pesc.models.tensor_files import TensorDirectory
from pesc.models.upcycle import upcycle_directory
from pesc.moe.balance import RouterRecorder
from pesc.moe.config import PescConfig
from pesc.moe.layer import sparse_parameters

VOCABULARY = 259
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
UPCYCLE = UpcycleConfig(num_experts=4, top_k=2, adapter_dim=8)
PESC = PescConfig(num_experts=4, top_k=2, adapter_dim=8)

_LATENT = {
    "num_key_value_heads": 4,
    "head_dim": None,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
_LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
_LAYERWISE = {"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8}
_OWN_FIELDS: dict[str, dict] = {
    "gemma3n_text": {
        **_LAYERWISE,
        "num_kv_shared_layers": 0,
        "layer_types": ["sliding_attention", "full_attention"],
        "activation_sparsity_pattern": [0.0, 0.0],
        "laurel_rank": 4,
    },
    "gemma4_text": {**_LAYERWISE, "global_head_dim": 8},
    "gemma4_unified_text": {"global_head_dim": 8},
    "minicpm3": _LATENT,
    "qwen3_5_text": {**_LINEAR, "layer_types": ["linear_attention", "full_attention"]},
    "youtu": _LATENT,
}
"""What a type needs beside the common fields to be small."""


def dense_config(model_type: str = "llama", **changes):
    """A config of some thousand parameters for any architecture."""
    fields = dict(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=258,
        # wide enough that a change of any weight shows in the logits
        initializer_range=0.15,
    )
    if model_type not in ("llama", "mistral", "qwen2", "phi3", "olmo2", "granite"):  # those follow hidden_size
        fields["head_dim"] = 8
    fields |= _OWN_FIELDS.get(model_type, {}) | changes
    return architecture(model_type).dense_config(**{name: value for name, value in fields.items() if value is not None})


def make_sparse(model_type: str = "llama", trained: bool = True, dtype=torch.float32, **changes):
    """A sparse model in memory; `trained` fills the bank, so that the adapters do something."""
    torch.manual_seed(3)
    model = architecture(model_type).causal_lm(sparse_config(dense_config(model_type, **changes), PESC)).to(dtype).eval()
    return fill_bank(model) if trained else model


def fill_bank(model):
    """The model with adapters that do something, as after training."""
    with torch.no_grad():
        for name, parameter in sparse_parameters(model):
            if name.endswith("adapters.up"):
                parameter.normal_(std=0.3)
    return model


def tokens(rows: int = 2, length: int = 12, seed: int = 0) -> torch.Tensor:
    """Token ids without special ones."""
    return torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(seed))


def save_tokenizer(directory: Path) -> None:
    """A byte-level tokenizer: one token a byte, and three special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate(alphabet)} | {"<s>": 256, "</s>": 257, "<pad>": 258}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    fast.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    fast.save_pretrained(directory)


def save_dense(directory: Path, model_type: str = "llama", dtype=torch.bfloat16, shard_size: str = "1GB", **changes) -> Path:
    """A dense model directory with tokenizer."""
    torch.manual_seed(11)
    model = architecture(model_type).dense_causal_lm(dense_config(model_type, **changes)).to(dtype)
    model.save_pretrained(directory, max_shard_size=shard_size)
    save_tokenizer(directory)
    return directory


def save_sparse(dense_dir: Path, directory: Path, config: UpcycleConfig = UPCYCLE) -> Path:
    """The upcycled form of a dense directory."""
    directory.mkdir(parents=True)
    upcycle_directory(dense_dir, directory, config)
    return directory


def save_trained(model_dir: Path, directory: Path, steps: int = 6, quantization: str = "none", **lora) -> Path:
    """A train object: a few AdamW steps on random tokens, saved by PEFT; the bank and the table of what was trained beside it."""
    pesc.models.register()
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    options = {"r": 4, "lora_alpha": 8, "target_modules": PROJECTIONS} | lora
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options))
    bank = dict(sparse_parameters(model.base_model.model))
    for parameter in bank.values():
        parameter.requires_grad_()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    for _ in range(steps):
        _step(model, optimizer, sparse=bool(bank))
    model.save_pretrained(directory / "adapter")
    if bank:
        save_file(
            {name: p.detach().to(torch.bfloat16).contiguous() for name, p in bank.items()}, directory / "bank.safetensors", {"format": "pt"}
        )
    groups = {"lora": [], "bank": [], "router": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups["lora" if ".lora_" in name else "router" if ".router." in name else "bank"].append(parameter.numel())
    trainable = [{"group": group, "tensors": len(sizes), "parameters": sum(sizes)} for group, sizes in groups.items() if sizes]
    training = {
        "config": {"method": "pesc" if bank else "qlora", "quantization": quantization, "compute_dtype": "bfloat16"},
        "trainable": trainable,
        "facts": {"model_digest": model_digest(model_dir)},
    }
    (directory / "training.json").write_text(json.dumps(training))
    return directory


def _step(model, optimizer, sparse: bool) -> None:
    ids = torch.randint(0, 256, (2, 24))
    if sparse:
        with RouterRecorder(model) as recorder:
            loss = model(input_ids=ids, labels=ids).loss
        loss = loss + 0.01 * recorder.balance_loss()
    else:
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def save_blocks(directory: Path) -> Path:
    """The part of a tokenize object that a merge reads."""
    directory.mkdir(parents=True)
    prompts = ["user: Why is the sky blue?</s>assistant: ", "user: 17 + 25 = ?</s>assistant: ", "user: Write a haiku.</s>assistant: "]
    (directory / "prompts.json").write_text(json.dumps(prompts))
    return directory


def save_published(directory: Path, model_type: str, name_of_expert: str, published_type: str, **fields):
    """A model in a published layout, written by hand; returns the model itself, in this package's classes."""
    torch.manual_seed(1)
    classes = architecture(model_type)
    model = classes.causal_lm(sparse_config(dense_config(model_type), PescConfig(4, 2, 8, scaling=fields.get("moe_scaling", 1.0)))).eval()
    with torch.no_grad():
        for name, parameter in sparse_parameters(model):
            if name.endswith("up"):
                parameter.normal_(std=0.3)
    tensors = {}
    for name, tensor in model.state_dict().items():
        if ".adapters." in name:
            prefix, part = name.split(".adapters.")
            for expert, matrix in enumerate(tensor):
                key = f"{prefix}.moe_adapter.experts.{name_of_expert.format(expert)}.adapter_{part}.weight"
                tensors[key] = (matrix.T if part == "up" else matrix).contiguous()
        else:
            tensors[name.replace(".mlp.router.", ".mlp.moe_adapter.router.")] = tensor
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    config = model.config.to_dict()
    del config["pesc"]
    config |= {"model_type": published_type, "num_experts": 4, "topk": 2, "adapter_dim": 8, "top_k": 50} | fields
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "modeling_x.py").write_text("raise SystemExit")
    return model


def rewrite_weights(out, change):
    """Rewrite every tensor of a written model that `change(tensors)` gives another value, into one file."""
    tensors = {name: TensorDirectory(out).read(name) for name in TensorDirectory(out).files}
    change(tensors)
    for path in out.glob("*.safetensors*"):
        path.unlink()
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, out / "model.safetensors", {"format": "pt"})


def without(pairs, name):
    return {weight: keys for weight, keys in pairs.items() if weight != name}
