"""The paired loss with all logits at once, in plain torch: slow, obvious, and the definition of what is right.

The gradient of the log-probs is autograd's; only the slopes of the loss come from outside.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from dpo_kernels.chunks import early_gradient_dtype
from dpo_kernels.head import Head
from dpo_kernels.linear_dpo.interface import PairLosses, PairScorer, Want
from dpo_kernels.linear_logps.reference import gradients, leaf, leaf_head, logits, logps, token_stats


def forward(
    hidden_TD: Tensor, head: Head, labels_T: Tensor, scorer: PairScorer, *, ignore_index: int, want: Want
) -> PairLosses:
    """See ``dpo_kernels.linear_dpo.interface``."""
    stats_KT = token_stats(logits(hidden_TD, head), labels_T, ignore_index, want.stats) if want.stats else None
    # Leaving inference mode is what switches autograd back on inside an operator.
    with torch.inference_mode(False):
        dtype = early_gradient_dtype(hidden_TD.dtype)
        bias_V = None if head.bias_V is None else head.bias_V.to(dtype)
        head = head._replace(weight_VD=head.weight_VD.to(dtype), bias_V=bias_V)
        hidden, head = leaf(hidden_TD.to(dtype), want.gradients.hidden), leaf_head(head, want.gradients)
        logps_T, _ = logps(hidden, head, leaf(labels_T), ignore_index)
        if scorer.token_weights_T is not None:
            logps_T = logps_T * leaf(scorer.token_weights_T)
        bounds = itertools.pairwise(scorer.offsets)
        logps_S = torch.stack([logps_T[start:stop].double().sum().to(logps_T.dtype) for start, stop in bounds])
        losses_P, slopes_S = scorer.score(logps_S.detach())
        return PairLosses(losses_P, logps_S.detach(), gradients(logps_S, slopes_S, hidden, head), stats_KT)
