"""Cases of ``linear_dpo_loss``, and the plain composition that each is compared with."""

from __future__ import annotations

import itertools

import torch

from dpo_kernels import LOSS_TYPES, preference_loss
from dpo_kernels.head import Head
from dpo_kernels.linear_logps.reference import logps as reference_logps

IMPLS = ("torch", "reference")
LOSSES = [*LOSS_TYPES, ("sigmoid", "sft", "bco_pair")]


class Case:
    """Inputs of one call, on fresh leaves each time they are asked for."""

    def __init__(self, lengths, D: int = 5, V: int = 23, dtype: torch.dtype = torch.float64, ignored: bool = True):
        T, S = sum(lengths), len(lengths)
        self.hidden = torch.randn(T, D, dtype=torch.float64).to(dtype)
        self.weight = torch.randn(V, D, dtype=torch.float64).to(dtype)
        self.bias = torch.randn(V, dtype=torch.float64).to(dtype)
        self.labels = torch.randint(0, V, (T,))
        if ignored:
            self.labels[torch.rand(T) < 0.15] = -100
        self.cu = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
        wide = torch.promote_types(dtype, torch.float32)
        self.ref = -3 * torch.rand(S, dtype=wide)
        self.pair_weights = torch.rand(S // 2, dtype=wide)
        self.margins = torch.rand(S // 2, dtype=wide)
        self.token_weights = 2 * torch.rand(T, dtype=wide)

    def leaves(self, dtype: torch.dtype | None = None, trained=(1, 1, 1)) -> list[torch.Tensor]:
        tensors = (self.hidden, self.weight, self.bias)
        copies = [t.detach().clone().to(dtype or t.dtype) for t in tensors]
        return [t.requires_grad_(bool(need)) for t, need in zip(copies, trained, strict=True)]


def compose(
    case: Case, leaves, *, loss_type, reduction="mean", pair_weights=None, token_weights=None, softcap=None, **options
):
    """Log-probs, sums, ``preference_loss``, reduction: one plain step after another."""
    hidden, weight, bias = leaves
    logps_T, _ = reference_logps(hidden, Head(weight, bias, softcap), case.labels)
    bounds = list(itertools.pairwise(case.cu.tolist()))
    weights = 1 if token_weights is None else token_weights.to(logps_T.dtype)
    sums, likelihood = (
        torch.stack([values[a:b].sum() for a, b in bounds]) if bounds else values
        for values in (logps_T * weights, logps_T)
    )
    if options.get("margins") is not None:
        options["margins"] = options["margins"].to(sums.dtype)
    lengths = torch.tensor([int((case.labels[a:b] != -100).sum()) for a, b in bounds], dtype=torch.int64)
    ref = case.ref.to(sums.dtype)
    out = preference_loss(
        sums[0::2],
        sums[1::2],
        ref[0::2],
        ref[1::2],
        loss_type=loss_type,
        chosen_lengths=lengths[0::2],
        rejected_lengths=lengths[1::2],
        unweighted_chosen_logps=likelihood[0::2],
        **options,
    )
    loss = out.loss if pair_weights is None else out.loss * pair_weights.to(sums.dtype)
    if reduction != "none":
        loss = loss.sum() / (max(1, len(bounds) // 2) if reduction == "mean" else 1)
    return loss, out.loss, sums, out.chosen_rewards, out.rejected_rewards


def results(outputs, leaves, upstream) -> list[torch.Tensor]:
    """Outputs, then gradients of the leaves that require one."""
    trained = [t for t in leaves if t.requires_grad]
    gradients = torch.autograd.grad(outputs[0], trained, upstream, materialize_grads=True)
    return [t.detach() for t in outputs] + list(gradients)


def upstream_of(case: Case, reduction: str) -> torch.Tensor:
    pairs = case.pair_weights.shape[0]
    return torch.randn(pairs if reduction == "none" else (), dtype=case.ref.dtype)
