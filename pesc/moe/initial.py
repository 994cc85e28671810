"""Start values of router and bank.

Each tensor has a generator of its own, seeded by (seed, name): the values depend neither on the order of the draws, nor on the number
of layers, nor on the device.  Conversion on disk (`pesc.models.upcycle`) and missing keys in `from_pretrained` give the same bits.
"""

from __future__ import annotations

import hashlib
import math

import torch


def draw_initial(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """The fp32 start values of the tensor `name` (such as `layers.3.mlp.adapters.down`) on the CPU.

    `…adapters.up` is zero, which makes the crafted model equal to the dense one.  Everything else is U(-1/√H, 1/√H) with H the last
    dimension: kaiming uniform with a = √5 of each [*, H] matrix.  (torch's own kaiming_uniform_ takes R·H for the fan-in of [E, R, H].)
    """
    if name.endswith(("adapters.up", "adapters.shared_up")):
        return torch.zeros(shape, device="cpu")
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator(device="cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    bound = 1 / math.sqrt(shape[-1])
    return torch.empty(shape, device="cpu").uniform_(-bound, bound, generator=generator)
