"""Inputs of the filtered backward, and one call of it with its report and gradients."""

from __future__ import annotations

import torch

from dpo_kernels import linear_logps
from dpo_kernels.linear_logps import reference, torch_chunks
from dpo_kernels.linear_logps.tile_filter import FILTER_STATS

MODULES = {"torch": torch_chunks, "reference": reference}
IMPLS = tuple(MODULES)
IGNORED = -100
ALL_OPTIONS = {"softcap": 30.0, "logit_scale": 0.9, "temperature": 1.1}


def peaked(T: int = 150, D: int = 24, V: int = 900, dtype: torch.dtype = torch.float64, ignored: bool = True):
    """hidden, weight, labels, bias; rows from nearly certain of their label to undecided between many tokens."""
    weight = torch.randn(V, D, dtype=torch.float64)
    labels = torch.randint(0, V, (T,))
    certainty = torch.linspace(0.2, 1.5, T, dtype=torch.float64)[torch.randperm(T)]
    hidden = certainty[:, None] * weight[labels] + 0.2 * torch.randn(T, D, dtype=torch.float64)
    wrong = torch.arange(T) % 11 == 3
    labels[wrong] = torch.randint(0, V, (int(wrong.sum()),))
    if ignored:
        labels[torch.arange(T) % 7 == 2] = IGNORED
    return hidden.to(dtype), weight.to(dtype), labels, torch.randn(V, dtype=torch.float64).to(dtype)


def run(hidden, weight, labels, bias=None, upstream=None, **options):
    """(outcome with the filter's report, [dX, dW, db])."""
    leaves = [t.detach().clone().requires_grad_() for t in (hidden, weight, bias) if t is not None]
    names = FILTER_STATS if options.get("filter_mass") is not None else ()
    bias = leaves[2] if bias is not None else None
    out = linear_logps(leaves[0], leaves[1], labels, bias=bias, stats=names, **options)
    upstream = torch.ones_like(out.logps) if upstream is None else upstream.to(out.logps.dtype)
    return out, list(torch.autograd.grad(out.logps, leaves, upstream))
