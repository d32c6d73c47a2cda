"""Liger's fused DPO loss on this package's op: the same call, the same tuple back.

Legend: B sequences of L tokens, chosen ones first; P = B / 2 pairs, T tokens that count, D features, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dpo_kernels.chunks import to_device
from dpo_kernels.head import Head
from dpo_kernels.integrations.versions import require_series
from dpo_kernels.linear_dpo.api import linear_dpo_loss
from dpo_kernels.linear_dpo.ops import response_sums
from dpo_kernels.linear_logps.api import linear_logps
from dpo_kernels.pairs import LossOptions, check_options
from dpo_kernels.preference import preference_loss

LOSS_TYPES = (
    "sigmoid",
    "hinge",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "apo_zero",
    "apo_down",
    "discopop",
)


class FusedLinearDPOLoss(nn.Module):
    """Stands in for ``LigerFusedLinearDPOLoss`` of liger-kernel 0.8, which need not be installed.

    Only tokens that count meet the head, logits and gradients are accumulated in float32, and a gradient that arrives
    from above the loss is exact whatever it is. Work, in products of 2 T D V operations: 3 for loss and gradients with
    a trainable head, 2 with a frozen one, 1 without gradients (4, 2 and 1 with ``average_log_prob``), and 1 for a
    reference model.

    Args:
        ignore_index: label of the tokens that do not count.
        beta: strength of the pull to the reference.
        alpha: weight of the language-model term, read with ``compute_nll_loss``.
        compute_nll_loss: add alpha times the mean token loss of all chosen tokens.
        compiled, chunk_size: accepted, without effect: they tune Liger's own implementation and change no number.
        use_ref_model: subtract reference log-probs; without it they are 0 and the ``ref_`` inputs are not read.
        average_log_prob: log-probs per token instead of per sequence. A sequence without tokens gives 0, where Liger
            gives nan.
        loss_type: one of ``LOSS_TYPES``.
        label_smoothing: read by "exo_pair", where it must be positive, and by "robust".
        discopop_tau: temperature of "discopop".

    Raises:
        ValueError: an unknown loss, numbers out of range; label smoothing with "sigmoid", which Liger ignores.
        ImportError: a liger-kernel of another series is installed, whose meaning of the arguments may differ.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        compute_nll_loss: bool = False,
        compiled: bool = True,
        use_ref_model: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
        loss_type: str = "sigmoid",
        label_smoothing: float = 0.0,
        discopop_tau: float = 0.05,
    ):
        super().__init__()
        require_series("liger-kernel", "0.8", __name__, optional=True)
        if loss_type not in LOSS_TYPES:
            raise ValueError(f"loss_type must be one of {', '.join(LOSS_TYPES)}; got {loss_type!r}")
        check_options(LossOptions(beta=beta, label_smoothing=label_smoothing, discopop_tau=discopop_tau))
        if loss_type == "exo_pair" and label_smoothing == 0:
            raise ValueError("loss_type 'exo_pair' needs a positive label_smoothing, 1e-3 in its paper; got 0")
        if loss_type == "sigmoid" and label_smoothing != 0:
            raise ValueError(
                f"label_smoothing must be 0 with loss_type 'sigmoid', as Liger ignores it there; got {label_smoothing} "
                "(for conservative DPO use dpo_kernels.linear_dpo_loss)"
            )
        self.ignore_index = ignore_index
        self.beta = beta
        self.alpha = alpha
        self.compute_nll_loss = compute_nll_loss
        self.compiled = compiled
        self.use_ref_model = use_ref_model
        self.average_log_prob = average_log_prob
        self.chunk_size = chunk_size
        self.loss_type = loss_type
        self.label_smoothing = label_smoothing
        self.discopop_tau = discopop_tau

    def forward(
        self,
        lin_weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Loss of the pairs (row i, row i + P).

        Args:
            lin_weight: [V, D].
            _input: [B, L, D], hidden states, each already in the row of the label that it predicts.
            target: [B, L], int64, in [0, V) or ``ignore_index``.
            bias: [V] or None.
            ref_input, ref_weight, ref_bias: the same of the reference, [B, L, E], [V, E], [V] or None.

        Returns:
            ``(loss, (chosen_logps, rejected_logps, chosen_logits_mean, rejected_logits_mean, nll_loss, chosen_rewards,
            rejected_rewards))``: loss and nll_loss are scalars, the means are over every token of the batch, counted or
            not, and the vocabulary, the others are [P]. Only the loss carries gradients, to ``_input``, ``lin_weight``
            and ``bias``.

        Raises:
            ValueError: shapes that do not fit, an odd batch, a missing reference.
        """
        if self.use_ref_model and (ref_input is None or ref_weight is None):
            raise ValueError("use_ref_model=True needs ref_input and ref_weight; got None")
        rows_T, cu_responses = self._layout(_input, target)
        labels_T = target.reshape(-1).index_select(0, rows_T)
        hidden_TD = _rows(_input, rows_T)
        ref_logps_S = hidden_TD.new_zeros(target.shape[0])
        if self.use_ref_model:
            assert ref_input is not None
            with torch.no_grad():
                ref_logps_S = self._logps(_rows(ref_input, rows_T), ref_weight, labels_T, cu_responses, ref_bias)

        if self.average_log_prob:
            loss, chosen, rejected, nll, rewards = self._averaged_loss(
                hidden_TD, lin_weight, labels_T, cu_responses, ref_logps_S, bias
            )
        else:
            loss, chosen, rejected, nll, rewards = self._summed_loss(
                hidden_TD, lin_weight, labels_T, cu_responses, ref_logps_S, bias
            )
        return loss, (chosen, rejected, *_mean_logits(_input, lin_weight, bias), nll, *rewards)

    def _layout(self, _input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of the tokens that count, in order chosen_0, rejected_0, chosen_1, ..., and their offsets on the CPU."""
        if _input.ndim != 3 or target.shape != _input.shape[:2]:
            raise ValueError(
                "_input must have shape [sequences, tokens, features] and target its first two; "
                f"got {list(_input.shape)} and {list(target.shape)}"
            )
        B, L = target.shape
        if B % 2:
            raise ValueError(f"the batch must hold chosen sequences, then as many rejected ones; got {B} sequences")
        order_B = torch.arange(B, device=target.device).view(2, B // 2).T.reshape(B)
        sequence_T, token_T = (target[order_B] != self.ignore_index).nonzero(as_tuple=True)
        lengths_B = torch.bincount(sequence_T, minlength=B).cpu()
        cu_responses = torch.cat((lengths_B.new_zeros(1), lengths_B.cumsum(0)))
        return order_B[sequence_T] * L + token_T, cu_responses

    def _options(self) -> dict[str, Any]:
        return {"beta": self.beta, "label_smoothing": self.label_smoothing, "discopop_tau": self.discopop_tau}

    def _logps(self, hidden_TD, weight, labels_T, cu_responses, bias) -> Tensor:
        """[S], per sequence or per token."""
        logps_S = response_sums(
            linear_logps(hidden_TD, weight, labels_T, bias=bias, ignore_index=self.ignore_index), cu_responses
        )
        if not self.average_log_prob:
            return logps_S
        return logps_S / to_device(cu_responses.diff().clamp(min=1), logps_S.device)

    def _summed_loss(self, hidden_TD, weight, labels_T, cu_responses, ref_logps_S, bias):
        # The mean of the loss "sft" over pairs is the mean token loss of all chosen tokens.
        terms = {self.loss_type: 1.0} | ({"sft": self.alpha} if self.compute_nll_loss else {})
        out = linear_dpo_loss(
            hidden_TD,
            weight,
            labels_T,
            cu_responses,
            ref_logps_S,
            loss_type=tuple(terms),
            loss_weights=tuple(terms.values()),
            bias=bias,
            ignore_index=self.ignore_index,
            **self._options(),
        )
        chosen, rejected = out.logps[0::2], out.logps[1::2]
        nll = self._nll(chosen, cu_responses)
        return out.loss, chosen, rejected, nll, (out.chosen_rewards, out.rejected_rewards)

    def _averaged_loss(self, hidden_TD, weight, labels_T, cu_responses, ref_logps_S, bias):
        logps_S = self._logps(hidden_TD, weight, labels_T, cu_responses, bias)
        chosen, rejected = logps_S[0::2], logps_S[1::2]
        out = preference_loss(
            chosen, rejected, ref_logps_S[0::2], ref_logps_S[1::2], loss_type=self.loss_type, **self._options()
        )
        lengths_P = to_device(cu_responses.diff()[0::2], chosen.device)
        nll = self._nll(chosen * lengths_P, cu_responses)
        loss = out.loss.mean() + self.alpha * nll if self.compute_nll_loss else out.loss.mean()
        rewards = (out.chosen_rewards, out.rejected_rewards)
        return loss, chosen.detach(), rejected.detach(), nll.detach(), rewards

    def _nll(self, chosen_sums_P: Tensor, cu_responses: Tensor) -> Tensor:
        if not self.compute_nll_loss:
            return chosen_sums_P.new_zeros(())
        return -chosen_sums_P.sum() / int(cu_responses.diff()[0::2].sum().clamp(min=1))


def _rows(hidden_BLD: Tensor, rows_T: Tensor) -> Tensor:
    return hidden_BLD.reshape(-1, hidden_BLD.shape[-1]).index_select(0, rows_T)


@torch.no_grad()
def _mean_logits(hidden_BLD: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean of x W^T + b over each half of the batch and the vocabulary. Means commute with products: none is needed."""
    hidden, head = Head(weight_VD, bias_V).autocast(hidden_BLD)
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    mean_D = head.weight_VD.mean(0, dtype=dtype)
    shift = 0 if head.bias_V is None else head.bias_V.mean(dtype=dtype)
    chosen, rejected = (torch.dot(half.mean((0, 1), dtype=dtype), mean_D) + shift for half in hidden.chunk(2))
    return chosen, rejected
