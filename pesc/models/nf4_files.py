"""NF4 weights in a file, as bitsandbytes lays them out and transformers reads them: six tensors for one weight.

    NAME                                            two codes a byte, [n / 2, 1] U8
    NAME.absmax                                     one byte for each 64 values
    NAME.nested_absmax, NAME.nested_quant_map       what those bytes mean; the first has one value for each 256 of them
    NAME.quant_map                                  the 16 values of a code
    NAME.quant_state.bitsandbytes__nf4              JSON: shape, dtype that it is restored to, blocks, mean of absmax

Contract: `weight_specs` gives a directory's tensors as the model has them, whether or not they are quantised; who reads a model directory that
may be quantised asks it, not `TensorDirectory.specs`.

Pitfall: the JSON's length depends on a number that is known only after the quantisation.  It is filled up with spaces to `STATE_BYTES`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pesc.errors import ModelError
from pesc.models.nf4 import BLOCK, NESTED_BLOCK
from pesc.models.tensor_files import TensorDirectory, TensorSpec

if TYPE_CHECKING:
    import torch

NF4 = "NF4"
"""The dtype of a `TensorSpec` whose weight lies in the file as NF4; its shape is the weight's."""
STATE = "quant_state.bitsandbytes__nf4"
STATE_BYTES = 256
_LEVELS, _NESTED_LEVELS = 16, 256


def is_quantized(fields: Mapping[str, Any]) -> bool:
    """Whether a config.json says that its weights are quantised, by whatever method."""
    return bool(fields.get("quantization_config"))


def stored_specs(name: str, shape: tuple[int, ...]) -> dict[str, TensorSpec]:
    """Name -> spec of the tensors that hold one weight, in the order in which `stored_tensors` gives them."""
    size = math.prod(shape)
    blocks = math.ceil(size / BLOCK)
    return {
        name: TensorSpec("U8", (math.ceil(size / 2), 1)),
        f"{name}.absmax": TensorSpec("U8", (blocks,)),
        f"{name}.nested_absmax": TensorSpec("F32", (math.ceil(blocks / NESTED_BLOCK),)),
        f"{name}.nested_quant_map": TensorSpec("F32", (_NESTED_LEVELS,)),
        f"{name}.quant_map": TensorSpec("F32", (_LEVELS,)),
        f"{name}.{STATE}": TensorSpec("U8", (STATE_BYTES,)),
    }


def stored_tensors(packed: torch.Tensor, state: Any) -> list[torch.Tensor]:
    """The tensors that hold one quantised weight (see `pesc.models.nf4.quantize`)."""
    import torch

    parts = state.as_dict(packed=True)
    text = bytes(parts[STATE].tolist()).ljust(STATE_BYTES)
    return [
        packed,
        *(parts[part] for part in ("absmax", "nested_absmax", "nested_quant_map", "quant_map")),
        torch.frombuffer(bytearray(text), dtype=torch.uint8),
    ]


def weight_specs(directory: TensorDirectory) -> dict[str, TensorSpec]:
    """Name -> spec of the model's own tensors: an NF4 weight once, in its shape.  Raises ModelError for one that is not whole."""
    specs = dict(directory.specs)
    for key in [key for key in specs if key.endswith(f".{STATE}")]:
        name = key.removesuffix(f".{STATE}")
        shape = _read_shape(directory, name)
        for part, spec in stored_specs(name, shape).items():
            if specs.pop(part, None) != spec:
                raise ModelError(
                    f"{directory.directory} has {name} in 4 bit, but {part} is not {spec.dtype} {list(spec.shape)} as NF4 with double quantisation "
                    "in bytes has it: the model is damaged, or was quantised with other settings; use an unquantised one, or merge again."
                )
        specs[name] = TensorSpec(NF4, shape)
    return specs


def _read_shape(directory: TensorDirectory, name: str) -> tuple[int, ...]:
    try:
        return tuple(int(size) for size in read_state(directory, name)["shape"])
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{directory.directory} has {name}.{STATE}, which does not say the weight's shape: the model is damaged."
        ) from error


def read_state(directory: TensorDirectory, name: str) -> dict[str, Any]:
    """The JSON beside an NF4 weight."""
    return json.loads(bytes(directory.read(f"{name}.{STATE}").tolist()))


def read_parts(directory: TensorDirectory, name: str) -> tuple[torch.Tensor, Any]:
    """Packed codes and QuantState of an NF4 weight."""
    from bitsandbytes.functional import QuantState

    packed, *parts = stored_specs(name, ())
    stats = {part: directory.read(part) for part in parts}
    return directory.read(packed), QuantState.from_dict(stats, device=stats[parts[0]].device)


def read_weight(directory: TensorDirectory, name: str) -> torch.Tensor:
    """A tensor of a model directory as the model computes with it: one in NF4 is restored."""
    from pesc.models.nf4 import restore

    return restore(*read_parts(directory, name)) if f"{name}.{STATE}" in directory.files else directory.read(name)
