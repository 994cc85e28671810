"""Reading a training checkpoint of the reference code, which has the dense base neither in it nor beside it.

    pesc import checkpoint-1000 --base DENSE_DIR --top-k 2 --scaling 1 --out OUT_DIR

    checkpoint-1000/moe_model.bin       router and experts, in the published layout with `base_model.model.` before each name
    checkpoint-1000/adapter_model/      LoRA, as PEFT writes it

The LoRA is folded into the base (W + scaling · B · A in fp32, then the base's dtype), the experts become the bank.  Number and width of the
experts are in the tensors; how many of them a token uses, and the factor on their sum, are nowhere in the checkpoint and must be said.

Pitfalls
- The reference code's training script has topk 2, scaling 1 and adapter_dim 64; its merge script assumes 512 and 0.25.  A checkpoint of an
  unchanged training script is read with scaling 1, whatever the merge script says.
- The LoRA was trained against 4-bit weights and is folded into the unquantised ones, as the reference code does it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from pesc.errors import ModelError
from pesc.models.config import UpcycleConfig
from pesc.models.lora import read_lora
from pesc.models.pickle_files import read_pickle, tensor_specs
from pesc.models.published import MAX_SHARD_BYTES, is_derived, is_published, map_tensors, open_weights, read_stacked
from pesc.models.tensor_files import TensorSpec, dtype_name, link_companions, write_sharded
from pesc.models.upcycle import check_complete, read_config, sparse_config_fields, write_config

if TYPE_CHECKING:
    import torch

EXPERTS_NAME = "moe_model.bin"
_PREFIX = "base_model.model."


class _Experts:
    """The tensors of `moe_model.bin` by their published names."""

    def __init__(self, path: Path):
        self.path = path
        found = read_pickle(path)
        for name in found:
            if not name.startswith(_PREFIX) or ".moe_adapter." not in name:
                raise ModelError(f"{path} has {name}, which is neither a router nor an expert: nothing would be done with it.")
        self._tensors = {name.removeprefix(_PREFIX): tensor for name, tensor in found.items()}
        self.specs = tensor_specs(self._tensors)

    def read(self, name: str) -> torch.Tensor:
        """One tensor."""
        return self._tensors[name]

    def shape(self) -> tuple[int, int]:
        """Number and width of the experts, as the first router and the first expert have them."""
        routers = [spec for name, spec in self.specs.items() if name.endswith(".router.weight")]
        downs = [spec for name, spec in self.specs.items() if name.endswith(".adapter_down.weight")]
        if not routers or not downs:
            raise ModelError(f"{self.path} has no {'expert' if routers else 'router'}: the checkpoint is not whole.")
        return routers[0].shape[0], downs[0].shape[0]


def is_training_checkpoint(directory: Path) -> bool:
    """Whether a directory is a `checkpoint-N` of the reference code."""
    return (directory / EXPERTS_NAME).is_file()


def import_training(
    checkpoint: Path,
    base_dir: Path,
    out_dir: Path,
    top_k: int,
    scaling: float,
    progress: Callable[..., None] = lambda *_args, **_kwargs: None,
) -> dict[str, int]:
    """Write a training checkpoint over its dense base to the empty `out_dir`; returns how many tensors were folded, copied and stacked.

    Raises ModelError when base, LoRA and experts do not fit one another, or one of their tensors is lost or extra.
    """
    if is_published(read_config(base_dir)):
        raise ModelError(f"{base_dir} is a sparse model already: give the dense base of the training with --base.")
    experts, base = _Experts(checkpoint / EXPERTS_NAME), open_weights(base_dir)
    fields = sparse_config_fields(base_dir, _settings(*experts.shape(), top_k, scaling, checkpoint))
    origins, bank = map_tensors(experts.specs, fields["pesc"]["num_experts"], experts.path)
    dense = {name: spec for name, spec in base.specs.items() if not is_derived(name)}
    check_complete(read_config(base_dir), dense, base_dir)
    check_complete(fields, {**dense, **bank}, checkpoint)
    lora = read_lora(checkpoint / "adapter_model", dense)
    specs, done = {**dense, **bank}, iter(range(1, len(dense) + len(bank) + 1))

    def make(name: str) -> torch.Tensor:
        progress(next(done), len(specs), unit="tensors", message=name)
        if name in bank:
            return _checked(read_stacked(experts, origins[name], name), name, experts.path)
        tensor = base.read(name)
        return _fold(lora.fold(name, tensor), name, specs) if name in lora.pairs else tensor

    write_sharded(out_dir, specs, MAX_SHARD_BYTES, make)
    write_config(out_dir, fields)
    link_companions(base_dir, out_dir)
    return {"folded": len(lora.pairs), "copied": len(dense) - len(lora.pairs), "stacked": len(bank)}


def _settings(num_experts: int, adapter_dim: int, top_k: int, scaling: float, where: Path) -> UpcycleConfig:
    values = {"num_experts": num_experts, "adapter_dim": adapter_dim, "top_k": top_k, "scaling": scaling}
    try:
        return UpcycleConfig.model_validate(values)
    except ValidationError as error:
        reason = "; ".join(item["msg"].removeprefix("Value error, ") for item in error.errors())
        raise ModelError(
            f"{where} has {num_experts} experts of width {adapter_dim}, so --top-k or --scaling cannot be right: {reason}."
        ) from None


def _fold(folded: torch.Tensor, name: str, specs: Mapping[str, TensorSpec]) -> torch.Tensor:
    import torch

    return _checked(folded.to(getattr(torch, dtype_name(specs[name].dtype))), name, None)


def _checked(tensor: torch.Tensor, name: str, path: Path | None) -> torch.Tensor:
    if not tensor.isfinite().all():
        raise ModelError(f"{path or 'The sum of base and LoRA'} has a value that is not a number in {name}: the training diverged.")
    return tensor
