"""The weights that a 4-bit model really computes with: NF4 with double quantisation, and back (Dettmers et al. 2023).

The settings are those of QLoRA training: blocks of 64, absmax quantised a second time, the unquantised weight cast to the compute dtype first.
How such weights lie in a file is in `pesc.models.nf4_files`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

BLOCK = 64
"""Values that share one absmax."""
NESTED_BLOCK = 256
"""Values of absmax that share one of their own."""
_PIECE = 1 << 19
"""Values in one call of the quantisation, whose working memory is some times theirs; a multiple of `BLOCK`."""
_CONFIG_FIELDS = (
    "bnb_4bit_compute_dtype",
    "bnb_4bit_quant_type",
    "bnb_4bit_use_double_quant",
    "load_in_4bit",
    "load_in_8bit",
    "quant_method",
)


def quantization_config(compute_dtype: str) -> Any:
    """The BitsAndBytesConfig of QLoRA: NF4, double quantisation, storage in the compute dtype (which ZeRO-3 and FSDP need to shard)."""
    import torch
    from transformers import BitsAndBytesConfig

    dtype = getattr(torch, compute_dtype)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype,
    )


def stored_config(fields: Mapping[str, Any], compute_dtype: str) -> dict[str, Any]:
    """`quantization_config` of config.json for weights that are stored in NF4: those settings, in bytes, and what is not quantised by name."""
    own = quantization_config(compute_dtype).to_dict()
    skipped = _skipped_modules(_empty(fields)) + (["mlp.adapters", "mlp.router"] if fields.get("pesc") else [])
    return {name: own[name] for name in _CONFIG_FIELDS} | {"bnb_4bit_quant_storage": "uint8", "llm_int8_skip_modules": sorted(skipped)}


def quantized_weights(fields: dict[str, Any]) -> set[str]:
    """Names of the weights that loading a model of this config.json in 4 bit quantises; asked of transformers itself, on the meta device."""
    from bitsandbytes.nn.modules import Linear4bit
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear

    model = _empty(fields)
    replace_with_bnb_linear(model, modules_to_not_convert=_skipped_modules(model), quantization_config=quantization_config("bfloat16"))
    return {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Linear4bit)}


def _empty(fields: Mapping[str, Any]) -> Any:
    import torch

    from pesc.models.factory import causal_lm_of

    with torch.device("meta"):
        return causal_lm_of(dict(fields))


def _skipped_modules(model: Any) -> list[str]:
    """What loading in 4 bit leaves as it is: tied weights, the head, what the architecture wants in fp32."""
    from transformers.quantizers.base import HfQuantizer

    return HfQuantizer.get_modules_to_not_convert(model, None, list(model._keep_in_fp32_modules or ()))


def through_nf4(weight: torch.Tensor, compute_dtype: str) -> torch.Tensor:
    """A weight after quantisation to NF4 and back, in the compute dtype: what a forward pass multiplies with."""
    import torch

    dtype = getattr(torch, compute_dtype)
    return restore(*quantize(weight.to(dtype), compute_dtype))


def quantize(weight: torch.Tensor, compute_dtype: str) -> tuple[torch.Tensor, Any]:
    """Packed codes [n / 2, 1] and QuantState of a weight, as bitsandbytes makes them, but in pieces; `compute_dtype` is what it is restored to."""
    import torch
    from bitsandbytes.functional import QuantState, quantize_4bit, quantize_blockwise

    pieces = [quantize_4bit(piece, blocksize=BLOCK, quant_type="nf4") for piece in weight.contiguous().view(-1).split(_PIECE)]
    absmax = torch.cat([state.absmax for _, state in pieces])
    offset = absmax.mean()
    codes, nested = quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCK)
    state = QuantState(
        codes,
        shape=weight.shape,
        code=pieces[0][1].code,
        blocksize=BLOCK,
        quant_type="nf4",
        dtype=getattr(torch, compute_dtype),
        offset=offset,
        state2=nested,
    )
    return torch.cat([packed for packed, _ in pieces]), state


def restore(packed: torch.Tensor, state: Any) -> torch.Tensor:
    """The weight of packed codes, in its own shape and in the dtype that the state says."""
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(packed, state).to(state.dtype)
