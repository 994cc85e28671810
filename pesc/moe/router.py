"""The router: which adapters a token uses, and with what weight.

T tokens, H hidden, E experts, K active experts; `...` stands for any leading dimensions (batch, sequence).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from pesc.moe.initial import draw_initial


def select_experts(logits_TE: torch.Tensor, top_k: int, bias_E: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Top-k first, then softmax over the survivors in fp32 (PESC eq. 9).

    logits_TE [..., E] -> index_TK [..., K] int64, weight_TK [..., K] (fp32, or fp64 for fp64 logits), Σ_K weight = 1.
    Equal to softmax over all experts, top-k, renormalise (Mixtral).  bias_E [E] decides with the logits which experts are
    chosen, and has no part in their weights (Wang et al. 2024, auxiliary-loss-free balancing).
    """
    if bias_E is None:
        top_TK, index_TK = logits_TE.topk(top_k, dim=-1)
    else:
        index_TK = (logits_TE.float() + bias_E).topk(top_k, dim=-1).indices
        top_TK = logits_TE.gather(-1, index_TK)
    wide = torch.float64 if top_TK.dtype == torch.float64 else torch.float32
    return index_TK, top_TK.softmax(dim=-1, dtype=wide)


class Router(nn.Module):
    """A linear map from the FFN input to one logit an expert: z = x · W^T, no bias in the logits.

    Not an `nn.Linear`, so that neither bitsandbytes nor PEFT takes it for a projection.  Its forward is a module call of its own,
    so that ZeRO-3 gathers the weight and `RouterRecorder` can read the logits.

    With a `bias_update_rate` γ it has the buffer `bias_steps` [E], whole numbers: experts are selected by z + γ · bias_steps.  Whole, so
    that no cast of the model to half precision swallows the small steps.
    """

    bias_steps: torch.Tensor | None

    def __init__(self, hidden_size: int, num_experts: int, top_k: int, name: str, seed: int, bias_update_rate: float = 0.0):
        super().__init__()
        self.num_experts = num_experts
        self.top_k = top_k
        self.name = name
        self.seed = seed
        self.bias_update_rate = bias_update_rate
        self.jitter = 0.0
        """While training, x is multiplied by U(1 - jitter, 1 + jitter), drawn like dropout (Fedus et al. 2022, section 2.2)."""
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.register_buffer("bias_steps", torch.zeros(num_experts, dtype=torch.int32) if bias_update_rate else None)

    @torch.no_grad()
    def reset_parameters(self, keep: Callable[[torch.Tensor], bool] = lambda _: False) -> None:
        """Draw the start values from (seed, name) alone: kaiming uniform (a = √5).  Tensors that `keep` names stay as they are."""
        if not keep(self.weight):
            self.weight.copy_(draw_initial(f"{self.name}.weight", tuple(self.weight.shape), self.seed))
        if self.bias_steps is not None and not keep(self.bias_steps):
            self.bias_steps.zero_()

    def forward(self, x_TH: torch.Tensor) -> torch.Tensor:
        """x_TH [..., H] (the FFN INPUT) -> logits_TE [..., E] in the weight's dtype."""
        if self.training and self.jitter:
            x_TH = x_TH * torch.empty_like(x_TH).uniform_(1 - self.jitter, 1 + self.jitter)
        weight = self.weight
        return nn.functional.linear(x_TH if x_TH.dtype == weight.dtype else x_TH.to(weight.dtype), weight)

    @property
    def selection_bias(self) -> torch.Tensor | None:
        """γ · bias_steps, [E] fp32; None without a bias."""
        return None if self.bias_steps is None else self.bias_steps.float() * self.bias_update_rate

    def select(self, logits_TE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`select_experts` with this router's K and bias."""
        return select_experts(logits_TE, self.top_k, self.selection_bias if self.bias_update_rate else None)

    @torch.no_grad()
    def update_bias(self, choices_E: torch.Tensor) -> None:
        """One step of γ up for each expert that was chosen less often than the mean, one down for more often.

        choices_E [E]: how many tokens chose each expert since the last update, over all ranks.
        """
        if self.bias_steps is None:
            raise ValueError(f"{self.name} has no selection bias: set pesc.bias_update_rate")
        choices_E = choices_E.to(self.bias_steps.device, torch.float64)
        self.bias_steps.add_(torch.sign(choices_E.mean() - choices_E).to(torch.int32))

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"weight={tuple(self.weight.shape)}, top_k={self.top_k}"


def find_routers(model: nn.Module) -> dict[str, Router]:
    """Router modules of a model by name, in layer order; empty for a dense one."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Router)}
