"""Tiny random models and packed blocks for the training tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from pesc.stage import Execution, StageContext
from pesc.train.config import TrainConfig

VOCABULARY, CONTEXT = 97, 48


def write_blocks(folder: Path, num_blocks: int, seed: int = 0, context: int = CONTEXT, batch_rows: int = 5) -> Path:
    """Packed blocks of arithmetic rows (each token is its predecessor plus the row's stride), so that there is something to learn."""
    random = np.random.default_rng(seed)
    columns: dict[str, list] = {"input_ids": [], "labels": [], "position_ids": [], "cu_seqlens": []}
    for _ in range(num_blocks):
        lengths = random.integers(6, 20, size=2).tolist()
        lengths.append(context - sum(lengths) - int(random.integers(0, 4)))
        rows = [(random.integers(VOCABULARY) + random.integers(1, 4) * np.arange(length)) % VOCABULARY for length in lengths]
        labels = [np.where(np.arange(len(row)) < 3, -100, row) for row in rows]
        columns["input_ids"].append(np.concatenate(rows).astype(np.int32))
        columns["labels"].append(np.concatenate(labels).astype(np.int32))
        columns["position_ids"].append(np.concatenate([np.arange(length) for length in lengths]).astype(np.int32))
        columns["cu_seqlens"].append(np.cumsum([0, *lengths]).astype(np.int32))
    table = pa.table({name: pa.array(values, type=pa.list_(pa.int32())) for name, values in columns.items()})
    folder.mkdir(parents=True, exist_ok=True)
    half = num_blocks // 2
    for number, part in enumerate((table.slice(0, half), table.slice(half))):
        path = folder / f"blocks-{number:05d}.arrow"
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(part, max_chunksize=batch_rows)
    return folder


def dense_config():
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=128, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip


def save_dense(folder: Path) -> Path:
    import torch
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(dense_config()).to(torch.bfloat16).save_pretrained(folder)
    return folder


def save_sparse(folder: Path) -> Path:
    import torch

    from pesc.models.factory import architecture, sparse_config
    from pesc.moe.config import PescConfig

    torch.manual_seed(0)
    config = sparse_config(
        dense_config(), PescConfig(num_experts=4, top_k=2, adapter_dim=8, dispatch="dense")
    )  # runs are compared bit by bit
    architecture("llama").causal_lm(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def settings(**changes) -> TrainConfig:
    """Four steps of four blocks in fp32, unless said otherwise."""
    defaults = {
        "quantization": "none", "compute_dtype": "float32", "optimizer": "adamw_torch", "lora": {"rank": 4, "alpha": 8.0, "dropout": 0.1},
        "learning_rate": 1e-3, "max_steps": 4, "global_batch_size": 4, "max_grad_norm": 1.0, "seed": 7,
    }  # fmt: skip
    return TrainConfig.model_validate(defaults | changes)


def make_context(
    root: Path, model: Path, blocks: Path, config: TrainConfig, execution: dict | None = None, on_progress=lambda _p: None
) -> StageContext:
    for name in ("out", "work"):
        (root / name).mkdir(parents=True, exist_ok=True)
    where = Execution.model_validate({"device": "cpu", "num_processes": 2, "gradient_checkpointing": "none"} | (execution or {}))
    return StageContext("train[tiny]", config, {"model": model, "blocks": blocks}, root / "out", root / "work", where, on_progress)
