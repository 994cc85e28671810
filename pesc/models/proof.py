"""The proof that a merge lost nothing: the written model against the unmerged one, both computed in fp32.

The unmerged model is PEFT's own, put together from the files of the training (`pesc.models.trained_reference`).  Four comparisons:

    settings  config.json is the trained model's, field by field: a factor on the experts that changed would leave every tensor right.
    weights   every weight on disk is PEFT's own merge of that weight, rounded once; whatever has no LoRA is equal, bit by bit.
    logits    root mean square of the difference over that of the logits, on real prompts, beside what rounding the weights alone makes of it.
    routing   share of tokens whose set of K experts is the same, for each layer.

A weight that is stored in NF4 is compared code by code (`pesc.models.nf4_proof`), and runs as it is restored; `rounded` is then PEFT's merge after
NF4, and the written model must agree with that far more closely than with the unmerged one.

No model is in memory: each pass reads the weights one module at a time.  The numbers are rounded to three digits: they may still differ between
kinds of CPU, as training itself does.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pesc.errors import ModelError
from pesc.models.merge_nf4 import plain_dtype
from pesc.models.merge_write import merged_fields
from pesc.models.nf4_files import NF4, read_weight, weight_specs
from pesc.models.nf4_proof import STEP, compare_stored
from pesc.models.tensor_files import TensorDirectory
from pesc.models.upcycle import read_config
from pesc.remote_code import refuse_own_code

if TYPE_CHECKING:
    import torch

    from pesc.models.config import MergeConfig
    from pesc.models.merge import MergeParts
    from pesc.models.trained_reference import TrainedReference

MAX_TOKENS = 256
"""Tokens of each prompt that are compared."""
LOGIT_TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "nf4": 0.5}
"""Allowed root mean square of the difference, relative to the logits'.  A weight in bf16 is off by up to 2^-9, and some hundred of them lie between
a token and its logits.  One in NF4 is off by a tenth of its size, root mean square, and so is a projection's output; over the layers that grows to
some tenths.  Unrelated logits differ by 1.4: at half of their size, the model that was quantised is another model."""
ROUNDING = {"float32": 2.0**-22, "bfloat16": 2.0**-8, "nf4": STEP}
"""Allowed difference of a weight relative to its size: half a unit in the last place (two for fp32, where the two sums are the only rounding).  For
NF4 half of the widest step, relative to the largest of the weight's block."""
ROUNDING_SLACK = 2.0
"""Most that the logits may be off, as a multiple of what rounding the weights alone does to them."""
NF4_SLACK = 0.1
"""Most that the logits of a model in NF4 may differ from those of PEFT's merge after NF4, as a multiple of what NF4 does: weights at a tie, of which
there is one in a million, may fall either way."""
_BATCH = 8
"""Prompts in one pass: each pass reads the whole model."""


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

    from pesc.models.streamed import streamed_model
    from pesc.models.trained_reference import TrainedReference

    tokens, written = encode(parts.model_dir, prompts), TensorDirectory(merged_dir)
    _compare_settings(merged_fields(parts, config), read_config(merged_dir))
    with torch.inference_mode():
        trained = TrainedReference(parts)
        weights = compare_weights(trained, written, config.dtype)
        start = run(streamed_model(read_config(parts.model_dir), parts.model.read), tokens)
        expected = run(trained.model, tokens)
        rounded = run(trained.rounded_model(getattr(torch, plain_dtype(config.dtype))), tokens) if config.dtype != "float32" else None
        merged = run(streamed_model(read_config(merged_dir), partial(read_weight, written)), tokens)
    return {
        "tolerance": {"logits": LOGIT_TOLERANCE[config.dtype], "weights": ROUNDING[config.dtype]},
        "prompts": len(tokens),
        "tokens": sum(ids.numel() for ids in tokens),
        "weights": weights,
        "logits": compare_logits(start, expected, merged, config.dtype, rounded),
        "routing": _compare_routing(expected, merged),
    }


def _compare_settings(expected: Mapping[str, Any], found: Mapping[str, Any], where: str = "") -> None:
    """Raises ModelError naming the first field of the written config.json that is not the trained model's."""
    for name in sorted(expected.keys() | found.keys()):
        one, other = expected.get(name), found.get(name)
        if one == other:
            continue
        if isinstance(one, dict) and isinstance(other, dict):
            _compare_settings(one, other, f"{where}{name}.")
        raise ModelError(
            f"The merged config.json has {where}{name} {json.dumps(other)}, but the trained model has {json.dumps(one)}. The merge is refused."
        )


def encode(model_dir: Path, prompts: list[str]) -> list[torch.Tensor]:
    """Token ids [1, S] of each prompt; the prompts are rendered already, special tokens included."""
    from transformers import AutoTokenizer

    import pesc.models

    pesc.models.register()
    refuse_own_code(model_dir)
    tokenizer = AutoTokenizer.from_pretrained(model_dir, trust_remote_code=False)
    _check_fits(tokenizer, model_dir)
    encoded = [tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids[:, :MAX_TOKENS] for prompt in prompts]
    return [ids for ids in encoded if ids.numel()]


def _check_fits(tokenizer: Any, model_dir: Path) -> None:
    """Raises ModelError when the tokenizer has a token that the embedding has no row for."""
    from tokenizers import Tokenizer

    rows = read_config(model_dir).get("vocab_size")
    path = model_dir / "tokenizer.json"  # a class may add special tokens of its own, which no text of this model has
    vocabulary = Tokenizer.from_file(str(path)).get_vocab() if path.is_file() else tokenizer.get_vocab()
    token, last = max(vocabulary.items(), key=lambda item: item[1], default=("", -1))
    if rows is not None and last >= rows:
        raise ModelError(
            f"The tokenizer of {model_dir} has the token {token!r} with the number {last}, but the embedding has {rows} rows: it belongs to another "
            "model; put that model's own tokenizer beside its weights."
        )


def load(directory: Path) -> Any:
    """The model of a directory, whole, in fp32."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, trust_remote_code=False).eval()


def run(model: Any, tokens: list[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """Per prompt: `logits` [S, V] and, by router, the sorted chosen experts [S, K].  Some prompts at a time, padded on the right."""
    from pesc.moe.layer import sparse_parameters

    recorded = next(sparse_parameters(model), None) is not None
    results = []
    for first in range(0, len(tokens), _BATCH):
        results += _run_batch(model, tokens[first : first + _BATCH], recorded)
    return results


def _run_batch(model: Any, tokens: list[torch.Tensor], recorded: bool) -> list[dict[str, torch.Tensor]]:
    import torch

    from pesc.moe.balance import RouterRecorder

    lengths = [ids.numel() for ids in tokens]
    ids_BS, mask_BS = (torch.zeros(len(tokens), max(lengths), dtype=torch.long) for _ in range(2))
    for row, ids in enumerate(tokens):
        ids_BS[row, : lengths[row]], mask_BS[row, : lengths[row]] = ids[0], 1
    recorder = RouterRecorder(model) if recorded else None
    with recorder or contextlib.nullcontext():
        logits_BSV = model(input_ids=ids_BS, attention_mask=mask_BS, use_cache=False).logits
    results = [{"logits": logits_SV[:length]} for logits_SV, length in zip(logits_BSV, lengths, strict=True)]
    if recorder is None:
        return results
    for name, logits_TE in recorder.counted(mask_BS).items():
        index_TK = recorder.routers[name].select(logits_TE)[0].sort(dim=-1).values
        for result, index_SK in zip(results, index_TK.split(lengths), strict=True):
            result[name.removeprefix("base_model.model.")] = index_SK
    return results


def compare_weights(trained: TrainedReference, written: TensorDirectory, dtype: str) -> dict[str, Any]:
    """Every tensor on disk against PEFT's own merge of it, element by element; one tensor, or a piece of one, in memory."""
    parts = trained.parts
    tensors, specs = {**parts.model.specs, **parts.bank}, weight_specs(written)
    for name in sorted(tensors.keys() ^ specs.keys()):
        fault = "has lost" if name in tensors else "has, beyond the trained model,"
        raise ModelError(f"The merged directory {fault} {name}. The merge is refused; this is a defect of the merge: report it.")
    worst = 0.0
    for name in sorted(tensors):
        if specs[name].shape != tensors[name].shape:
            raise ModelError(
                f"The merged {name} is {list(specs[name].shape)}, but the trained one is {list(tensors[name].shape)}. The merge is refused."
            )
        if (specs[name].dtype == NF4) != (name in parts.stored_nf4):
            raise ModelError(
                f"The merged {name} is {specs[name].dtype}, which is not what merge.dtype {dtype} makes of it. The merge is refused."
            )
        if name in parts.stored_nf4:
            worst = max(worst, _compare_stored(trained, name, written))
        elif trained.is_merged(name):
            worst = max(worst, _compare_merged(trained, name, written.read(name), dtype))
        else:
            _compare_equal(trained, name, written)
    return {"compared": len(tensors), "worst_share_of_tolerance": _digits(worst)}


def _compare_merged(trained: TrainedReference, name: str, found_OI: torch.Tensor, dtype: str) -> float:
    """The written weight is the sum rounded to nearest, wherever in the error of an fp32 sum the sum may lie; returns the share of half a unit."""
    expected_OI, error_OI = _expected(trained, name)
    low_OI, high_OI = ((expected_OI + sign * error_OI).to(found_OI.dtype) for sign in (-1, 1))
    if not ((low_OI <= found_OI) & (found_OI <= high_OI)).all():
        raise ModelError(_not_trained(name, found_OI.float(), expected_OI))
    off_OI = (found_OI.float() - expected_OI).abs()
    return (off_OI / (ROUNDING[plain_dtype(dtype)] * expected_OI.abs() + error_OI).clamp(min=1e-30)).max().item()


def _expected(trained: TrainedReference, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """PEFT's merge of a weight, and how far off a right sum may be."""
    base_OI, delta_OI = trained.base_and_delta(name)
    expected_OI = base_OI + delta_OI
    # PEFT and this package sum up in another order; where the products cancel, that shows relative to the largest.
    return expected_OI, 2.0**-22 * expected_OI.abs() + 2.0**-16 * delta_OI.abs().max()


def _compare_stored(trained: TrainedReference, name: str, written: TensorDirectory) -> float:
    if trained.is_merged(name):
        expected_OI, error_OI = _expected(trained, name)
    else:
        expected_OI = trained.unquantized(name).float()
        error_OI = 0 * expected_OI
    return compare_stored(written, name, expected_OI, error_OI, trained.parts.compute_dtype)


def _compare_equal(trained: TrainedReference, name: str, written: TensorDirectory) -> None:
    for found, expected in zip(written.pieces(name), trained.pieces(name), strict=True):
        if not found.equal(expected.to(found.dtype)):
            raise ModelError(_not_trained(name, found.float(), expected.float()))


def _not_trained(name: str, found: torch.Tensor, expected: torch.Tensor) -> str:
    return (
        f"The merged {name} is not the trained one: it is off by up to {(found - expected).abs().max().item():.3g}, which no rounding explains. "
        "The merge is refused; this is a defect of the merge or of the adapter's files."
    )


def compare_logits(start: list, expected: list, merged: list, dtype: str, rounded: list | None = None) -> dict[str, Any]:
    """How far the merged logits are from the expected ones, and those from the start's.

    rounded: logits of the expected weights rounded to `dtype`.  Raises ModelError above the tolerance of `dtype`, or when the merged logits are
    further off than rounding alone explains.
    """
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
    alone = ((torch.cat([result["logits"] for result in rounded]) - reference).square().mean().sqrt() / scale).item() if rounded else 0.0
    if rounded and not relative <= ROUNDING_SLACK * alone + LOGIT_TOLERANCE["float32"]:
        raise ModelError(
            f"The merged model's logits differ from the unmerged model's by {relative:.2%} (root mean square), but rounding its weights to {dtype} makes "
            f"only {alone:.2%} of that. The merge is refused; this is a defect of the merge: report it."
        )
    beyond = _beyond_nf4(found, rounded, scale, alone) if dtype == "nf4" and rounded else {}
    agreement = (found.argmax(-1) == reference.argmax(-1)).float().mean().item()
    return {
        "max_difference": _digits(difference.abs().max().item()),
        "relative_rms_difference": _digits(relative),
        "relative_rms_of_rounding": _digits(alone),
        "relative_rms_effect_of_training": _digits(effect),
        "same_top_token": _digits(agreement),
        **beyond,
    }


def _beyond_nf4(found: torch.Tensor, rounded: list, scale: torch.Tensor, alone: float) -> dict[str, float]:
    """How far the written model is from PEFT's merge after NF4.  Raises ModelError when that is no matter of ties."""
    import torch

    difference = found - torch.cat([result["logits"] for result in rounded])
    beyond = (difference.square().mean().sqrt() / scale).item()
    if not beyond <= NF4_SLACK * alone + LOGIT_TOLERANCE["float32"]:
        raise ModelError(
            f"The merged model's logits differ by {beyond:.2%} (root mean square) from those of the trained model after NF4, which itself changes them by "
            f"{alone:.2%}. The merge is refused; this is a defect of the merge: report it."
        )
    return {"relative_rms_beyond_rounding": _digits(beyond)}


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
