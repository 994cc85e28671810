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
QUESTIONS, NEW_TOKENS, BATCH = 50, 24, 10


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
def greedy(model: torch.nn.Module, batch) -> torch.Tensor:
    """Prompts and their greedy continuations [B, S]."""
    return model.generate(**batch, max_new_tokens=NEW_TOKENS, do_sample=False)  # type: ignore[operator]


@torch.inference_mode()
def logits_of(model: torch.nn.Module, batch, ids_BS: torch.Tensor) -> torch.Tensor:
    """Logits [B, S, V] of prompts and continuations in one pass, at the positions that generation gives them."""
    mask_BS = torch.cat([batch["attention_mask"], torch.ones_like(ids_BS[:, batch["attention_mask"].shape[1] :])], dim=1)
    return model(input_ids=ids_BS, attention_mask=mask_BS, position_ids=(mask_BS.cumsum(-1) - 1).clamp(min=0)).logits


def same_texts(logits_BSV: torch.Tensor, ids_BS: torch.Tensor, prompt: int, end: int) -> int:
    """Rows whose every continued token is the one that these logits choose: by induction, their greedy text is the same."""
    chosen, said = logits_BSV[:, prompt - 1 : -1].argmax(-1), ids_BS[:, prompt:]
    ended = (said == end).cumsum(-1) - (said == end).long() > 0  # what follows the end token is padding
    return ((chosen == said) | ended).all(dim=1).sum().item()


def alone(model: torch.nn.Module, batch, ids_BS: torch.Tensor) -> torch.Tensor:
    """The same logits, row by row: what they differ by is the order of the model's own sums."""
    mask_BP = batch["attention_mask"]
    return torch.cat([logits_of(model, {"attention_mask": mask_BP[n : n + 1]}, ids_BS[n : n + 1]) for n in range(len(ids_BS))])


@pytest.mark.parametrize("base", ["original", "dequantized"])
def test_merged_equals_unmerged_on_fifty_real_questions(demo, batches, tmp_path, base):
    merged = {}
    for dtype in ("float32", "bfloat16"):
        out = tmp_path / dtype
        out.mkdir()
        build(StageContext("merge[pesc]", MergeConfig(base=base, dtype=dtype), demo, out, tmp_path / "work"))
        merged[dtype] = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    trained, end = unmerged(demo, base), AutoTokenizer.from_pretrained(demo["model"]).eos_token_id
    furthest, same = dict.fromkeys((*merged, "itself"), 0.0), dict.fromkeys(merged, 0)
    for batch in batches:
        prompt, ids_BS = batch["input_ids"].shape[1], greedy(merged["float32"], batch)
        expected_BSV = logits_of(trained, batch, ids_BS)
        assert same_texts(expected_BSV, ids_BS, prompt, end) == len(ids_BS), "the unmerged model would have said something else"
        real = torch.ones_like(ids_BS, dtype=torch.bool)
        real[:, :prompt] = batch["attention_mask"].bool()
        found = {dtype: logits_of(model, batch, ids_BS) for dtype, model in merged.items()} | {"itself": alone(trained, batch, ids_BS)}
        for name, found_BSV in found.items():
            furthest[name] = max(furthest[name], (found_BSV - expected_BSV)[real].abs().max().item())
        for dtype in merged:
            same[dtype] += same_texts(found[dtype], ids_BS, prompt, end)
    proof = json.loads((tmp_path / "bfloat16/proof.json").read_text())["logits"]
    print(f"{base}: largest difference of a logit {furthest}, the same texts of {QUESTIONS}: {same}; bfloat16: {proof}")
    assert furthest["float32"] <= max(1e-4, 2 * furthest["itself"]), (
        "further off than the unmerged model's rows are from themselves in a batch"
    )
    assert same["float32"] == QUESTIONS
    if base == "original":  # in fp64 only the merge's own rounding is left
        ids_BS = greedy(merged["float32"], batches[0])
        exact = [logits_of(model.double(), batches[0], ids_BS) for model in (trained, merged["float32"])]
        rounding = (exact[0] - exact[1])[:, batches[0]["input_ids"].shape[1] :].abs().max().item()
        print(f"in fp64, of the first {BATCH} answers: {rounding:.1e}")
        assert rounding <= 1e-4
    assert proof["relative_rms_difference"] <= 1.1 * proof["relative_rms_of_rounding"]
