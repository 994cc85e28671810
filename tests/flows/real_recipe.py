"""A recipe whose every stage is real and takes seconds: a random two-layer Llama, forty rows, one benchmark of six questions.

python -m tests.flows.real_recipe FOLDER        writes FOLDER/real.yaml and its sources
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import yaml

from tests.evaluate.builders import build_data, build_model

THINGS = ("apple", "river", "cloud", "hammer", "violin", "comet", "garden", "window")
ASKS = ("What colour is the {}?", "Where do people find a {}?", "How heavy is one {}?", "Who would want the {}?", "Why is a {} useful?")


def write_rows(folder: Path) -> None:
    """Forty conversations of one turn, no two alike."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, thing in enumerate(THINGS):
        for other, ask in enumerate(ASKS):
            answer = f"The {thing} is number {number * 17 + other * 5} of its kind, {' '.join(THINGS[(number + k * other) % 8] for k in range(1, 5))}."
            rows.append({"messages": [{"role": "user", "content": ask.format(thing)}, {"role": "assistant", "content": answer}]})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_recipe(folder: Path, name: str = "real", steps: int = 4) -> Path:
    """The recipe's file, beside its sources."""
    build_model(folder / "model")
    build_data(folder / "items")
    write_rows(folder / "rows")
    recipe = {
        "name": name,
        "base": "model",
        "sources": {source: {"uri": str(folder / source)} for source in ("model", "rows", "items")},
        "dedup": {"datasets": {"rows": {"source": "rows", "domain": "general"}}},
        "mix": {"total": 32, "weights": {"general": 1}},
        "tokenize": {"context_length": 128},
        "upcycle": {"num_experts": 4, "top_k": 2, "adapter_dim": 8, "dispatch": "segments"},
        "train": {
            "quantization": "none", "compute_dtype": "float32", "optimizer": "adamw_torch", "lora": {"rank": 4, "alpha": 8.0, "dropout": 0.1},
            "learning_rate": 1e-3, "max_steps": steps, "global_batch_size": 4, "micro_batch_size": 1, "seed": 7,
        },
        "merge": {"base": "original"},
        "evaluate": {
            "benchmarks": {
                "quiz": {"task": "pesc_openbookqa", "metric": "acc", "source": "items", "files": {"test": "choices.jsonl"}, "dtype": "float32"}
            }
        },
        "routing": {"dtype": "float32"},
        "arms": {"pesc": {"method": "pesc"}, "lora": {"method": "lora"}},
        "execution": {"device": "cpu", "num_processes": 1, "gradient_checkpointing": "none", "save_every_steps": 1, "num_workers": 1},
    }  # fmt: skip
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


if __name__ == "__main__":
    print(write_recipe(Path(sys.argv[1])))
