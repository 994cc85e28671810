"""How a model is loaded, and how it chooses its words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class LoadOptions:
    """Where and in which type the weights are held."""

    device: str = "auto"
    """auto (a GPU where there is one), cpu or cuda."""
    dtype: str = "auto"
    """auto: the model's own on a GPU; float32 on a CPU, where bfloat16 is many times slower."""
    four_bit: bool = False
    """NF4 with double quantisation, as in QLoRA training; router and adapters stay as they are."""
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Sampling:
    """None: as the model's generation config says."""

    max_new_tokens: int | None = None
    temperature: float | None = None
    """0: always the likeliest token."""
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    greedy: bool = False
    seed: int | None = None
    """Of every reply; None: another one each time."""

    def generate_options(self) -> dict[str, Any]:
        """Arguments of `generate`.  Any of temperature, top_p and top_k turns sampling on; greedy or temperature 0 turns it off."""
        penalty = {} if self.repetition_penalty is None else {"repetition_penalty": self.repetition_penalty}
        if self.greedy or self.temperature == 0:
            return {"do_sample": False, **penalty}
        given = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        chosen = {name: value for name, value in given.items() if value is not None}
        return {**({"do_sample": True} if chosen else {}), **chosen, **penalty}
