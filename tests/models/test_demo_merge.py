"""The trained model of the demo, merged: it computes and writes what the unmerged one does, on fifty real questions.

It needs the demo's training in the store ($PESC_STORE, else ./store: `pesc run demo --until 'train[pesc]'`), and the shared benchmark rows.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import pesc.models
from pesc.models.config import MergeConfig
from pesc.models.merge import build
from pesc.models.nf4 import quantization_config
from pesc.moe.router import find_routers
from pesc.plan import make_plan
from pesc.recipe import load_recipe
from pesc.settings import store_root
from pesc.stage import StageContext
from pesc.store import Store

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(1800)]
QUESTIONS, NEW_TOKENS, BATCH = 50, 24, 10
ROUTE_TIE = 1e-4
"""Two router logits so near that the order of float32 sums may turn which expert is the second."""


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
    """The trained model as PEFT and bitsandbytes compute it, in fp32; nothing of this package's merge is in it.

    Its 4-bit projections think that they are training: for inference bitsandbytes has a kernel in bf16 on some CPUs.
    """
    options = {"quantization_config": quantization_config("float32")} if base == "dequantized" else {}
    model = AutoModelForCausalLM.from_pretrained(demo["model"], dtype=torch.float32, **options)
    missing = model.load_state_dict(load_file(demo["adapter"] / "bank.safetensors"), strict=False)
    assert not missing.unexpected_keys
    trained = PeftModel.from_pretrained(model, str(demo["adapter"] / "adapter")).eval()
    for module in trained.modules():
        module.training = isinstance(module, Linear4bit)
    return trained


@torch.inference_mode()
def greedy(model: torch.nn.Module, batch) -> torch.Tensor:
    """Prompts and their greedy continuations [B, S]."""
    return model.generate(**batch, max_new_tokens=NEW_TOKENS, do_sample=False)  # type: ignore[operator]


@torch.inference_mode()
def logits_of(model: torch.nn.Module, batch, ids_BS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [B, S, V] of prompts and continuations in one pass, at the positions that generation gives them; router logits [B, S, L, E]."""
    mask_BS = torch.cat([batch["attention_mask"], torch.ones_like(ids_BS[:, batch["attention_mask"].shape[1] :])], dim=1)
    seen: list[torch.Tensor] = []
    hooks = [router.register_forward_hook(lambda _m, _a, out: seen.append(out)) for router in find_routers(model).values()]
    logits = model(input_ids=ids_BS, attention_mask=mask_BS, position_ids=(mask_BS.cumsum(-1) - 1).clamp(min=0)).logits
    for hook in hooks:
        hook.remove()
    return logits, torch.stack(seen, dim=2)


def turned(expected_BSLE: torch.Tensor, found_BSLE: torch.Tensor, real_BS: torch.Tensor) -> torch.Tensor:
    """[B, S]: behind a token whose experts two runs choose differently.  That must be a tie, and be so for few tokens."""
    other_BSL = (expected_BSLE.topk(2).indices.sort().values != found_BSLE.topk(2).indices.sort().values).any(-1) & real_BS[:, :, None]
    top_BSLK = expected_BSLE.topk(3).values
    gap_BSL = top_BSLK[..., 1] - top_BSLK[..., 2]
    for row, position in zip(*torch.where(other_BSL.any(-1) & (other_BSL.any(-1).cumsum(1) == 1)), strict=True):
        layer = int(other_BSL[row, position].int().argmax())  # the first; later layers and tokens have other inputs then
        assert gap_BSL[row, position, layer] < ROUTE_TIE, (
            f"layer {layer} chose another expert, {gap_BSL[row, position, layer]} away from a tie"
        )
    return other_BSL.any(-1).cumsum(1) > 0


def same_texts(logits_BSV: torch.Tensor, ids_BS: torch.Tensor, prompt: int, end: int) -> int:
    """Rows whose every continued token is the one that these logits choose: by induction, their greedy text is the same."""
    chosen, said = logits_BSV[:, prompt - 1 : -1].argmax(-1), ids_BS[:, prompt:]
    ended = (said == end).cumsum(-1) - (said == end).long() > 0  # what follows the end token is padding
    return ((chosen == said) | ended).all(dim=1).sum().item()


def alone(model: torch.nn.Module, batch, ids_BS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same logits, row by row: what they differ by is the order of the model's own sums."""
    mask_BP = batch["attention_mask"]
    rows = [logits_of(model, {"attention_mask": mask_BP[n : n + 1]}, ids_BS[n : n + 1]) for n in range(len(ids_BS))]
    logits, routers = zip(*rows, strict=True)
    return torch.cat(logits), torch.cat(routers)


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
    ties = positions = 0
    for batch in batches:
        prompt, ids_BS = batch["input_ids"].shape[1], greedy(merged["float32"], batch)
        expected_BSV, routers_BSLE = logits_of(trained, batch, ids_BS)
        assert same_texts(expected_BSV, ids_BS, prompt, end) == len(ids_BS), "the unmerged model would have said something else"
        real_BS = torch.ones_like(ids_BS, dtype=torch.bool)
        real_BS[:, :prompt] = batch["attention_mask"].bool()
        found = {dtype: logits_of(model, batch, ids_BS) for dtype, model in merged.items()} | {"itself": alone(trained, batch, ids_BS)}
        for name, (found_BSV, found_BSLE) in found.items():
            compared_BS = real_BS
            if name != "bfloat16":  # whose routing its rounding may change
                compared_BS = real_BS & ~turned(routers_BSLE, found_BSLE, real_BS)
            if name == "float32":
                ties, positions = ties + int((real_BS & ~compared_BS).sum()), positions + int(real_BS.sum())
            furthest[name] = max(furthest[name], (found_BSV - expected_BSV)[compared_BS].abs().max().item())
        for dtype in merged:
            same[dtype] += same_texts(found[dtype][0], ids_BS, prompt, end)
    proof = json.loads((tmp_path / "bfloat16/proof.json").read_text())["logits"]
    print(
        f"{base}: largest difference of a logit {furthest}, without {ties} of {positions} positions behind a tie of two experts; the same texts of "
        f"{QUESTIONS}: {same}; bfloat16: {proof}"
    )
    assert ties <= positions // 50
    assert furthest["float32"] <= max(1e-4, 2 * furthest["itself"]), (
        "further off than the unmerged model's rows are from themselves in a batch"
    )
    assert same["float32"] == QUESTIONS
    if base == "original":  # in fp64 only the merge's own rounding is left
        ids_BS = greedy(merged["float32"], batches[0])
        exact = [logits_of(model.double(), batches[0], ids_BS)[0] for model in (trained, merged["float32"])]
        rounding = (exact[0] - exact[1])[:, batches[0]["input_ids"].shape[1] :].abs().max().item()
        print(f"in fp64, of the first {BATCH} answers: {rounding:.1e}")
        assert rounding <= 1e-4
    assert proof["relative_rms_difference"] <= 1.1 * proof["relative_rms_of_rounding"]
