"""What a merge is measured against: the trained model as PEFT computes it, put together anew from the files of the training.

O output features, I input features, R rank.

Nothing of `pesc.models.merge_write`'s arithmetic is in it: PEFT places the LoRA, scales it and adds it up.  No weight stays in memory
(see `pesc.models.streamed`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftConfig, get_peft_model
from peft.tuners.lora import LoraLayer

from pesc.models.merge import MergeParts
from pesc.models.nf4 import quantize, restore
from pesc.models.streamed import empty_model, fill, forget, stream, streamed_model
from pesc.models.tensor_files import PIECE_ELEMENTS, read_pieces, read_tensor

if TYPE_CHECKING:
    from torch import nn

_PREFIX = "base_model.model."
_ADAPTER = "default"


class TrainedReference:
    """The trained model, unmerged (`model`), and each of its weights as PEFT merges it (`merged_weight`)."""

    def __init__(self, parts: MergeParts):
        self.parts = parts
        empty = empty_model(parts.fields)
        self._tied = dict(getattr(empty, "all_tied_weights_keys", None) or {})
        self._keys = {key.replace(f".{_ADAPTER}.", "."): key for pair in parts.lora.pairs.values() for key in pair}
        config = PeftConfig.from_pretrained(str(parts.adapter_dir))
        config.base_model_name_or_path = None
        self.model: Any = get_peft_model(empty, config, adapter_name=_ADAPTER, low_cpu_mem_usage=True).eval()
        self._layers: dict[str, Any] = {
            f"{name.removeprefix(_PREFIX)}.weight": module for name, module in self.model.named_modules() if isinstance(module, LoraLayer)
        }
        stream(self.model, self._read)

    def is_merged(self, name: str) -> bool:
        """Whether PEFT has put a LoRA on this weight."""
        return name in self._layers

    def base_and_delta(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The weight that a LoRA is trained against and what PEFT adds to it, both [O, I] in fp32."""
        layer = self._layers[name]
        prefix = _PREFIX + name.removesuffix(".weight")
        matrices: dict[str, nn.Module] = {f"{prefix}.{side}.{_ADAPTER}": getattr(layer, side)[_ADAPTER] for side in ("lora_A", "lora_B")}
        for path, module in matrices.items():
            fill(module, path, self._read)
        try:
            return self.parts.base_weight(name).float(), layer.get_delta_weight(_ADAPTER)
        finally:
            for module in matrices.values():
                forget(module)

    def pieces(self, name: str) -> Iterator[torch.Tensor]:
        """The values of a weight without LoRA, as trained or as at the start, in flat pieces."""
        if name in self.parts.bank:
            return read_pieces(self.parts.bank_path, name)
        if name in self.parts.quantized:
            return iter(self.parts.base_weight(name).flatten().split(PIECE_ELEMENTS))
        return self.parts.model.pieces(name)

    def unquantized(self, name: str) -> torch.Tensor:
        """A weight without LoRA as training quantised it: in the compute dtype."""
        return self.parts.model.read(name).to(getattr(torch, self.parts.compute_dtype))

    def rounded_model(self, dtype: torch.dtype) -> Any:
        """The trained model merged by PEFT, its weights rounded to `dtype`, or to NF4 where they are stored so, computing in fp32."""

        def read(name: str) -> torch.Tensor:
            if name in self.parts.stored_nf4:
                merged = torch.add(*self.base_and_delta(name)) if self.is_merged(name) else self.unquantized(name)
                return restore(*quantize(merged, self.parts.compute_dtype))
            tensor = torch.add(*self.base_and_delta(name)) if self.is_merged(name) else self._base(name)
            return tensor.to(dtype) if tensor.is_floating_point() else tensor

        return streamed_model(self.parts.fields, read)

    def _base(self, name: str) -> torch.Tensor:
        return read_tensor(self.parts.bank_path, name) if name in self.parts.bank else self.parts.base_weight(name)

    def _read(self, name: str) -> torch.Tensor:
        """A weight by its name in PEFT's model."""
        if ".lora_" in name:
            return self.parts.lora.read(self._keys[name.replace(f".{_ADAPTER}.", ".")])
        plain = name.removeprefix(_PREFIX).replace(".base_layer.", ".")
        return self._base(self._tied.get(plain, plain))
