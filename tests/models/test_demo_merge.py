"""The trained model of the demo, merged: it computes and writes what the unmerged one does, on fifty real questions.

It needs the demo's training in the store ($PESC_STORE, else ./store: `pesc run demo --until 'train[pesc]'`), and the shared benchmark rows.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import pesc.models
from pesc.models.config import MergeConfig
from pesc.models.merge import build
from pesc.models.nf4 import quantization_config
from pesc.plan import make_plan
from pesc.recipe import load_recipe
from pesc.settings import store_root
from pesc.stage import StageContext
from pesc.store import Store

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(1800)]
QUESTIONS, NEW_TOKENS, BATCH = 50, 32, 10


@pytest.fixture(scope="module")
def demo() -> dict[str, Path]:
    """Input of the demo's merge -> directory."""
    root = store_root()
    if not root.is_dir():
        pytest.skip(f"no store at {root}: run `pesc run demo --until 'train[pesc]'`")
    store = Store(root)
    built = {action.address: action.manifest for action in make_plan(load_recipe("demo"), store)}
    found = {name: built[address] for name, address in (("model", "upcycle[pesc]"), ("adapter", "train[pesc]"), ("blocks", "tokenize"))}
    if missing := [name for name, manifest in found.items() if manifest is None]:
        pytest.skip(f"the store {root} lacks the demo's {', '.join(missing)}: run `pesc run demo --until 'train[pesc]'`")
    pesc.models.register()
    return {name: store.object_path(manifest.output.digest) for name, manifest in found.items() if manifest is not None}


@pytest.fixture(scope="module")
def batches(demo, shared_data) -> list:
    """Fifty questions of GSM8K as user turns, padded on the left."""
    tokenizer = AutoTokenizer.from_pretrained(demo["model"], padding_side="left")
    lines = (shared_data / "data/benchmarks/gsm8k_test.jsonl").read_text().splitlines()[:QUESTIONS]
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": json.loads(line)["question"]}], tokenize=False, add_generation_prompt=True
        )
        for line in lines
    ]
    return [
        tokenizer(texts[n : n + BATCH], padding=True, add_special_tokens=False, return_tensors="pt") for n in range(0, QUESTIONS, BATCH)
    ]


def unmerged(demo: dict[str, Path], base: str) -> torch.nn.Module:
    """The trained model as PEFT and bitsandbytes compute it, in fp32; nothing of this package's merge is in it."""
    options = {"quantization_config": quantization_config("float32")} if base == "dequantized" else {}
    model = AutoModelForCausalLM.from_pretrained(demo["model"], dtype=torch.float32, **options)
    missing = model.load_state_dict(load_file(demo["adapter"] / "bank.safetensors"), strict=False)
    assert not missing.unexpected_keys
    return PeftModel.from_pretrained(model, str(demo["adapter"] / "adapter")).eval()


@torch.inference_mode()
def answers(model: torch.nn.Module, batches: list) -> tuple[list, list]:
    """Logits of the prompts (padding left out) and greedy continuations."""
    logits, texts = [], []
    for batch in batches:
        logits.append(model(**batch).logits[batch["attention_mask"].bool()])
        out = model.generate(**batch, max_new_tokens=NEW_TOKENS, do_sample=False)  # type: ignore[operator]
        texts += out[:, batch["input_ids"].shape[1] :].tolist()
    return logits, texts


@pytest.mark.parametrize("base", ["original", "dequantized"])
def test_merged_equals_unmerged_on_fifty_real_questions(demo, batches, tmp_path, base):
    expected, texts = answers(unmerged(demo, base), batches)
    assert len(texts) == QUESTIONS
    for dtype in ("float32", "bfloat16"):
        out = tmp_path / dtype
        out.mkdir()
        build(StageContext("merge[pesc]", MergeConfig(base=base, dtype=dtype), demo, out, tmp_path / "work"))
        found, said = answers(AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval(), batches)
        difference = max((one - other).abs().max().item() for one, other in zip(expected, found, strict=True))
        same = sum(one == other for one, other in zip(texts, said, strict=True))
        proof = json.loads((out / "proof.json").read_text())["logits"]
        print(f"{base}, {dtype}: largest difference of a logit {difference:.2e}, {same} of {QUESTIONS} texts the same, proof {proof}")
        if dtype == "float32":
            assert difference <= 1e-4
            assert same == QUESTIONS
        else:  # rounding, and nothing else
            assert proof["relative_rms_difference"] <= 1.1 * proof["relative_rms_of_rounding"]
