"""What an implementation of ``linear_logps`` is: a module beside this one with the functions and names below.

Legend: T rows (tokens), D features, V vocabulary, K statistics, C column tiles of a filter.

``forward(hidden_TD, head, labels_T, *, ignore_index, want) -> Scores``
    Log-probs, z[label] - logsumexp(z), with the logits z that ``dpo_kernels.head.Head`` defines.
``backward(grad_logps_T, hidden_TD, head, labels_T, lse_T, *, ignore_index, needs) -> Gradients``
    Gradients in the dtypes of hidden, weight and bias, accumulated in float32 (float64) and rounded once. grad_logps_T
    is float32 (float64), contiguous, non-uniform, and may be anything on ignored rows, which contribute exactly 0.
    lse_T is that of forward, in float64. Of a slice of a larger vocabulary (not for ``reference``) lse_T is the whole
    one's, and -1 is a label elsewhere. What is not needed is not computed.
``forward_workspace(hidden_TD, weight_VD, need_dx) -> int``, ``backward_workspace(hidden_TD, weight_VD) -> int``
    Most bytes that are held beyond inputs and results, without statistics of tokens, from shapes and dtypes alone.
    Not for ``reference``.
``why_not(device, dtype) -> str | None``
    Where there is one: the reason this implementation cannot take such tensors, or None. Pure, and of no other
    argument: every shape must work.
``STATS``
    Names of the token statistics that it computes, where these are not all.
``FILTER_ROWS``
    Rows of the blocks in which it filters a backward. Without this name it has no filtered backward.

Both functions run below autograd and with autocast off, never see T == 0, and get: hidden_TD and weight_VD of one dtype
(float64 only for ``reference`` and ``torch``) with unit stride along D and any row stride; labels_T int64, contiguous,
each in [0, V) or equal to ignore_index; bias_V contiguous or None. They may not mutate an input, may not synchronise a
CUDA device, and give the same bits when run twice. Their results are tensors of their own.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Want(NamedTuple):
    """What forward gives beside log-probs and log-sum-exps."""

    dx: bool = False
    """The gradient of each log-prob, for a frozen head."""
    stats: tuple[str, ...] = ()
    """K names of ``dpo_kernels.linear_logps.stats``."""
    tile_mass: bool = False
    """What a filter decides by; never together with ``dx``."""


class Scores(NamedTuple):
    """What forward finds."""

    logps_T: Tensor
    """float32 (float64 for float64 inputs), exactly 0 on ignored rows. Logits reach the log-sum-exp in that precision,
    never rounded to 16 bits."""
    lse_T: Tensor
    """float32 or float64, any finite number on ignored rows. It is handed back as float64, because near 1e4 a float32
    is too coarse to give softmax = e^(z - lse) back."""
    dx_TD: Tensor | None = None
    """d logps_t / d hidden_t in the dtype of hidden, exactly 0 on ignored rows; later each row is scaled by the
    upstream gradient."""
    stats_KT: Tensor | None = None
    """In the dtype of logps_T and the order of the names, exactly 0 on ignored rows; None for no names."""
    mass_TC: Tensor | None = None
    """The softmax summed over tiles of ``tile_filter.COLUMNS`` columns, with or without the label's own, and anything
    on ignored rows."""
