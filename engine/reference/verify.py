"""Does the reference that was stored belong to the model that is about to train?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .. import distributed
from ..data.groups import PreferenceDataset
from ..errors import UserError
from ..model.policy import Policy
from ..model.precision import TOKEN_TOLERANCE
from ..packing import PackedBatch, build_batch
from .precompute import score, scoring

_SMALLEST_SHARE = 0.1
REWARD = 0.01
"""Largest difference of a response, in reward: beta times that of its log-prob. Twenty steps of training cause more."""
_ROUNDINGS = 2.0
"""Where a model rounds by more than that between layouts of the same rows, how many times as much may be."""


def verify_rows(
    policy: Policy,
    dataset: PreferenceDataset,
    ref_logps: Sequence[Sequence[np.ndarray | float]],
    *,
    count: int = 4,
    atol: float | None = None,
    beta: float = 0.1,
    share_prompts: bool = True,
) -> None:
    """Recompute a few rows with the live policy in reference mode and compare.

    The shortest, the longest and rows evenly between are taken, the same ones every time.

    Args:
        policy: before its first optimizer step.
        dataset: the rows.
        ref_logps: per group, per response: float32 [R] per token (``load_ref_logps``), or the sum (``load_ref_sums``,
            ``import_columns``).
        count: number of rows.
        atol: largest allowed difference of one token, in nats; by default ``TOKEN_TOLERANCE`` of the compute dtype. The
            mean over a response of n tokens, or for sums the difference divided by n, may be 1 / sqrt(n) of it, but
            always a tenth: rounding has both signs and averages out, a wrong model does not.
        beta: of the loss. Every response may differ by ``REWARD`` at most; a model whose own rounding between two
            layouts of these rows is larger, as in bfloat16 on some devices, by ``_ROUNDINGS`` times that.

    Raises:
        UserError: names the rows that differ, the largest difference, and what usually causes it.
    """
    atol = TOKEN_TOLERANCE[policy.compute_dtype] if atol is None else atol
    share_prompts = share_prompts and not policy.layout.in_rows
    chosen = _sample(dataset.lengths.packed(share_prompts=True).tolist(), count)
    batches = (build_batch([dataset[i].whole], share_prompts=share_prompts) for i in chosen)
    with scoring(policy):
        live = [_parts(batch, logps_N) for batch, logps_N in score(policy, batches)]
    pairs = [list(zip(parts, ref_logps[index], strict=True)) for index, parts in zip(chosen, live, strict=True)]
    rewards = [max(beta * _sum_difference(a, b) for a, b in row) for row in pairs]
    allowed = reward_bound(policy, dataset, chosen, max(rewards), beta=beta, share_prompts=share_prompts)
    # Written so that a comparison with NaN counts as different.
    wrong = [
        i for i, row in enumerate(pairs) if not (all(_agree(a, b, atol) for a, b in row) and rewards[i] <= allowed)
    ]
    if wrong:
        rows = ", ".join(str(dataset[chosen[i]].label) for i in wrong)
        worst = max(_difference(a, b)[0] for i in wrong for a, b in pairs[i])
        raise UserError(
            f"reference log-probs of row{'s' if len(wrong) > 1 else ''} {rows} differ from the model's by up to "
            f"{worst:.3g} nats per token (checked {len(chosen)} rows, allowed {atol:g}) and "
            f"{max(rewards[i] for i in wrong):.3g} of reward at beta {beta:g} (allowed {allowed:.3g}): they were "
            "computed with other weights, another adapter, dtype, library version or attention backend; remove the "
            "reference columns if the data has them, else set reference.store to a new folder"
        )


def reward_bound(
    policy: Policy, dataset: PreferenceDataset, rows: Sequence[int], found: float, *, beta: float, share_prompts: bool
) -> float:
    """What a difference of rewards may be: ``REWARD``, and more only where the policy itself rounds by more.

    Args:
        rows: places in ``dataset`` of what was compared.
        found: the largest difference; the same rows are computed in other layouts only if it is more than ``REWARD``.
    """
    # Asked of all: the forward passes of a sharded policy are joint.
    if not any(distributed.gather(not found <= REWARD)):
        return REWARD
    layouts = [[([i], share_prompts) for i in rows], [([i, rows[0]], share_prompts) for i in rows]]
    if share_prompts:
        layouts.append([([i], False) for i in rows])
    sums = []
    with scoring(policy):
        for layout in layouts:
            batches = (
                build_batch([dataset[i].whole for i in members], share_prompts=share) for members, share in layout
            )
            first = zip(rows, score(policy, batches), strict=True)
            sums.append(
                [
                    float(part.sum(dtype=np.float64))
                    for i, (batch, logps_N) in first
                    for part in _parts(batch, logps_N)[: len(dataset[i].response_ids)]
                ]
            )
    return max(REWARD, _ROUNDINGS * beta * float(np.ptp(np.array(sums), axis=0).max()))


def _parts(batch: PackedBatch, logps_N: np.ndarray) -> list[np.ndarray]:
    return np.split(logps_N, batch.cu_responses_S1[1:-1].tolist())


def _sample(sizes: Sequence[int], count: int) -> list[int]:
    by_size = np.argsort(np.asarray(sizes), kind="stable")
    places = np.unique(np.linspace(0, len(sizes) - 1, min(count, len(sizes))).round().astype(np.int64))
    return by_size[places].tolist()


def _agree(live: np.ndarray, stored: np.ndarray | float, atol: float) -> bool:
    worst, mean = _difference(live, stored)
    return worst <= atol and mean <= atol * max(_SMALLEST_SHARE, len(live) ** -0.5)


def _sum_difference(live: np.ndarray, stored: np.ndarray | float) -> float:
    return abs(float(live.sum(dtype=np.float64)) - float(np.sum(stored, dtype=np.float64)))


def _difference(live: np.ndarray, stored: np.ndarray | float) -> tuple[float, float]:
    """(largest, mean) absolute difference per token; for a sum both are the difference spread over the tokens."""
    if np.ndim(stored) == 0:
        share = abs(float(live.sum(dtype=np.float64)) - float(stored)) / len(live)
        return share, share
    if np.shape(stored) != live.shape:
        return float("inf"), float("inf")
    distance = np.abs(live - stored)
    return float(distance.max()), float(distance.mean())
