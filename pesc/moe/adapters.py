"""The bank: all adapters of one layer in two contiguous tensors.

T tokens, H hidden, E experts, K active experts, R adapter width.  `down [E,R,H]` and `up [E,R,H]` serve every way of dispatch as views:
dense multiplies with `[E·R, H]`, grouped with `[E, H, R]` (transposed strides) and `[E, R, H]`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from pesc.moe.dispatch import autocasts, run_adapters
from pesc.moe.initial import draw_initial


class AdapterBank(nn.Module):
    """E bottleneck adapters: A_e(y) = U_e · GELU(D_e · y), mixed by the gate weights.

    One module with two parameters: every rank touches every parameter in every step, so that ZeRO-3 and FSDP cannot run out of step.
    With `shared_dim` there is one more adapter, `shared_down` and `shared_up` [shared_dim, H], which every token uses with weight 1.
    """

    shared_down: nn.Parameter
    shared_up: nn.Parameter
    """Only with a `shared_dim`."""

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        adapter_dim: int,
        scaling: float,
        name: str,
        seed: int,
        dispatch: str = "auto",
        shared_dim: int = 0,
    ):
        super().__init__()
        self.scaling = scaling
        self.name = name
        self.seed = seed
        self.dispatch = dispatch
        self.shared_dim = shared_dim
        self.down = nn.Parameter(torch.empty(num_experts, adapter_dim, hidden_size))
        self.up = nn.Parameter(torch.empty(num_experts, adapter_dim, hidden_size))
        if shared_dim:
            self.shared_down = nn.Parameter(torch.empty(shared_dim, hidden_size))
            self.shared_up = nn.Parameter(torch.empty(shared_dim, hidden_size))

    @torch.no_grad()
    def reset_parameters(self, keep: Callable[[torch.Tensor], bool] = lambda _: False) -> None:
        """Draw the start values from (seed, name): `down` kaiming uniform (a = √5), `up` zero.  Those that `keep` names stay."""
        for part, parameter in self.named_parameters(recurse=False):
            if not keep(parameter):
                parameter.copy_(draw_initial(f"{self.name}.{part}", tuple(parameter.shape), self.seed))

    def forward(self, y_TH: torch.Tensor, index_TK: torch.Tensor, weight_TK: torch.Tensor) -> torch.Tensor:
        """S · Σ_K w · U_e · GELU(D_e · y) for the FFN OUTPUT y (PESC eq. 7 and 8 without the residual).

        y_TH [..., H], index_TK and weight_TK [..., K] -> [..., H] in y's dtype; computed in the bank's dtype.
        """
        hidden, top_k, down_ERH = y_TH.shape[-1], index_TK.shape[-1], self.down
        flat_TH = y_TH.reshape(-1, hidden)
        if flat_TH.dtype != down_ERH.dtype:
            flat_TH = flat_TH.to(down_ERH.dtype)
        gate_TK = weight_TK.reshape(-1, top_k)
        if self.scaling != 1:
            gate_TK = gate_TK * self.scaling
        delta_TH = run_adapters(flat_TH, down_ERH, self.up, index_TK.reshape(-1, top_k), gate_TK, mode=self.dispatch)
        if self.shared_dim:
            delta_TH = delta_TH + self.scaling * self._shared(flat_TH)
        if delta_TH.dtype != y_TH.dtype:
            delta_TH = delta_TH.to(y_TH.dtype)
        return delta_TH.reshape(y_TH.shape)

    def _shared(self, y_TH: torch.Tensor) -> torch.Tensor:
        if autocasts(y_TH):
            with torch.autocast(y_TH.device.type, enabled=False):
                return self._shared(y_TH)
        return nn.functional.gelu(nn.functional.linear(y_TH, self.shared_down)) @ self.shared_up

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        shared = f", shared_dim={self.shared_dim}" if self.shared_dim else ""
        return f"bank={tuple(self.down.shape)}{shared}, scaling={self.scaling}, dispatch={self.dispatch}"
