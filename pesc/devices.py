"""GPUs: memory, peak rates and prices, for planning (`pesc fit`) and for the share of the peak that a run reaches (MFU)."""

from __future__ import annotations

import re
from dataclasses import dataclass

from pesc.errors import RecipeError

PRICES_OF = "November 2026"
"""When the prices were written down: typical on-demand prices of GPU clouds in US dollars, not quotes.  `--price` replaces them."""


@dataclass(frozen=True)
class Device:
    """One kind of GPU.  Rates are the maker's for dense bf16 with fp32 sums."""

    name: str
    product: str
    """Words of the driver's name that tell it from others."""
    memory: int
    """Bytes that CUDA shows, a little below the number in the name."""
    tflops: float
    bandwidth: float
    """Of its memory, in bytes a second."""
    link: float
    """To a GPU of the same node, in bytes a second and direction: NVLink, or PCIe where there is none."""
    price: tuple[float, float]
    """US dollars an hour, from and to."""


_GIB = 1 << 30


def _device(name: str, product: str, gib: float, tflops: float, terabytes: float, link: float, low: float, high: float) -> Device:
    return Device(name, product, int(gib * _GIB), tflops, terabytes * 1e12, link * 1e9, (low, high))


DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        _device("h200", "H200", 139.8, 989, 4.8, 450, 2.5, 4.0),
        _device("h100", "H100", 79.2, 989, 3.35, 450, 2.0, 3.5),
        _device("h100-pcie", "H100 PCIe", 79.2, 756, 2.0, 64, 1.8, 3.0),
        _device("b200", "B200", 178.3, 2250, 8.0, 900, 4.0, 6.5),
        _device("a100-80", "A100", 79.2, 312, 2.0, 300, 1.1, 2.2),
        _device("a100-40", "A100", 39.4, 312, 1.55, 300, 0.8, 1.5),
        _device("l40s", "L40S", 44.4, 362, 0.864, 32, 0.7, 1.5),
        _device("a6000", "RTX A6000", 47.4, 155, 0.768, 32, 0.4, 0.9),
        _device("a10g", "A10G", 22.1, 70, 0.6, 32, 0.4, 1.1),
        _device("l4", "L4", 22.1, 121, 0.3, 32, 0.3, 0.8),
        _device("rtx5090", "RTX 5090", 31.3, 209, 1.79, 64, 0.4, 0.9),
        _device("rtx4090", "RTX 4090", 23.5, 165, 1.01, 32, 0.3, 0.7),
        _device("rtx3090", "RTX 3090", 23.5, 71, 0.936, 32, 0.15, 0.4),
    )
}
"""By the name that `--gpu` takes."""
_PEAKS_OF_OTHERS = {
    "GB200": 2500, "GH200": 989, "H100 NVL": 835, "H800": 989, "A800": 312, "L40": 181, "A40": 150, "A30": 165, "A10": 125,
}  # fmt: skip
"""TFLOP/s of GPUs that nobody plans with by name here, but that training meets."""
_ALIASES = {"a100": "a100-80", "4090": "rtx4090", "5090": "rtx5090", "3090": "rtx3090", "h100-80": "h100"}


def parse_gpus(text: str) -> tuple[Device, int]:
    """`h200:1`, `a100-80:16`, `rtx4090`: a device and how many.  Raises RecipeError for anything else."""
    match = re.fullmatch(r"([a-z0-9-]+?)(?::([0-9]+))?", text.strip().lower())
    name = match[1] if match else text
    device, count = DEVICES.get(_ALIASES.get(name, name)), int(match[2] or 1) if match else 0
    if device is None:
        raise RecipeError(f"--gpu is {text!r}: write NAME:COUNT, such as h200:1 or a100-80:16. Names: {', '.join(DEVICES)}.")
    if not count:
        raise RecipeError(f"--gpu is {text!r}: there must be at least one.")
    return device, count


def peak_of(driver_name: str) -> float | None:
    """FLOP/s in bf16 of the GPU that its driver calls so; None for one that is not known.  The longest product's name that fits counts."""
    peaks = {device.product: device.tflops for device in DEVICES.values()} | _PEAKS_OF_OTHERS
    words = driver_name.replace("-", " ").split()
    fitting = [product for product in peaks if all(word in words for word in product.split())]
    return peaks[max(fitting, key=len)] * 1e12 if fitting else None


def device_of(driver_name: str) -> Device | None:
    """The GPU that its driver calls so; None for one without an entry.  The longest product's name that fits counts.

    A100s differ in memory alone: the driver's name has it (`NVIDIA A100-SXM4-40GB`), and without it the larger is taken.
    """
    words = driver_name.replace("-", " ").split()
    fitting = [device for device in DEVICES.values() if all(word in words for word in device.product.split())]
    if not fitting:
        return None
    longest = max(len(device.product) for device in fitting)
    best = [device for device in fitting if len(device.product) == longest]
    sized = [device for device in best if f"{round(device.memory / _GIB / 10) * 10}GB" in words]
    return (sized or sorted(best, key=lambda device: -device.memory))[0]
