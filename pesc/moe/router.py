"""The router: which adapters a token uses, and with what weight.

T tokens, H hidden, E experts, K active experts; `...` stands for any leading dimensions (batch, sequence).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from pesc.moe.initial import draw_initial


def select_experts(logits_TE: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Top-k first, then softmax over the survivors in fp32 (PESC eq. 9).

    logits_TE [..., E] -> index_TK [..., K] int64, weight_TK [..., K] (fp32, or fp64 for fp64 logits), Σ_K weight = 1.
    Equal to softmax over all experts, top-k, renormalise (Mixtral).
    """
    top_TK, index_TK = logits_TE.topk(top_k, dim=-1)
    wide = torch.promote_types(top_TK.dtype, torch.float32)
    return index_TK, top_TK.to(wide).softmax(dim=-1)


class Router(nn.Module):
    """A linear map from the FFN input to one logit an expert: z = x · W^T, no bias, no noise.

    Not an `nn.Linear`, so that neither bitsandbytes nor PEFT takes it for a projection.  Its forward is a module call of its own,
    so that ZeRO-3 gathers the weight and `RouterRecorder` can read the logits.
    """

    def __init__(self, hidden_size: int, num_experts: int, top_k: int, name: str, seed: int):
        super().__init__()
        self.top_k = top_k
        self.name = name
        self.seed = seed
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))

    @torch.no_grad()
    def reset_parameters(self, keep: Callable[[nn.Parameter], bool] = lambda _: False) -> None:
        """Draw the start values from (seed, name) alone: kaiming uniform (a = √5).  Parameters that `keep` names stay as they are."""
        if not keep(self.weight):
            self.weight.copy_(draw_initial(f"{self.name}.weight", tuple(self.weight.shape), self.seed))

    def forward(self, x_TH: torch.Tensor) -> torch.Tensor:
        """x_TH [..., H] (the FFN INPUT) -> logits_TE [..., E] in the weight's dtype."""
        return nn.functional.linear(x_TH.to(self.weight.dtype), self.weight)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"weight={tuple(self.weight.shape)}, top_k={self.top_k}"
