"""The weights that a 4-bit model really computes with: NF4 with double quantisation, and back (Dettmers et al. 2023).

The settings are those of QLoRA training: blocks of 64, absmax quantised a second time, the unquantised weight cast to the compute dtype first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


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


def quantized_weights(fields: dict[str, Any]) -> set[str]:
    """Names of the weights that loading a model of this config.json in 4 bit quantises; asked of transformers itself, on the meta device."""
    import torch
    from bitsandbytes.nn.modules import Linear4bit
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear
    from transformers.quantizers.base import HfQuantizer

    from pesc.models.factory import causal_lm_of

    with torch.device("meta"):
        model = causal_lm_of(fields)
    skipped = HfQuantizer.get_modules_to_not_convert(model, None, list(model._keep_in_fp32_modules or ()))
    replace_with_bnb_linear(model, modules_to_not_convert=skipped, quantization_config=quantization_config("bfloat16"))
    return {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Linear4bit)}


def through_nf4(weight: torch.Tensor, compute_dtype: str) -> torch.Tensor:
    """A weight after quantisation to NF4 and back, in the compute dtype: what a forward pass multiplies with."""
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    dtype = getattr(torch, compute_dtype)
    packed, state = quantize_4bit(weight.to(dtype).contiguous(), blocksize=64, compress_statistics=True, quant_type="nf4")
    return dequantize_4bit(packed, state).to(dtype)
