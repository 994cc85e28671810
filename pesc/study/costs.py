"""What each arm of a recipe took, as the manifests of its results say.  Nothing is guessed: what was not measured is None."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from pesc.evaluate.records import parse_address
from pesc.store import Manifest


@dataclass(frozen=True)
class ArmCost:
    """One run of an arm.  Seconds are wall time; of results that arms share (`upcycle` of equal settings), each has the whole."""

    arm: str
    tokens_per_second: float | None
    """Of training, without its start."""
    peak_memory_bytes: int | None
    """Of training, of one rank."""
    train_seconds: float | None
    """Of the whole `train` action."""
    other_seconds: float
    """Of the arm's other actions: upcycle, merge, evaluate, routing, heldout."""
    device: str
    """That trained, or that measured where nothing was trained."""


def arm_costs(arms: Iterable[str], manifests: Mapping[str, Manifest]) -> list[ArmCost]:
    """A cost an arm, in the order given.  manifests: by address."""
    built = [(*parse_address(address), manifest) for address, manifest in manifests.items()]
    owned = [(stage, instance.partition("/")[0], manifest) for stage, instance, manifest in built if stage != "download"]
    return [_cost(arm, [(stage, manifest) for stage, owner, manifest in owned if owner == arm]) for arm in arms]


def _cost(arm: str, built: list[tuple[str, Manifest]]) -> ArmCost:
    training = next((manifest for stage, manifest in built if stage == "train"), None)
    metrics = training.metrics if training else {}
    return ArmCost(
        arm, metrics.get("tokens_per_second"), metrics.get("peak_memory_bytes"), training.seconds if training else None,
        sum(manifest.seconds for stage, manifest in built if stage != "train"), _device(training, [manifest for _, manifest in built]),
    )  # fmt: skip


def _device(training: Manifest | None, others: list[Manifest]) -> str:
    for manifest in [*([training] if training else []), *others]:
        if device := manifest.metrics.get("device"):
            ranks = manifest.metrics.get("world_size") or 1
            return f"{ranks} ranks on {device}" if ranks > 1 else str(device)
    return ""


def processors(manifests: Iterable[Manifest]) -> tuple[str, ...]:
    """Names of the CPUs that built the results."""
    found = {str(hardware["cpu"]) for manifest in manifests if (hardware := manifest.environment.get("hardware") or {}).get("cpu")}
    return tuple(sorted(found))


def whole_seconds(manifests: Iterable[Manifest]) -> float:
    """Sum of all results' wall times, each counted once however many arms share it; more than the study took where some were built side by side."""
    return sum({(manifest.key.stage, manifest.fingerprint): manifest.seconds for manifest in manifests}.values())
