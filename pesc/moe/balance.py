"""Load balancing: the routers' logits of one forward pass, the loss on them, and what they say about the routing.

    with RouterRecorder(model) as recorder:
        output = model(**batch)
    loss = output.loss + coefficient * recorder.balance_loss(mask_BS) + z_coefficient * recorder.z_loss(mask_BS)
    loss.backward()

Or without a loss, after each optimizer step: `router.update_bias(choices_E)` with the choices of all ranks (Wang et al. 2024).

B sequences, S positions, T tokens that count (not padding), E experts, K active experts, L sparse layers.

Contract
- The logits are recorded by forward hooks on the `Router` modules, with their graph; nothing is recorded outside the `with`.
- Under non-reentrant activation checkpointing the loss has the same gradient as without, and the recomputation records nothing.
- Under reentrant checkpointing the first pass has no graph, so that the loss could have no gradient: `balance_loss` raises instead.

Pitfall: the reference implementation takes softmax over the top-k logits before the mean; that loss is the constant E/K without a
gradient.  P must be the softmax over ALL experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pesc.moe.router import find_routers, select_experts


def switch_loss(
    logits_TE: torch.Tensor, top_k: int, bias_E: torch.Tensor | None = None, mask_T: torch.Tensor | None = None
) -> torch.Tensor:
    """E · Σ_i f_i · P_i of one layer, a scalar in fp32 (Fedus et al. 2022 eq. 4, PESC eq. 10 without α).

    logits_TE [T, E].  f_i: share of the tokens that expert i is chosen for (Σ f = K); P_i: mean probability, softmax over all experts.
    Balanced routing gives K, all tokens on the same K experts up to E.  No tokens give 0.
    bias_E: the selection's bias, if the router has one.  mask_T [T], bool: the tokens that count; nothing here waits for the device.
    """
    num_experts, tokens = logits_TE.shape[-1], _count_tokens(logits_TE, mask_T)
    share_E = count_choices(logits_TE, top_k, bias_E, mask_T) / tokens
    probability_E = _masked(logits_TE.float().softmax(dim=-1), mask_T).sum(dim=0) / tokens
    return num_experts * torch.dot(share_E, probability_E)


def z_loss(logits_TE: torch.Tensor, mask_T: torch.Tensor | None = None) -> torch.Tensor:
    """Mean over the tokens of (log Σ_e exp z_e)², a scalar in fp32: keeps logits small (Zoph et al. 2022, eq. 5).  No tokens give 0."""
    squares_T1 = logits_TE.float().logsumexp(dim=-1, keepdim=True).square()
    return _masked(squares_T1, mask_T).sum() / _count_tokens(logits_TE, mask_T)


def count_choices(
    logits_TE: torch.Tensor, top_k: int, bias_E: torch.Tensor | None = None, mask_T: torch.Tensor | None = None
) -> torch.Tensor:
    """How many tokens choose each expert, [E] fp32, without a graph and without waiting for the device."""
    logits_TE = logits_TE.detach()
    index_TK, _ = select_experts(logits_TE, top_k, bias_E)
    chosen_TE = torch.zeros_like(logits_TE, dtype=torch.float32).scatter_(1, index_TK, 1.0)
    return _masked(chosen_TE, mask_T).sum(dim=0)


def _masked(values_TE: torch.Tensor, mask_T: torch.Tensor | None) -> torch.Tensor:
    """Zero in the rows that do not count, whatever stands there (selecting the others would make the host wait for their number)."""
    return values_TE if mask_T is None else torch.where(mask_T[:, None], values_TE, 0.0)


def _count_tokens(logits_TE: torch.Tensor, mask_T: torch.Tensor | None) -> torch.Tensor | int:
    return max(logits_TE.shape[0], 1) if mask_T is None else mask_T.sum().clamp(min=1)


@dataclass(frozen=True)
class RoutingStatistics:
    """What one layer's router did with the tokens that count."""

    load: tuple[float, ...]
    """Share of all assignments that went to each expert; balanced is 1/E, the sum is 1."""
    probability: tuple[float, ...]
    """Mean probability of each expert, softmax over all; the sum is 1."""
    entropy: float
    """Entropy of `load` over its maximum ln E: 1 is balanced, 0 is one expert for all (ln K / ln E: the same K for all)."""
    dead: tuple[int, ...]
    """Experts that no token chose."""
    tokens: int


def routing_statistics(logits_TE: torch.Tensor, top_k: int, bias_E: torch.Tensor | None = None) -> RoutingStatistics:
    """Load, entropy and dead experts of one layer.  logits_TE [T, E] of the tokens that count.  Waits for the device."""
    logits_TE = logits_TE.detach()
    tokens, num_experts = logits_TE.shape
    count_E = count_choices(logits_TE, top_k, bias_E).cpu().double()
    load_E = count_E / count_E.sum().clamp(min=1)
    probability_E = logits_TE.float().softmax(dim=-1).sum(dim=0).cpu() / max(tokens, 1)
    entropy = torch.special.entr(load_E).sum().item()
    most = torch.tensor(float(num_experts)).log().item()
    return RoutingStatistics(
        load=tuple(load_E.tolist()),
        probability=tuple(probability_E.tolist()),
        entropy=entropy / most if most else 1.0,
        dead=tuple((count_E == 0).nonzero().flatten().tolist()),
        tokens=tokens,
    )


class RouterRecorder:
    """Context manager that keeps every router's logits of the forward pass inside it.

    Entering again starts anew; logits stay readable (with their graph) after the exit until the next entry or `clear`.
    """

    def __init__(self, model: nn.Module, routers: Mapping[str, nn.Module] | None = None):
        """routers: by name, modules with `weight`, `top_k` and `num_experts` whose output, or its first part, is the logits; None: the
        model's `Router`s.
        """
        self.routers: dict[str, Any] = dict(find_routers(model) if routers is None else routers)
        if not self.routers:
            raise ValueError("this model has no router: it is dense, and there is no routing to record")
        self.logits: dict[str, torch.Tensor] = {}
        """Router's module name -> logits [B, S, E] of the last forward pass (foreign routers: [T, E]), in layer order."""
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> RouterRecorder:
        self.clear()
        self._handles = [router.register_forward_hook(self._hook_of(name)) for name, router in self.routers.items()]
        return self

    def __exit__(self, *_exception) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def clear(self) -> None:
        """Forget the logits, and let go of their graph."""
        self.logits = {}

    def _hook_of(self, name: str):
        def record(_module: nn.Module, _inputs: tuple, output: Any) -> None:
            if torch._C._current_graph_task_id() != -1:
                return  # inside a backward pass: a recomputation of what is recorded already
            self.logits[name] = output if isinstance(output, torch.Tensor) else output[0]

        return record

    def counted(self, mask_BS: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """Router's name -> logits [T, E] of the tokens whose mask is not 0 (without a mask: of all).  With a mask it waits for the device.

        Raises RuntimeError when nothing was recorded, ValueError when the mask is not [B, S].
        """
        return {name: logits_TE if mask_T is None else logits_TE[mask_T] for name, (logits_TE, mask_T) in self._recorded(mask_BS).items()}

    def _recorded(self, mask_BS: torch.Tensor | None) -> dict[str, tuple[torch.Tensor, torch.Tensor | None]]:
        """Router's name -> logits [T, E] of all tokens, and which of them count."""
        missing = [name for name in self.routers if name not in self.logits]
        if missing:
            raise RuntimeError(
                f"no logits of {missing[0]} (and {len(missing) - 1} more): run the model inside `with RouterRecorder(model)`"
            )
        return {name: _flatten(logits, mask_BS) for name, logits in self.logits.items()}

    def balance_losses(self, mask_BS: torch.Tensor | None = None) -> torch.Tensor:
        """`switch_loss` of every layer, [L] fp32 on the first router's device.

        Raises RuntimeError when gradients are wanted but the recorded logits carry none (reentrant checkpointing).
        """
        recorded = self._recorded(mask_BS)
        for name, (logits, _) in recorded.items():
            if torch.is_grad_enabled() and self.routers[name].weight.requires_grad and not logits.requires_grad:
                raise RuntimeError(
                    f"the logits of {name} have no gradient, so the balance loss would do nothing: "
                    "use gradient checkpointing with use_reentrant=False, and run the forward pass with gradients enabled"
                )
        losses = [switch_loss(logits, *self._selection(name), mask_T) for name, (logits, mask_T) in recorded.items()]
        return torch.stack([loss.to(losses[0].device) for loss in losses])

    def balance_loss(self, mask_BS: torch.Tensor | None = None) -> torch.Tensor:
        """Σ over the layers of `switch_loss`: the paper adds the loss of each sparse block to the total.  A scalar; K·L when balanced."""
        return self.balance_losses(mask_BS).sum()

    def z_loss(self, mask_BS: torch.Tensor | None = None) -> torch.Tensor:
        """Σ over the layers of `z_loss`, a scalar on the first router's device."""
        losses = [z_loss(logits, mask_T) for logits, mask_T in self._recorded(mask_BS).values()]
        return torch.stack([loss.to(losses[0].device) for loss in losses]).sum()

    def choices(self, mask_BS: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """Router's name -> how many tokens chose each of its experts, [E] fp32.  Does not wait for the device."""
        recorded = self._recorded(mask_BS)
        return {name: count_choices(logits, *self._selection(name), mask_T) for name, (logits, mask_T) in recorded.items()}

    def _selection(self, name: str) -> tuple[int, torch.Tensor | None]:
        """K and the bias of a router."""
        router = self.routers[name]
        return router.top_k, getattr(router, "selection_bias", None)

    def statistics(self, mask_BS: torch.Tensor | None = None) -> dict[str, RoutingStatistics]:
        """Router's name -> what it did.  Waits for the device: call it when you log, not in every step."""
        return {name: routing_statistics(logits, *self._selection(name)) for name, logits in self.counted(mask_BS).items()}


def _flatten(logits: torch.Tensor, mask_BS: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    flat_TE = logits.reshape(-1, logits.shape[-1])
    if mask_BS is None:
        return flat_TE, None
    if mask_BS.shape != logits.shape[:-1] and (logits.ndim > 2 or mask_BS.numel() != len(logits)):
        raise ValueError(f"the mask has shape {tuple(mask_BS.shape)}, the logits are of {tuple(logits.shape[:-1])} positions")
    return flat_TE, mask_BS.reshape(-1).to(flat_TE.device).bool()
