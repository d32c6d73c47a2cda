"""Whether a model is trained with a load-balancing loss, found by looking at what it returns.

Configs of families of mixtures name a coefficient and routers for their dense models, too, and some models return the
logits of their routers but no load-balancing loss of them. So the model runs once on a few tokens.

Legend: T tokens, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch._subclasses.fake_tensor import is_fake

from ..errors import UserError
from .checks import probe_groups
from .layouts import eager_attention
from .policy import OwnBalance, Policy
from .routers import balance_loss, experts_per_token, router_arguments, sum_routers

_ROUNDING = {torch.float64: 1e-5, torch.float32: 1e-3}
_HALF_ROUNDING = 0.05
"""Relative: transformers computes probabilities in the dtype of the logits."""


@dataclass(frozen=True)
class Balance:
    """The load-balancing loss of a model."""

    coefficient: float
    """What it is added to the preference loss with."""
    top_k: int
    """Experts that a token goes to."""

    @classmethod
    def of(cls, policy: Policy, wanted: float | None) -> Balance | None:
        """That of a policy; None for one without, or with a coefficient of 0. Every rank must call it.

        The first call that needs to know runs the model on a few tokens.

        Args:
            wanted: ``loss.router_aux_loss_coef``; None is the model's own, 0 where its config names none, where the
                model has no routers, or where it returns no such loss itself.

        Raises:
            UserError: a coefficient for a model whose routers cannot be read, or whose own loss is another one.
        """
        text = policy.config.get_text_config()
        coefficient = getattr(text, "router_aux_loss_coef", None) if wanted is None else wanted
        if not coefficient:
            return None
        top_k = experts_per_token(text)
        if policy.own_balance is None:
            policy.own_balance = _own_balance(policy, top_k)
        own = policy.own_balance
        if wanted is None and not own.has_loss:
            return None
        if not own.has_routers or top_k is None:
            raise UserError(
                f"loss.router_aux_loss_coef {coefficient:g}: {text.model_type} is no mixture of experts that returns "
                "the logits of its routers; set it to 0"
            )
        if not own.same:
            raise UserError(
                f"loss.router_aux_loss_coef {coefficient:g}: the load-balancing loss of {text.model_type} is not that "
                "of one router over all experts, which alone is supported; set it to 0"
            )
        return cls(float(coefficient), top_k)


def _own_balance(policy: Policy, top_k: int | None) -> OwnBalance:
    if not router_arguments(policy.config, True):
        return OwnBalance(has_routers=False, has_loss=False, same=False)
    group = probe_groups(policy.config, seed=0)[0]
    ids_T = torch.from_numpy(np.concatenate([group.prompt_ids, group.response_ids[0]]).astype(np.int64))
    training = policy.training
    policy.eval()
    try:
        with torch.no_grad(), eager_attention(policy):
            logits, loss = policy.plain_routers(ids_T[None].to(policy.device))
    finally:
        policy.train(training)
    if not logits:
        return OwnBalance(has_routers=False, has_loss=False, same=False)
    same = all(layer.numel() == len(ids_T) * layer.shape[-1] for layer in logits)
    if same and top_k is not None and loss is not None:
        sums = sum_routers(logits, torch.ones_like(ids_T, device=policy.device), top_k)
        rounding = _ROUNDING.get(logits[0].dtype, _HALF_ROUNDING)
        close = (balance_loss(sums, sums.probs_E) - loss).abs() <= rounding * loss
        # Tensors without data, in forecasts, are taken to agree: a run finds out.
        same = is_fake(close) or bool(close)
    return OwnBalance(has_routers=True, has_loss=loss is not None, same=same)
