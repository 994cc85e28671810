"""Start values of router and bank.

Each tensor has a generator of its own, seeded by (seed, name): the values depend neither on the order of the draws, nor on the number
of layers, nor on the device.  Conversion on disk (`pesc.models.upcycle`) and missing keys in `from_pretrained` give the same bits.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator

import torch


def draw_initial(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """The fp32 start values of the tensor `name` (such as `layers.3.mlp.adapters.down`) on the CPU.

    `…adapters.up` is zero, which makes the crafted model equal to the dense one.  Everything else is U(-1/√H, 1/√H) with H the last
    dimension: kaiming uniform with a = √5 of each [*, H] matrix.  (torch's own kaiming_uniform_ takes R·H for the fan-in of [E, R, H].)
    """
    if starts_at_zero(name):
        return torch.zeros(shape, device="cpu")
    bound = 1 / math.sqrt(shape[-1])
    return torch.empty(shape, device="cpu").uniform_(-bound, bound, generator=_generator(name, seed))


def draw_initial_chunks(name: str, shape: tuple[int, ...], seed: int, elements: int = 1 << 14) -> Iterator[torch.Tensor]:
    """The same values in order, in flat pieces of `elements` in one buffer: a piece is overwritten by the next.

    Small pieces stay in the cache and below the size that torch splits over threads, so that several names can be drawn at a time.
    """
    bound, generator = 1 / math.sqrt(shape[-1]), _generator(name, seed)
    size = math.prod(shape)
    buffer = torch.zeros(min(elements, size), device="cpu")
    for start in range(0, size, elements):
        piece = buffer[: size - start]
        yield piece if starts_at_zero(name) else piece.uniform_(-bound, bound, generator=generator)


def starts_at_zero(name: str) -> bool:
    """Whether all start values of a tensor are zero."""
    return name.endswith(("adapters.up", "adapters.shared_up"))


def _generator(name: str, seed: int) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator(device="cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)
