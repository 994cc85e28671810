"""The output projection turned into the loss, where the model does nothing else behind it.

B blocks, K kept positions, N supervised tokens, H hidden, V vocabulary.

    head = LossHead.of(causal_lm)            None where the logits are needed: softcapping, a logit scale, LoRA or a bias on lm_head ...
    with head.scoring(rows_N, target_N, scale):
        loss = head.loss_of(model(..., logits_to_keep=kept_K))

While it scores, lm_head's forward gives the loss where the model's code expects logits, so that whatever stands around that module (a
wrapper, ZeRO-3 gathering the weight before and releasing it behind, hooks) works as for any other forward pass.

Pitfall: a model that changes its logits would change the loss instead.  Whether it does is found out by running its own forward once with a
body that does nothing and a head that gives known numbers: what comes out must be those numbers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from pesc.train.loss import scaled_cross_entropy, scaled_linear_cross_entropy
from pesc.train.packed_rows import model_inputs, rows_told

logger = logging.getLogger(__name__)


class LossHead:
    """An output projection that can be told to give the loss."""

    def __init__(self, projection: nn.Linear) -> None:
        self._projection = projection
        self._plain: Callable[[torch.Tensor], torch.Tensor] = projection.forward
        self._scored: tuple[torch.Tensor | None, torch.Tensor, torch.Tensor] | None = None
        projection.forward = self._forward  # pyright: ignore[reportAttributeAccessIssue]  named by its shape

    @classmethod
    def of(cls, model: PreTrainedModel) -> LossHead | None:
        """The head of a causal language model that is not wrapped or sharded yet; None where only its logits will do."""
        projection: Any = model.get_output_embeddings()
        if type(projection) is not nn.Linear or projection.bias is not None or not _gives_its_heads_logits(model, projection):
            logger.debug("%s: the loss is made from logits", type(model).__name__)
            return None
        return cls(projection)

    @contextmanager
    def scoring(self, rows_N: torch.Tensor | None, target_N: torch.Tensor, scale: torch.Tensor) -> Iterator[None]:
        """Forward passes inside give the loss.  rows_N: which of the [B·K] positions count, None for all."""
        self._scored = (rows_N, target_N, scale)
        try:
            yield
        finally:
            self._scored = None

    def loss_of(self, output: Any) -> torch.Tensor:
        """The scalar in the place of a model's logits."""
        return output.logits.reshape(())

    def _forward(self, hidden_BKH: torch.Tensor) -> torch.Tensor:
        if self._scored is None:
            return self._plain(hidden_BKH)
        rows_N, target_N, scale = self._scored
        hidden_NH = hidden_BKH.reshape(-1, hidden_BKH.shape[-1])
        if rows_N is not None:
            hidden_NH = hidden_NH.index_select(0, rows_N)
        weight_VH = self._projection.weight
        return scaled_linear_cross_entropy(hidden_NH.to(weight_VH.dtype), weight_VH, target_N, scale).reshape(1, 1, 1)


def batch_cross_entropy(
    model: Any, head: LossHead | None, batch: Mapping[str, Any], scale: torch.Tensor, chooses_logits: bool = True
) -> torch.Tensor:
    """Σ cross-entropy over a micro-batch's supervised tokens, times `scale`.

    head: of the causal language model inside `model`.  Only positions with a target meet the vocabulary, and, where there is a head, in
    chunks.  chooses_logits: whether the model can leave out the other positions itself; the batch must have been collated so.
    """
    choice = {"logits_to_keep": batch["kept_K"]} if chooses_logits else {}
    arguments = {**model_inputs(batch), "use_cache": False, **choice}
    rows_N, targets_N = batch["rows_N"], batch["targets_N"]
    with rows_told(batch["packed"]):
        if head is not None:
            with head.scoring(rows_N, targets_N, scale):
                return head.loss_of(model(**arguments))
        logits_BKV = model(**arguments).logits
    return scaled_cross_entropy(logits_BKV.reshape(-1, logits_BKV.shape[-1]).index_select(0, rows_N), targets_N, scale)


@torch.no_grad()
def _gives_its_heads_logits(model: PreTrainedModel, projection: nn.Linear) -> bool:
    """Whether what the model gives is what its projection gave, whatever its values are."""
    body = getattr(model, model.base_model_prefix, None)
    if not isinstance(body, nn.Module) or body is model:
        return False
    device = projection.weight.device
    vocabulary, hidden = projection.weight.shape
    known_12V = 1e3 * torch.linspace(-1, 1, 2 * vocabulary, device=device).reshape(1, 2, vocabulary)
    nothing = BaseModelOutputWithPast(last_hidden_state=torch.zeros(1, 2, hidden, device=device, dtype=projection.weight.dtype))  # pyright: ignore[reportArgumentType]
    tokens_12 = torch.zeros(1, 2, dtype=torch.long, device=device)
    try:
        with _replaced(body, lambda *_args, **_kwargs: nothing), _replaced(projection, lambda _hidden: known_12V.clone()):
            given = model.forward(input_ids=tokens_12, use_cache=False).logits
    except Exception:
        logger.debug("%s does not run with an empty body", type(model).__name__, exc_info=True)
        return False
    return given is not None and given.shape == known_12V.shape and torch.equal(given.float(), known_12V)


@contextmanager
def _replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Another forward on this one instance, for a while."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before
