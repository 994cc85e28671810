"""The `merge` stage: a model and what was trained on it become one plain model directory.

LoRA is folded into the projections (W + scaling · B · A in fp32), trained router and bank replace those of the start, everything else is
copied or linked.  Weights pass through in pieces.  `ledger.json` accounts for every tensor; `proof.json` compares the written model with the
unmerged one (see `pesc.models.proof`); a merge that is not proven is refused.

Key contracts
- Every tensor of the adapter and of the bank is used exactly once, or the merge is refused with its name.
- The model type does not change: a sparse model stays `pesc_<dense>`, the dense control stays what it was.  Tied embeddings stay tied.
- `base: dequantized` folds into the weights that the 4-bit model computed with during training: the merged model is then the trained one up
  to rounding.  `base: original` folds into the unquantised ones, which are closer to the dense model but were never trained against.
- `dtype: nf4` quantises after the fold (see `pesc.models.merge_nf4`): the model loads in 4 bit as it is.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pesc.errors import ModelError
from pesc.models.config import MergeConfig
from pesc.models.identity import model_digest
from pesc.models.lora import LoraAdapter, read_lora
from pesc.models.merge_nf4 import tell_rounding
from pesc.models.merge_write import write_json, write_merged
from pesc.models.new_directory import emptied_on_failure
from pesc.models.nf4_files import is_quantized
from pesc.models.tensor_files import TensorDirectory, TensorSpec, read_header
from pesc.models.upcycle import BANK_NAME, check_complete, read_config
from pesc.stage import BuildResult, StageContext

if TYPE_CHECKING:
    import torch


def build(ctx: StageContext) -> BuildResult:
    """Merge `ctx.inputs["adapter"]` into `ctx.inputs["model"]` and prove it on prompts of `ctx.inputs["blocks"]`; refused, `ctx.out` is empty."""
    from pesc.models import merge_whole

    training = read_training(ctx.inputs["adapter"])
    with emptied_on_failure(ctx.out):
        result = merge_whole.build(ctx, training) if training["config"].get("method") == "upcycle-full" else _merge(ctx)
        take_template(ctx.inputs["blocks"], ctx.out)
        return result


def take_template(blocks_dir: Path, out_dir: Path) -> None:
    """The chat template of the training in place of the model's own, where they differ: the merged model is to be asked as it was taught."""
    trained, path = blocks_dir / "chat_template.jinja", out_dir / "chat_template.jinja"
    if trained.is_file():
        path.unlink(missing_ok=True)  # a link to the model's
        shutil.copyfile(trained, path)


def _merge(ctx: StageContext) -> BuildResult:
    from pesc.models.proof import encode, prove, read_prompts

    parts = read_parts(ctx.inputs["model"], ctx.inputs["adapter"], ctx.config)
    prompts = read_prompts(ctx.inputs["blocks"], ctx.config.proof_prompts)
    encode(parts.model_dir, prompts)  # a tokenizer of another model is found before anything is written
    ledger = write_merged(parts, ctx.out, ctx.config, ctx.progress)
    ctx.progress(0, 1, unit="proofs", message="comparing the merged model with the unmerged one")
    proof = prove(parts, ctx.out, prompts, ctx.config)
    write_json(ctx.out / "proof.json", proof)
    ctx.progress(1, 1, unit="proofs", message="merged == unmerged")
    counts = {
        f"{action}_tensors": sum(entry["action"] == action for entry in ledger) for action in ("merged", "trained", "copied", "linked")
    }
    rounding = tell_rounding(ledger, proof["logits"]) if ctx.config.dtype == "nf4" else {}
    return BuildResult(metrics={**counts, "max_logit_difference": proof["logits"]["max_difference"], **rounding})


@dataclass(frozen=True)
class MergeParts:
    """What a merge reads, checked."""

    model_dir: Path
    fields: Mapping[str, Any]
    """config.json of the model."""
    model: TensorDirectory
    adapter_dir: Path
    lora: LoraAdapter
    bank_path: Path
    bank: Mapping[str, TensorSpec]
    """Trained router and bank; empty for the dense control."""
    quantized: frozenset[str] = field(default_factory=frozenset)
    """Weights that are taken through NF4 before the fold (`base: dequantized`)."""
    compute_dtype: str = "bfloat16"
    stored_nf4: frozenset[str] = field(default_factory=frozenset)
    """Weights that are stored in NF4 (`dtype: nf4`)."""

    def base_weight(self, name: str) -> torch.Tensor:
        """The weight that LoRA is added to."""
        from pesc.models.nf4 import through_nf4

        tensor = self.model.read(name)
        return through_nf4(tensor, self.compute_dtype) if name in self.quantized else tensor


def read_parts(model_dir: Path, trained_dir: Path, config: MergeConfig) -> MergeParts:
    """Read and check everything but the values.  Raises ModelError naming the first thing that is lost, extra or of another shape."""
    from pesc.models.nf4 import quantized_weights

    fields, model = read_config(model_dir), TensorDirectory(model_dir)
    if is_quantized(fields):
        raise ModelError(
            f"{model_dir} is quantised ({fields['quantization_config'].get('quant_method')}), so there are no weights to add the LoRA to: merge "
            "into the unquantised model, with merge.base set to dequantized if it was trained in 4 bit."
        )
    check_complete(fields, model.specs, model_dir)
    training = read_training(trained_dir)
    check_same_model(training, model_dir, trained_dir)
    lora = read_lora(trained_dir / "adapter", model.specs)
    fields = with_trained_options(fields, training["config"])
    bank = _read_bank(trained_dir / BANK_NAME, {**model.specs, **_bias_specs(fields, model.specs)})
    _check_declared(training, lora, bank, trained_dir)
    quantized: frozenset[str] = frozenset()
    stored_nf4 = frozenset(quantized_weights(dict(fields))) if config.dtype == "nf4" else frozenset()
    if config.base == "dequantized":
        if training["config"]["quantization"] == "none":
            raise ModelError(
                f"{trained_dir} was trained without quantisation, so there are no 4-bit weights to fold into: set merge.base to original."
            )
        quantized = frozenset(quantized_weights(dict(fields)))
    return MergeParts(
        model_dir,
        fields,
        model,
        trained_dir / "adapter",
        lora,
        trained_dir / BANK_NAME,
        bank,
        quantized,
        training["config"]["compute_dtype"],
        stored_nf4,
    )


def read_training(trained_dir: Path) -> dict[str, Any]:
    """training.json of a train object.  Raises ModelError when it is not there or says nothing of its settings."""
    path = trained_dir / "training.json"
    if not path.is_file():
        raise ModelError(f"{trained_dir} has no training.json: the training did not finish; run `train` again.")
    try:
        training = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is not JSON ({error}): run `train` again.") from error
    if not isinstance(training.get("config"), dict) or not isinstance(training.get("trainable"), list):
        raise ModelError(f"{path} lacks `config` or `trainable`: it was written by another version; run `train` again.")
    return training


def check_same_model(training: Mapping[str, Any], model_dir: Path, trained_dir: Path) -> None:
    """Raises ModelError when the training says that it was of another model.  One that says nothing is of an earlier version."""
    trained_on = (training.get("facts") or {}).get("model_digest")
    if trained_on is not None and trained_on != (found := model_digest(model_dir)):
        raise ModelError(
            f"{trained_dir} was trained on another model (digest {trained_on[:12]}) than {model_dir} ({found[:12]}): merge it into the model that it "
            "was trained on."
        )


def with_trained_options(fields: Mapping[str, Any], training: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of the trained model: balancing by bias has given its routers one."""
    balance = training.get("balance") or {}
    if not fields.get("pesc") or balance.get("kind") != "bias":
        return dict(fields)
    return {**fields, "pesc": {**fields["pesc"], "bias_update_rate": balance["bias_update_rate"]}}


def _bias_specs(fields: Mapping[str, Any], model: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    """The routers' biases of a model that selects with them."""
    if not (fields.get("pesc") or {}).get("bias_update_rate"):
        return {}
    weights = {name: spec for name, spec in model.items() if name.endswith(".mlp.router.weight")}
    return {f"{name.removesuffix('.weight')}.bias_steps": TensorSpec("I32", spec.shape[:1]) for name, spec in weights.items()}


def is_sparse_tensor(name: str) -> bool:
    """Whether a tensor belongs to a router or a bank."""
    return ".mlp.router." in name or ".mlp.adapters." in name


def _read_bank(path: Path, model: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    """The trained tensors of router and bank: exactly those of the model, of the same shapes."""
    expected = {name: spec for name, spec in model.items() if is_sparse_tensor(name)}
    found = read_header(path) if path.is_file() else {}
    if expected and not found:
        raise ModelError(f"{path} is not there, but the model is sparse: merging would drop every trained adapter; run `train` again.")
    for name in sorted(set(found) - set(expected)):
        raise ModelError(f"{path} has {name}, which the model does not have: it was trained on another model.")
    for name, spec in expected.items():
        if name not in found:
            raise ModelError(f"{path} has lost {name}: the trained bank is not whole; run `train` again.")
        if found[name].shape != spec.shape:
            raise ModelError(f"{path} has {name} as {list(found[name].shape)}, but the model needs {list(spec.shape)}.")
    return found


def _check_declared(training: Mapping[str, Any], lora: LoraAdapter, bank: Mapping[str, TensorSpec], where: Path) -> None:
    """The groups that training.json declares as trained are what was saved: so many tensors, so many parameters."""
    routers = {name: spec for name, spec in bank.items() if name.endswith(".mlp.router.weight")}
    banks = {name: spec for name, spec in bank.items() if ".mlp.adapters." in name}
    saved = {"lora": (2 * len(lora.pairs), lora.num_parameters)}
    saved |= {
        group: (len(part), sum(s.num_elements for s in part.values())) for group, part in (("bank", banks), ("router", routers)) if part
    }
    declared = {row["group"]: (row["tensors"], row["parameters"]) for row in training["trainable"]}
    for group in sorted(declared.keys() | saved.keys()):
        (tensors, parameters), (found, kept) = declared.get(group, (0, 0)), saved.get(group, (0, 0))
        if (tensors, parameters) != (found, kept):
            raise ModelError(
                f"{where / 'training.json'} declares {tensors} tensors ({parameters:,} parameters) of the group {group!r} as trained, but {found} "
                f"({kept:,}) were saved: a part is lost, or files of different runs are mixed; run `train` again."
            )
