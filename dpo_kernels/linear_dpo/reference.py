"""The paired loss with all logits at once, in plain torch: slow, obvious, and the definition of what is right.

The gradient of the log-probs is autograd's; only the slopes of the loss come from outside.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dpo_kernels.chunks import early_gradient_dtype
from dpo_kernels.linear_logps.reference import gradients, leaf, logits, logps, token_stats


def forward(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    labels_T: Tensor,
    cu_responses: list[int],
    score_pairs: Callable[[Tensor, int], tuple[Tensor, Tensor]],
    bias_V: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    temperature: float,
    ignore_index: int,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    stats: Sequence[str] = (),
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """See ``dpo_kernels.linear_dpo.ops``."""
    stats_KT = None
    if stats:
        logits_TV = logits(hidden_TD, weight_VD, bias_V, softcap, logit_scale, temperature)
        stats_KT = token_stats(logits_TV, labels_T, ignore_index, stats)
    # Leaving inference mode is what switches autograd back on inside an operator.
    with torch.inference_mode(False):
        dtype = early_gradient_dtype(hidden_TD.dtype)
        hidden, weight = leaf(hidden_TD.to(dtype), need_hidden), leaf(weight_VD.to(dtype), need_weight)
        bias = None if bias_V is None else leaf(bias_V.to(dtype), need_bias)
        logps_T, _ = logps(hidden, weight, leaf(labels_T), bias, softcap, logit_scale, temperature, ignore_index)
        bounds = itertools.pairwise(cu_responses)
        logps_S = torch.stack([logps_T[start:stop].double().sum().to(logps_T.dtype) for start, stop in bounds])
        losses_P, slopes_S = score_pairs(logps_S.detach(), 0)
        return losses_P, logps_S.detach(), *gradients(logps_S, slopes_S, hidden, weight, bias), stats_KT
