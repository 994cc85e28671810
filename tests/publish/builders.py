"""Model directories to publish: real settings, tokenizer and safetensors, of random bytes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

CARD = "---\nlicense: apache-2.0\npipeline_tag: text-generation\n---\n\n# A model\n"
CODE = "from .parts_of_it import Part\nimport torch\n"
SHARD_BYTES = 6 << 20
"""Above what is sent alone, and counted."""


def save_model(directory: Path, num_shards: int = 3, shard_bytes: int = SHARD_BYTES, seed: int = 0) -> Path:
    """A directory as `pesc export` writes one, with shards of random bytes."""
    directory.mkdir(parents=True)
    random = np.random.default_rng(seed)
    names = {f"w{i}": f"model-{i + 1:05}-of-{num_shards:05}.safetensors" for i in range(num_shards)}
    for tensor, file in names.items():
        save_file({tensor: random.integers(0, 256, shard_bytes, dtype=np.uint8)}, directory / file)
    index = {"metadata": {"total_size": num_shards * shard_bytes}, "weight_map": names}
    settings = {"model_type": "pesc_llama", "pesc": {"num_experts": 4}, "auto_map": {"AutoModelForCausalLM": "modeling_pesc.Model"}}
    texts = {
        "model.safetensors.index.json": json.dumps(index), "config.json": json.dumps(settings), "generation_config.json": "{}",
        "tokenizer.json": '{"version": "1.0"}', "tokenizer_config.json": "{}", "chat_template.jinja": "{{ messages }}", "README.md": CARD,
        "modeling_pesc.py": CODE, "parts_of_it.py": "class Part: ...\n", "ledger.json": "{}", "proof.json": "{}", "LICENSE": "Apache",
    }  # fmt: skip
    for name, text in texts.items():
        (directory / name).write_text(text)
    return directory


LITTER = {
    ".env": "hidden", ".cache/": "hidden", "checkpoint-7/": "a directory", "training_args.bin": "a pickle", "optimizer.pt": "a pickle",
    "half.tmp": "unfinished", "model-00001-of-00009.safetensors": "weights that the model does not name", "notes.txt": "no file of a model",
    "secrets.py": "code that config.json does not name", "README.md~": "unfinished", "prompts.jsonl": "no file of a model",
}  # fmt: skip
"""What lies about in directories -> why it is not sent."""


def litter(directory: Path) -> None:
    for name in LITTER:
        if name.endswith("/"):
            (directory / name).mkdir()
            (directory / name / "token").write_text("hf_secret")
        else:
            (directory / name).write_text("hf_secret")


def file_bytes(directory: Path) -> dict[str, bytes]:
    """Every file at the top, as published."""
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file() and path.name not in LITTER}
