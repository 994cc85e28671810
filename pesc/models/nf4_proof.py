"""Whether a weight that is stored in NF4 is the quantisation of the trained one, looked at in the file's own numbers.

O output features, I input features.

Quantisation is nearest value: of each weight over the largest of its block among 16 values, of each block's largest (less their mean, over the
largest of 256) among 256 values.  The trained weight is known up to the error of its fp32 sum, so each code must be the nearest value of some
weight within that error; at a tie it may be either of two neighbours, anywhere else it is exact.  Nothing of bitsandbytes' arithmetic is in it
but its two tables of values and the width of its ties.
"""

from __future__ import annotations

import json
import math
from typing import Any

import torch

from pesc.errors import ModelError
from pesc.models.nf4 import BLOCK, NESTED_BLOCK
from pesc.models.nf4_files import STATE, read_state
from pesc.models.tensor_files import TensorDirectory

STEP = 0.14
"""Largest distance of a weight from its nearest value, as a share of its block's largest: half of the widest gap between two of the 16 values."""
_SUM_ERROR = 2.0**-20
"""Relative error of the divisions and of the mean, in fp32."""
_NESTED_GRID = 2.0**-16
"""How far from a tie bitsandbytes may choose the other of 256 values: on a CPU it looks a share up in a table of 2^16 steps over [-1, 1]."""


def compare_stored(written: TensorDirectory, name: str, expected_OI: torch.Tensor, error_OI: torch.Tensor, compute_dtype: str) -> float:
    """The codes of one weight against the trained weight and the error of its sum, both in fp32; returns the worst share of half a step.

    Raises ModelError naming the weight.
    """
    values, nested_values = _tables()
    _check_state(written, name, expected_OI, compute_dtype)
    for part, table in (("quant_map", values), ("nested_quant_map", nested_values)):
        if not written.read(f"{name}.{part}").equal(table):
            raise ModelError(f"The merged {name}.{part} is not the table of NF4 with double quantisation. The merge is refused.")
    blocks, errors = (_in_blocks(tensor, BLOCK) for tensor in (expected_OI, error_OI))
    largest_B, slack_B = blocks.abs().amax(-1), errors.amax(-1)
    _compare_largest(written, name, largest_B, slack_B, nested_values)
    packed = written.read(name).flatten()
    codes = torch.stack([packed >> 4, packed & 15], dim=-1).flatten()[: expected_OI.numel()]
    scale = largest_B.clamp(min=1e-38)[:, None]
    shares, slack = blocks / scale, errors / scale + slack_B[:, None] / scale + _SUM_ERROR
    return _compare_codes(name, codes, shares, slack, values)


def _tables() -> tuple[torch.Tensor, torch.Tensor]:
    from bitsandbytes.functional import create_dynamic_map, get_4bit_type

    return get_4bit_type("nf4", device="cpu"), create_dynamic_map()


def _in_blocks(tensor: torch.Tensor, size: int) -> torch.Tensor:
    """[blocks, size], filled up with zeros, which are the largest of no block."""
    flat = tensor.flatten()
    return torch.nn.functional.pad(flat, (0, -flat.numel() % size)).view(-1, size)


def _check_state(written: TensorDirectory, name: str, expected_OI: torch.Tensor, compute_dtype: str) -> None:
    state: dict[str, Any] = read_state(written, name)
    state.pop("nested_offset", None)
    wanted = {"quant_type": "nf4", "blocksize": BLOCK, "nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32"}
    wanted |= {"dtype": compute_dtype, "shape": list(expected_OI.shape)}
    if state != wanted:
        raise ModelError(f"The merged {name}.{STATE} says {json.dumps(state)}, but should say {json.dumps(wanted)}. The merge is refused.")


def _compare_largest(written: TensorDirectory, name: str, largest_B: torch.Tensor, slack_B: torch.Tensor, values: torch.Tensor) -> None:
    """The largest of each block, as stored."""
    mean, error = largest_B.mean(), slack_B.max()
    stored = float(read_state(written, name).get("nested_offset", math.nan))
    if not abs(stored - mean.item()) <= error.item() + _SUM_ERROR * mean.item():
        raise ModelError(f"The merged {name}.{STATE} says a mean of {stored:.6g}, but the trained one is {mean:.6g}. The merge is refused.")
    groups = _in_blocks(largest_B - mean, NESTED_BLOCK)
    widest_G, found_G = groups.abs().amax(-1), written.read(f"{name}.nested_absmax")
    off = 2 * error + _SUM_ERROR * largest_B.max()
    if not ((found_G - widest_G).abs() <= off).all():
        raise ModelError(f"The merged {name}.nested_absmax is not the trained one's. The merge is refused.")
    scale = widest_G.clamp(min=1e-38)[:, None]
    slack = (2 * off / scale + _NESTED_GRID).expand_as(groups)
    _compare_codes(f"{name}.absmax", written.read(f"{name}.absmax"), groups / scale, slack, values)


def _compare_codes(name: str, codes: torch.Tensor, shares: torch.Tensor, slack: torch.Tensor, values: torch.Tensor) -> float:
    """Each code is the nearest of `values` to a number within `slack` of its share; returns the largest distance over half a gap."""
    count = codes.numel()
    shares, slack = shares.flatten()[:count], slack.flatten()[:count]
    thresholds = (values[1:] + values[:-1]) / 2
    low, high = (torch.bucketize(shares + sign * slack, thresholds) for sign in (-1, 1))
    codes = codes.long()
    if not ((low <= codes) & (codes <= high)).all():
        wrong = ((codes < low) | (codes > high)).sum().item()
        raise ModelError(
            f"The merged {name} is not the trained one: {wrong:,} of its {count:,} codes are not the nearest, which no rounding explains. The merge is "
            "refused; this is a defect of the merge or of the adapter's files."
        )
    return _worst_share(shares, codes, values, thresholds)


def _worst_share(shares: torch.Tensor, codes: torch.Tensor, values: torch.Tensor, thresholds: torch.Tensor) -> float:
    off = shares - values[codes]
    nearest = torch.where(off > 0, codes, codes - 1).clamp(0, len(thresholds) - 1)
    return (off.abs() / (thresholds[nearest] - values[codes]).abs()).max().item()
