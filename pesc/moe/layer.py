"""The sparse MLP: a dense MLP of any architecture, widened in place.

T tokens, H hidden, K active experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
from torch import nn

from pesc.moe.adapters import AdapterBank
from pesc.moe.config import PescConfig
from pesc.moe.router import Router


class SparseMLP(nn.Module):
    """Mixin before a dense MLP class: `class PescLlamaMLP(SparseMLP, LlamaMLP)`.  Adds `router` and `adapters`, changes no dense weight."""

    router: Router
    adapters: AdapterBank
    adapter_input: str = "ffn_output"

    def forward(self, x_TH: torch.Tensor) -> torch.Tensor:
        """X [..., H] (the FFN input) -> y + s · Σ_K w · A_e(y) with y = FFN(x), [..., H] in y's dtype (PESC eq. 7-9).

        With `adapter_input` "ffn_input" the adapters read x instead: y + s · Σ_K w · A_e(x).
        """
        return self.add_experts(x_TH, super().forward(x_TH))

    def add_experts(self, x_TH: torch.Tensor, y_TH: torch.Tensor) -> torch.Tensor:
        """The FFN's input x and output y, both [..., H] -> what `forward` returns."""
        index_TK, weight_TK = self.router.select(self.router(x_TH))
        return y_TH + self.adapters(x_TH if self.adapter_input == "ffn_input" else y_TH, index_TK, weight_TK)

    def __reduce_ex__(self, protocol):
        """Pickled by its dense class: the sparse one is made where it is needed, also in a process that has not built it yet."""
        return _new_sparse, (type(self).__bases__[1],), self.__dict__


@cache
def sparse_class(dense_class: type[nn.Module]) -> type[nn.Module]:
    """The sparse form of a dense MLP class, e.g. LlamaMLP -> PescLlamaMLP."""
    return type(
        f"Pesc{dense_class.__name__}",
        (SparseMLP, dense_class),
        {"__module__": __name__, "__doc__": f"{dense_class.__name__} with adapters."},
    )


def _new_sparse(dense_class: type[nn.Module]) -> nn.Module:
    cls = sparse_class(dense_class)
    return cls.__new__(cls)


def widen_mlp(mlp: nn.Module, config: PescConfig, hidden_size: int, layer: int) -> None:
    """Turn a built dense MLP into the sparse one, in place: its class becomes the subclass, its weights stay where they are.

    The dense constructors build their own MLPs, so that replacing them would allocate (and initialise) every FFN twice.
    Router and bank are made in the default dtype and device of the moment, without values; see `reset_parameters`.  A layer for which
    `config.layer_experts` says 0 stays as it is.
    """
    num_experts = config.experts_of(layer)
    if isinstance(mlp, SparseMLP) or not num_experts:
        return
    name = f"layers.{layer}.mlp"
    mlp.__class__ = sparse_class(type(mlp))
    mlp.adapter_input = config.adapter_input  # pyright: ignore[reportArgumentType]  it is a SparseMLP now
    mlp.router = Router(hidden_size, num_experts, config.top_k, f"{name}.router", config.seed, config.bias_update_rate)
    mlp.adapters = AdapterBank(
        hidden_size,
        num_experts,
        config.adapter_dim,
        config.scaling,
        f"{name}.adapters",
        config.seed,
        config.dispatch,
        config.shared_adapter_dim,
    )


def sparse_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Names (within `model`) and parameters of all routers and banks: what PESC trains in full, beside the LoRA."""
    for prefix, module in model.named_modules():
        if isinstance(module, Router | AdapterBank):
            for name, parameter in module.named_parameters(recurse=False):
                yield f"{prefix}.{name}", parameter


def set_dispatch(model: nn.Module, mode: str) -> None:
    """Pin the way the adapters run (see `pesc.moe.dispatch`) in every layer of a built model."""
    for module in model.modules():
        if isinstance(module, AdapterBank):
            module.dispatch = mode
