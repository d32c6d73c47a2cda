"""``linear_logps`` with all logits at once, in plain torch: slow, obvious, and the definition of what is right.

The gradient is autograd's of the forward below, not a formula of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_kernels.linear_logps.tile_filter import COLUMNS, Kept, kept_elements

FILTER_ROWS = 128
"""See ``dpo_kernels.linear_logps.ops``."""


def logits(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
) -> Tensor:
    """logits_TV, differentiable; float64 for float64 inputs, else float32."""
    dtype = torch.promote_types(hidden_TD.dtype, torch.float32)
    logits_TV = hidden_TD.to(dtype) @ weight_VD.to(dtype).T
    if bias_V is not None:
        logits_TV = logits_TV + bias_V.to(dtype)
    logits_TV = logits_TV * logit_scale
    if softcap is not None:
        logits_TV = softcap * torch.tanh(logits_TV / softcap)
    return logits_TV / temperature


def logps(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    labels_T: Tensor,
    bias_V: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    ignore_index: int = -100,
    kept_TV: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(logps_T, lse_T), differentiable; float64 for float64 inputs, else float32.

    Where kept_TV is False a logit has its value and no gradient: what a filtered backward leaves out.
    """
    logits_TV = logits(hidden_TD, weight_VD, bias_V, softcap, logit_scale, temperature)
    if kept_TV is not None:
        logits_TV = torch.where(kept_TV, logits_TV, logits_TV.detach())
    ignored_T = labels_T == ignore_index
    log_softmax_TV = torch.log_softmax(logits_TV, dim=-1)
    logps_T = log_softmax_TV.gather(1, labels_T.masked_fill(ignored_T, 0).unsqueeze(1)).squeeze(1)
    return logps_T.masked_fill(ignored_T, 0), torch.logsumexp(logits_TV, dim=-1)


def token_stats(logits_TV: Tensor, labels_T: Tensor, ignore_index: int, names: Sequence[str]) -> Tensor:
    """[K, T], in the order of the names, 0 on ignored rows; a top-1 hit is 1."""
    log_p_TV = torch.log_softmax(logits_TV, dim=-1)
    # Nothing is the largest where a logit is nan or inf, which make every log-prob of the row nan.
    has_top_T = ~log_p_TV[:, 0].isnan()
    definitions = {
        "entropy": lambda: torch.special.entr(log_p_TV.exp()).sum(dim=-1),
        "is_top1": lambda: ((logits_TV.argmax(dim=-1) == labels_T) & has_top_T).to(logits_TV.dtype),
        "mean_logits": lambda: logits_TV.mean(dim=-1),
        "log_sum_sq_probs": lambda: torch.logsumexp(2 * log_p_TV, dim=-1),
    }
    return torch.stack([definitions[name]() for name in names]).masked_fill(labels_T == ignore_index, 0)


def forward(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    labels_T: Tensor,
    bias_V: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    temperature: float,
    ignore_index: int,
    need_dx: bool,
    stats: Sequence[str],
    tile_mass: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """See ``dpo_kernels.linear_logps.ops``."""
    options = (softcap, logit_scale, temperature, ignore_index)
    # Leaving inference mode is what switches autograd back on inside an operator.
    with torch.inference_mode(False):
        hidden, weight, bias = leaf(hidden_TD, need_dx), leaf(weight_VD), None if bias_V is None else leaf(bias_V)
        logps_T, lse_T = logps(hidden, weight, leaf(labels_T), bias, *options)
        dx_TD = torch.autograd.grad(logps_T.sum(), hidden)[0] if need_dx else None
    stats_KT = mass_TC = None
    if stats or tile_mass:
        logits_TV = logits(hidden_TD, weight_VD, bias_V, softcap, logit_scale, temperature)
        if stats:
            stats_KT = token_stats(logits_TV, labels_T, ignore_index, stats)
        if tile_mass:
            p_TV = F.pad(logits_TV.softmax(dim=-1), (0, -logits_TV.shape[1] % COLUMNS))
            mass_TC = p_TV.unflatten(1, (-1, COLUMNS)).sum(dim=-1)
    return logps_T.detach(), lse_T.detach(), dx_TD, stats_KT, mass_TC


def backward(
    grad_logps_T: Tensor,
    hidden_TD: Tensor,
    weight_VD: Tensor,
    labels_T: Tensor,
    lse_T: Tensor,
    bias_V: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    temperature: float,
    ignore_index: int,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    weight_grad_VD: Tensor | None,
    tiles: Kept | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """See ``dpo_kernels.linear_logps.ops``."""
    options = (softcap, logit_scale, temperature, ignore_index)
    kept_TV = None if tiles is None else kept_elements(tiles, weight_VD.shape[0], FILTER_ROWS)
    with torch.inference_mode(False):
        if weight_grad_VD is not None:
            weight_VD = weight_VD.to(weight_grad_VD.dtype)
        hidden, weight = leaf(hidden_TD, need_hidden), leaf(weight_VD, need_weight)
        bias = None if bias_V is None else leaf(bias_V, need_bias)
        logps_T, _ = logps(hidden, weight, leaf(labels_T), bias, *options, None if kept_TV is None else leaf(kept_TV))
        dX_TD, dW_VD, db_V = gradients(logps_T, leaf(grad_logps_T), hidden, weight, bias)
        if dW_VD is not None and weight_grad_VD is not None:
            weight_grad_VD += dW_VD
            dW_VD = None
        return dX_TD, dW_VD, db_V


def leaf(tensor: Tensor, requires_grad: bool = False) -> Tensor:
    """A copy outside any graph. Copied, because a tensor made in inference mode cannot enter a graph."""
    return tensor.detach().clone().requires_grad_(requires_grad)


def gradients(
    output: Tensor, upstream: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of those that require one, None for the others."""
    inputs = [t for t in (hidden, weight, bias) if t is not None and t.requires_grad]
    found = iter(torch.autograd.grad(output, inputs, upstream) if inputs else ())
    dX, dW, db = (next(found) if t is not None and t.requires_grad else None for t in (hidden, weight, bias))
    return dX, dW, db
