"""The bank: all adapters of one layer in two contiguous tensors.

T tokens, H hidden, E experts, K active experts, R adapter width.  `down [E,R,H]` and `up [E,R,H]` serve every way of dispatch as views:
dense multiplies with `[E·R, H]`, grouped with `[E, H, R]` (transposed strides) and `[E, R, H]`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from pesc.moe.dispatch import run_adapters
from pesc.moe.initial import draw_initial


class AdapterBank(nn.Module):
    """E bottleneck adapters: A_e(y) = U_e · GELU(D_e · y), mixed by the gate weights.

    One module with two parameters: every rank touches every parameter in every step, so that ZeRO-3 and FSDP cannot run out of step.
    """

    def __init__(self, hidden_size: int, num_experts: int, adapter_dim: int, scaling: float, name: str, seed: int, dispatch: str = "auto"):
        super().__init__()
        self.scaling = scaling
        self.name = name
        self.seed = seed
        self.dispatch = dispatch
        self.down = nn.Parameter(torch.empty(num_experts, adapter_dim, hidden_size))
        self.up = nn.Parameter(torch.empty(num_experts, adapter_dim, hidden_size))

    @torch.no_grad()
    def reset_parameters(self, keep: Callable[[nn.Parameter], bool] = lambda _: False) -> None:
        """Draw the start values from (seed, name): `down` kaiming uniform (a = √5), `up` zero.  Those that `keep` names stay."""
        for part in ("down", "up"):
            parameter = getattr(self, part)
            if not keep(parameter):
                parameter.copy_(draw_initial(f"{self.name}.{part}", tuple(parameter.shape), self.seed))

    def forward(self, y_TH: torch.Tensor, index_TK: torch.Tensor, weight_TK: torch.Tensor) -> torch.Tensor:
        """S · Σ_K w · U_e · GELU(D_e · y) for the FFN OUTPUT y (PESC eq. 7 and 8 without the residual).

        y_TH [..., H], index_TK and weight_TK [..., K] -> [..., H] in y's dtype; computed in the bank's dtype.
        """
        hidden, top_k = y_TH.shape[-1], index_TK.shape[-1]
        flat_TH = y_TH.reshape(-1, hidden).to(self.down.dtype)
        gate_TK = weight_TK.reshape(-1, top_k) * self.scaling
        delta_TH = run_adapters(flat_TH, self.down, self.up, index_TK.reshape(-1, top_k), gate_TK, mode=self.dispatch)
        return delta_TH.to(y_TH.dtype).reshape(y_TH.shape)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"bank={tuple(self.down.shape)}, scaling={self.scaling}, dispatch={self.dispatch}"
