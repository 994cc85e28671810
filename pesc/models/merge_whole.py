"""The merge of a model that was trained in full: there is nothing to fold, the trained weights are the model.

Every tensor of the model must be among the trained ones in its shape, and no other may be; `ledger.json` says of each how far it moved,
`proof.json` compares what was written with the trained weights put into the model of the start, as `pesc.models.merge` does.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pesc.errors import ModelError
from pesc.models.config import MergeConfig
from pesc.models.merge_write import write_json
from pesc.models.mixtral import WEIGHTS_NAME, copy_published
from pesc.models.proof import LOGIT_TOLERANCE, compare_logits, encode, load, read_prompts, run
from pesc.models.tensor_files import TensorDirectory, TensorSpec, dtype_code, link_companions, read_header, read_tensor, write_sharded
from pesc.models.upcycle import read_config, write_config
from pesc.stage import BuildResult, StageContext

if TYPE_CHECKING:
    import torch

_DIGITS = 4
"""Significant digits of the norms in the ledger."""


def build(ctx: StageContext, training: dict[str, Any]) -> BuildResult:
    """Publish `ctx.inputs["adapter"]` as a model directory and prove it.  training: what its training.json says."""
    from pesc.models.merge import check_same_model

    if ctx.config.dtype == "nf4":
        raise ModelError(
            "A model that was trained in full cannot be written with merge.dtype nf4: its experts lie in one tensor a layer, which loading in 4 bit "
            "does not quantise; set merge.dtype to bfloat16."
        )
    model_dir, weights = ctx.inputs["model"], ctx.inputs["adapter"] / WEIGHTS_NAME
    check_same_model(training, model_dir, ctx.inputs["adapter"])
    specs = check_weights(model_dir, weights, training)
    prompts = read_prompts(ctx.inputs["blocks"], ctx.config.proof_prompts)
    encode(model_dir, prompts)  # a tokenizer of another model is found before anything is written
    ledger = write_whole(model_dir, weights, specs, ctx.out, ctx.config, ctx.progress)
    write_json(ctx.out / "ledger.json", {"base": "trained", "tensors": ledger})
    ctx.progress(0, 1, unit="proofs", message="comparing the written model with the trained one")
    proof = prove_whole(model_dir, weights, ctx.out, prompts, ctx.config)
    write_json(ctx.out / "proof.json", proof)
    ctx.progress(1, 1, unit="proofs", message="written == trained")
    counts = {"merged_tensors": 0, "trained_tensors": len(ledger), "copied_tensors": 0}
    return BuildResult(metrics={**counts, "max_logit_difference": proof["logits"]["max_difference"]})


def check_weights(model_dir: Path, weights: Path, training: dict[str, Any]) -> dict[str, TensorSpec]:
    """Name -> spec of every trained tensor, in the model's order.  Raises ModelError naming the first that is lost, extra or of another shape."""
    model = TensorDirectory(model_dir).specs
    found = read_header(weights) if weights.is_file() else {}
    if not found:
        raise ModelError(f"{weights} is not there, but the model was trained in full: run `train` again.")
    for name in sorted(set(found) - set(model)):
        raise ModelError(f"{weights} has {name}, which the model does not have: it was trained on another model.")
    for name, spec in model.items():
        if name not in found:
            raise ModelError(f"{weights} has lost {name}: the trained weights are not whole; run `train` again.")
        if found[name].shape != spec.shape:
            raise ModelError(f"{weights} has {name} as {list(found[name].shape)}, but the model needs {list(spec.shape)}.")
    declared, saved = sum(row["parameters"] for row in training["trainable"]), sum(spec.num_elements for spec in found.values())
    if declared != saved:
        raise ModelError(
            f"{weights.with_name('training.json')} declares {declared:,} parameters as trained, but {saved:,} were saved: a part is lost, "
            "or files of different runs are mixed; run `train` again."
        )
    return {name: found[name] for name in model}


def write_whole(
    model_dir: Path, weights: Path, specs: dict[str, TensorSpec], out_dir: Path, config: MergeConfig, progress: Any
) -> list[dict[str, Any]]:
    """Write the model to the empty `out_dir`, one tensor at a time; returns the ledger's entries."""
    start, target, ledger = TensorDirectory(model_dir), dtype_code(config.dtype), []

    def make(name: str) -> torch.Tensor:
        tensor, entry = _take(start, weights, name, config.dtype)
        ledger.append(entry)
        progress(len(ledger), len(specs), unit="tensors", message=name)
        return tensor

    write_sharded(out_dir, {name: TensorSpec(target, spec.shape) for name, spec in specs.items()}, config.max_shard_bytes, make)
    fields = {name: value for name, value in read_config(model_dir).items() if name != "torch_dtype"}
    write_config(out_dir, fields | {"dtype": config.dtype})
    link_companions(model_dir, out_dir)
    return ledger


def _take(start: TensorDirectory, weights: Path, name: str, dtype: str) -> tuple[torch.Tensor, dict[str, Any]]:
    """One trained tensor in `dtype`, and its line in the ledger."""
    import torch

    tensor, before = read_tensor(weights, name).to(getattr(torch, dtype)), start.read(name).float()
    if not tensor.isfinite().all():
        raise ModelError(f"{weights} has a value that is not a number in {name}: the training diverged, or {dtype} cannot hold it.")
    norm, change = (float(f"{value.norm().item():.{_DIGITS}g}") for value in (before, tensor.float() - before))
    entry = {"name": name, "action": "trained", "shape": list(tensor.shape), "dtype": dtype_code(dtype), "norm": norm, "change": change}
    return tensor, entry


def prove_whole(model_dir: Path, weights: Path, merged_dir: Path, prompts: list[str], config: MergeConfig) -> dict[str, Any]:
    """Compare; returns what proof.json holds.  Raises ModelError when a weight is not the trained one, or the logits are out of tolerance."""
    import torch

    tokens = encode(model_dir, prompts)
    with torch.inference_mode():
        model = load(model_dir)
        before = run(model, tokens)
        copy_published(model, lambda name: read_tensor(weights, name).float())
        expected = run(model, tokens)
        written = load(merged_dir)
        compared = _compare_parameters(model, written, getattr(torch, config.dtype))
        merged = run(written, tokens)
    return {
        "tolerance": {"logits": LOGIT_TOLERANCE[config.dtype], "weights": 0.0},
        "prompts": len(tokens),
        "tokens": sum(ids.numel() for ids in tokens),
        "weights": {"compared": compared, "worst_share_of_tolerance": 0.0},
        "logits": compare_logits(before, expected, merged, config.dtype),
        "routing": {},
    }


def _compare_parameters(trained: Any, written: Any, dtype: torch.dtype) -> int:
    """Every parameter as transformers loads it from disk is the trained one, rounded once: bit by bit."""
    found = dict(written.named_parameters())
    for name, parameter in trained.named_parameters():
        if not found[name].equal(parameter.to(dtype).float()):
            raise ModelError(f"The written {name} is not the trained one. The merge is refused; this is a defect of the merge: report it.")
    return len(found)
