"""``linear_logps`` with all logits at once, in plain torch: slow, obvious, and the definition of what is right.

The gradient is autograd's of the forward below, not a formula of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_kernels.head import Gradients, Head, Needs
from dpo_kernels.linear_logps.interface import Scores, Want
from dpo_kernels.linear_logps.tile_filter import COLUMNS, kept_elements

FILTER_ROWS = 128
"""See ``dpo_kernels.linear_logps.interface``."""


def logits(hidden_TD: Tensor, head: Head) -> Tensor:
    """logits_TV, differentiable; float64 for float64 inputs, else float32."""
    dtype = torch.promote_types(hidden_TD.dtype, torch.float32)
    logits_TV = hidden_TD.to(dtype) @ head.weight_VD.to(dtype).T
    if head.bias_V is not None:
        logits_TV = logits_TV + head.bias_V.to(dtype)
    logits_TV = logits_TV * head.logit_scale
    if head.softcap is not None:
        logits_TV = head.softcap * torch.tanh(logits_TV / head.softcap)
    return logits_TV / head.temperature


def logps(
    hidden_TD: Tensor, head: Head, labels_T: Tensor, ignore_index: int = -100, kept_TV: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(logps_T, lse_T), differentiable; float64 for float64 inputs, else float32.

    Where kept_TV is False a logit has its value and no gradient: what a filtered backward leaves out.
    """
    logits_TV = logits(hidden_TD, head)
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


def forward(hidden_TD: Tensor, head: Head, labels_T: Tensor, *, ignore_index: int, want: Want) -> Scores:
    """See ``dpo_kernels.linear_logps.interface``."""
    # Leaving inference mode is what switches autograd back on inside an operator.
    with torch.inference_mode(False):
        hidden = leaf(hidden_TD, want.dx)
        logps_T, lse_T = logps(hidden, leaf_head(head), leaf(labels_T), ignore_index)
        dx_TD = torch.autograd.grad(logps_T.sum(), hidden)[0] if want.dx else None
    stats_KT = mass_TC = None
    if want.stats or want.tile_mass:
        logits_TV = logits(hidden_TD, head)
        if want.stats:
            stats_KT = token_stats(logits_TV, labels_T, ignore_index, want.stats)
        if want.tile_mass:
            p_TV = F.pad(logits_TV.softmax(dim=-1), (0, -logits_TV.shape[1] % COLUMNS))
            mass_TC = p_TV.unflatten(1, (-1, COLUMNS)).sum(dim=-1)
    return Scores(logps_T.detach(), lse_T.detach(), dx_TD, stats_KT, mass_TC)


def backward(
    grad_logps_T: Tensor,
    hidden_TD: Tensor,
    head: Head,
    labels_T: Tensor,
    lse_T: Tensor,
    *,
    ignore_index: int,
    needs: Needs,
) -> Gradients:
    """See ``dpo_kernels.linear_logps.interface``."""
    kept_TV = None if needs.tiles is None else kept_elements(needs.tiles, head.weight_VD.shape[0], FILTER_ROWS)
    with torch.inference_mode(False):
        if needs.weight_grad_VD is not None:
            head = head._replace(weight_VD=head.weight_VD.to(needs.weight_grad_VD.dtype))
        hidden, head = leaf(hidden_TD, needs.hidden), leaf_head(head, needs)
        kept_TV = None if kept_TV is None else leaf(kept_TV)
        logps_T, _ = logps(hidden, head, leaf(labels_T), ignore_index, kept_TV)
        found = gradients(logps_T, leaf(grad_logps_T), hidden, head)
        if found.dW_VD is not None and needs.weight_grad_VD is not None:
            needs.weight_grad_VD.add_(found.dW_VD)
            found = found._replace(dW_VD=None)
        return found


def leaf(tensor: Tensor, requires_grad: bool = False) -> Tensor:
    """A copy outside any graph. Copied, because a tensor made in inference mode cannot enter a graph."""
    return tensor.detach().clone().requires_grad_(requires_grad)


def leaf_head(head: Head, needs: Needs | None = None) -> Head:
    """The head on copies outside any graph, of which those require a gradient that need one."""
    weight, bias = (False, False) if needs is None else (needs.weight, needs.bias)
    bias_V = None if head.bias_V is None else leaf(head.bias_V, bias)
    return head._replace(weight_VD=leaf(head.weight_VD, weight), bias_V=bias_V)


def gradients(output: Tensor, upstream: Tensor, hidden: Tensor, head: Head) -> Gradients:
    """Gradients of those that require one, None for the others."""
    leaves = (hidden, head.weight_VD, head.bias_V)
    inputs = [t for t in leaves if t is not None and t.requires_grad]
    found = iter(torch.autograd.grad(output, inputs, upstream) if inputs else ())
    return Gradients(*(next(found) if t is not None and t.requires_grad else None for t in leaves))
