"""What an implementation of ``linear_dpo_loss`` is: a module beside this one with the functions and names below.

Legend: T rows (tokens), D features, V vocabulary, K statistics, P pairs, S = 2 P responses: chosen_0, rejected_0, ...

``forward(hidden_TD, head, labels_T, scorer, *, ignore_index, want) -> PairLosses``
    The losses of the pairs and the gradients of the reduced loss. A row's gradient is slope[response of the row]
    * d logps_t, times its weight where tokens have weights. Ignored rows add 0 to their response and get gradient
    exactly 0. Conventions for tensors are those of ``dpo_kernels.linear_logps.interface`` (below autograd, autocast
    off, T > 0, unit stride along D, valid int64 labels, no mutation, no synchronisation of a CUDA device, same bits
    when run twice).
``forward_workspace(hidden_TD, weight_VD, cu_responses, need_weight) -> int``
    As in ``dpo_kernels.linear_logps.interface``; ``cu_responses`` as in ``PairScorer.offsets``.
``why_not(device, dtype) -> str | None``, ``STATS``
    As in ``dpo_kernels.linear_logps.interface``.
``LOSSES``
    Names of the losses that it computes, where these are not the whole table.
``scale_(values, factor)``
    Where there is one: ``values *= factor`` in place, one of its gradients times one number of the same device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dpo_kernels.head import Gradients, Needs
from dpo_kernels.losses import LossMix
from dpo_kernels.pairs import LossOptions, Pairs


class Want(NamedTuple):
    """What forward gives beside the losses."""

    gradients: Needs
    stats: tuple[str, ...] = ()
    """K names of ``dpo_kernels.linear_logps.stats``."""


class PairLosses(NamedTuple):
    """What forward finds; losses and log-probs in float32 (float64 for float64 inputs)."""

    losses_P: Tensor
    logps_S: Tensor
    gradients: Gradients
    """For an upstream gradient of 1, in the dtypes of hidden, weight and bias, but float32 for float16
    (``early_gradient_dtype``); each is a tensor that nothing else refers to."""
    stats_KT: Tensor | None = None
    """As in ``dpo_kernels.linear_logps.interface``."""


class PairScorer(NamedTuple):
    """The pairs of a call, and what their loss is made from: tensors of all responses, or all pairs, of the call."""

    mix: LossMix
    options: LossOptions
    offsets: list[int]
    """S + 1 Python ints, S > 0: where responses begin among the rows, from 0 to T, not decreasing; responses may be
    empty."""
    cu_S1: Tensor
    """The same on the device of hidden, int64."""
    ref_logps_S: Tensor | None
    lengths_S: Tensor | None
    mean_length: Tensor | None
    """One number: tokens per chosen response."""
    scale_P: Tensor
    """d (reduced loss) / d (loss of a pair): pair weights and the divisor of the mean."""
    margins_P: Tensor | None = None
    token_weights_T: Tensor | None = None
    """float32 (float64) [T], contiguous: the log-prob of a response is the sum of those of its tokens times these, and
    a row's gradient has this factor, too. Never there with a loss that has a likelihood term."""

    def score(self, logps_S: Tensor, first_pair: int = 0) -> tuple[Tensor, Tensor]:
        """Losses of consecutive pairs and the slopes of the reduced loss, by autograd on tensors of few numbers.

        This defines the loss. It launches a few tiny torch kernels and never synchronises. Every pair of a call must be
        scored exactly once.

        Args:
            logps_S: [2 p], log-prob sums of whole pairs from ``first_pair`` on; float32 (float64), contiguous, on the
                device of hidden.

        Returns:
            [p], and d (reduced loss) / d logps, [2 p].
        """
        responses = slice(2 * first_pair, 2 * first_pair + logps_S.shape[0])

        first, last = responses.start // 2, responses.stop // 2

        def part(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[responses].clone()

        # Leaving inference mode is what switches autograd back on inside an operator.
        with torch.inference_mode(False):
            leaf_S = logps_S.detach().clone().requires_grad_()
            margins_P = None if self.margins_P is None else self.margins_P[first:last].clone()
            given = (part(self.ref_logps_S), part(self.lengths_S), self.mean_length, self.options, margins_P)
            losses_P = self.mix.losses(make_pairs(leaf_S, *given))
            scale_P = self.scale_P[first:last].clone()
            (slopes_S,) = torch.autograd.grad((losses_P * scale_P).sum(), leaf_S)
        return losses_P.detach(), slopes_S


def make_pairs(
    logps_S: Tensor,
    ref_logps_S: Tensor | None,
    lengths_S: Tensor | None,
    mean_length: Tensor | float | None,
    options: LossOptions,
    margins_P: Tensor | None = None,
    unweighted_chosen_P: Tensor | None = None,
) -> Pairs:
    """The loss table's view of interleaved responses."""

    def side(values: Tensor | None, start: int) -> Tensor | None:
        return None if values is None else values[start::2]

    return Pairs(
        logps_S[0::2],
        logps_S[1::2],
        side(ref_logps_S, 0),
        side(ref_logps_S, 1),
        side(lengths_S, 0),
        side(lengths_S, 1),
        mean_length,
        options,
        margins_P,
        unweighted_chosen_P,
    )
