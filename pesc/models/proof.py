"""The proof that a merge lost nothing: the written model against the unmerged one, both in fp32.

The unmerged model is the model of the `model` input with its LoRA loaded and applied by PEFT, and the trained router and bank loaded
by name; nothing of `pesc.models.merge`'s arithmetic is in it.  Three comparisons:

    weights   every weight on disk is PEFT's own merge of that weight, up to one rounding of the dtype on disk.  Sharp whatever the training did.
    logits    root mean square of the difference over that of the logits, on real prompts.  Shows that the directory as a whole computes the same.
    routing   share of tokens whose set of K experts is the same, for each layer.

The numbers are rounded to three digits: they may still differ between kinds of CPU, as training itself does.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pesc.errors import ModelError
from pesc.models.tensor_files import TensorDirectory

if TYPE_CHECKING:
    import torch

    from pesc.models.config import MergeConfig
    from pesc.models.merge import MergeParts

logger = logging.getLogger(__name__)

MAX_TOKENS = 256
"""Tokens of each prompt that are compared."""
LOGIT_TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}
"""Allowed root mean square of the difference, relative to the logits'.  A weight in bf16 is off by up to 2^-9, and some hundred of them lie between
a token and its logits."""
ROUNDING = {"float32": 2.0**-22, "bfloat16": 2.0**-7}
"""Allowed difference of a weight relative to its size: one unit in the last place (two for fp32, where the two sums are the only rounding)."""


def read_prompts(blocks_dir: Path, count: int) -> list[str]:
    """The first `count` held-out prompts of a tokenize object.  Raises ModelError when there is none."""
    path = blocks_dir / "prompts.json"
    prompts = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    prompts = [prompt for prompt in prompts if isinstance(prompt, str) and prompt.strip()]
    if not prompts:
        raise ModelError(f"{path} has no prompt, so the merge cannot be proven: run `tokenize` again with more rows.")
    return prompts[:count]


def prove(parts: MergeParts, merged_dir: Path, prompts: list[str], config: MergeConfig) -> dict[str, Any]:
    """Compare; returns what proof.json holds.  Raises ModelError when a comparison is out of its tolerance."""
    import torch

    tokens = encode(parts.model_dir, prompts)
    with torch.inference_mode():
        model = load(parts.model_dir, parts.fields)
        start = run(model, tokens)
        unmerged = _apply_training(model, parts)
        expected = run(unmerged, tokens)
        weights = _compare_weights(unmerged.merge_and_unload(), merged_dir, config.dtype)
        del model, unmerged
        merged = run(load(merged_dir), tokens)
    return {
        "tolerance": {"logits": LOGIT_TOLERANCE[config.dtype], "weights": ROUNDING[config.dtype]},
        "prompts": len(tokens),
        "tokens": sum(ids.numel() for ids in tokens),
        "weights": weights,
        "logits": compare_logits(start, expected, merged, config.dtype),
        "routing": _compare_routing(expected, merged),
    }


def encode(model_dir: Path, prompts: list[str]) -> list[torch.Tensor]:
    """Token ids [1, S] of each prompt; the prompts are rendered already, special tokens included."""
    from transformers import AutoTokenizer

    import pesc.models

    pesc.models.register()
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    encoded = [tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids[:, :MAX_TOKENS] for prompt in prompts]
    return [ids for ids in encoded if ids.numel()]


def load(directory: Path, fields: Mapping[str, Any] | None = None) -> Any:
    """The model of a directory in fp32; with `fields`, as a model of that config.json."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(directory)
    if fields and "pesc" in fields:
        config.pesc = fields["pesc"]
    return AutoModelForCausalLM.from_pretrained(directory, config=config, dtype=torch.float32).eval()


def _apply_training(model: Any, parts: MergeParts) -> Any:
    """The unmerged model: base weights as they were trained against, trained bank, LoRA active.  Every trained tensor must find its place."""
    from peft import PeftModel
    from safetensors.torch import load_file

    parameters = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name in parts.quantized:
        parameters[name].copy_(parts.base_weight(name))
    if parts.bank:
        for name, tensor in load_file(parts.bank_path).items():
            parameters[name].copy_(tensor)
    return PeftModel.from_pretrained(model, parts.adapter_dir).eval()


def run(model: Any, tokens: list[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """Per prompt: `logits` [S, V] and, by router, the sorted chosen experts [S, K]."""
    from pesc.moe.layer import sparse_parameters

    if next(sparse_parameters(model), None) is None:
        return [{"logits": model(input_ids=ids, use_cache=False).logits[0]} for ids in tokens]
    return [_run_recorded(model, ids) for ids in tokens]


def _run_recorded(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    from pesc.moe.balance import RouterRecorder

    with RouterRecorder(model) as recorder:
        result = {"logits": model(input_ids=ids, use_cache=False).logits[0]}
    for name, logits in recorder.counted().items():
        index = recorder.routers[name].select(logits)[0]
        result[name.removeprefix("base_model.model.")] = index.sort(dim=-1).values
    return result


def _compare_weights(reference: Any, merged_dir: Path, dtype: str) -> dict[str, Any]:
    """Every tensor on disk against PEFT's own merge in memory, element by element."""
    import torch

    written, parameters = TensorDirectory(merged_dir), dict(reference.named_parameters(remove_duplicate=False))
    unknown = sorted(set(written.files) - set(parameters) - set(dict(reference.named_buffers())))
    if unknown:
        raise ModelError(
            f"The merged directory has {unknown[0]}, which the unmerged model does not have: this is a defect of the merge; report it."
        )
    _compare_buffers(reference, written)
    worst = 0.0
    for name in sorted(set(written.files) & set(parameters)):
        expected, found = parameters[name], written.read(name).float()
        # PEFT and this package sum in another order; where W and the LoRA cancel, that shows relative to the largest weight.
        allowed = ROUNDING[dtype] * expected.abs() + 2e-6 * expected.abs().max()
        ratio = torch.where(allowed > 0, (found - expected).abs() / allowed.clamp(min=1e-30), (found - expected).abs()).max().item()
        if not ratio <= 1:
            raise ModelError(
                f"The merged {name} is not the trained one: it is off by {(found - expected).abs().max().item():.3g} where "
                f"{dtype} allows one rounding. The merge is refused; this is a defect of the merge or of the adapter's files."
            )
        worst = max(worst, ratio)
    return {"compared": len(set(written.files) & set(parameters)), "worst_share_of_tolerance": _digits(worst)}


def _compare_buffers(reference: Any, written: TensorDirectory) -> None:
    """What is counted and not rounded, such as the routers' biases: equal, or the merge is refused."""
    for name, buffer in reference.named_buffers():
        if name in written.files and not written.read(name).equal(buffer.to(written.read(name).dtype)):
            raise ModelError(f"The merged {name} is not the trained one. The merge is refused; this is a defect of the merge: report it.")


def compare_logits(start: list, expected: list, merged: list, dtype: str) -> dict[str, Any]:
    """How far the merged logits are from the expected ones, and those from the start's.  Raises ModelError above the tolerance of `dtype`."""
    import torch

    reference, found, before = (torch.cat([result["logits"] for result in results]) for results in (expected, merged, start))
    scale = reference.square().mean().sqrt()
    difference = found - reference
    relative = (difference.square().mean().sqrt() / scale).item()
    effect = ((reference - before).square().mean().sqrt() / scale).item()
    if not relative <= LOGIT_TOLERANCE[dtype]:
        raise ModelError(
            f"The merged model's logits differ from the unmerged model's by {relative:.2%} (root mean square), more than the {LOGIT_TOLERANCE[dtype]:.2%} "
            f"that rounding to {dtype} explains. The merge is refused; merge.dtype=float32 shows whether rounding is the cause."
        )
    agreement = (found.argmax(-1) == reference.argmax(-1)).float().mean().item()
    return {
        "max_difference": _digits(difference.abs().max().item()),
        "relative_rms_difference": _digits(relative),
        "relative_rms_effect_of_training": _digits(effect),
        "same_top_token": _digits(agreement),
    }


def _compare_routing(expected: list, merged: list) -> dict[str, float]:
    """Router's name -> share of tokens whose K experts are the same."""
    import torch

    names = [name for name in expected[0] if name != "logits"]
    agreement = {}
    for name in names:
        same = torch.cat([(one[name] == other[name]).all(dim=-1) for one, other in zip(expected, merged, strict=True)])
        agreement[name] = _digits(same.float().mean().item())
    return agreement


def _digits(value: float) -> float:
    return float(f"{value:.3g}")
