"""Does the reference that was stored belong to the model that is about to train?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from engine.data.groups import PreferenceDataset
from engine.errors import UserError
from engine.packing import build_batch
from engine.reference.precompute import score, scoring

if TYPE_CHECKING:
    from engine.model.policy import Policy

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.5}
"""Largest difference of one token's log-prob, in nats, that another packing or backend may cause."""
_SMALLEST_SHARE = 0.1


def verify_rows(
    policy: Policy,
    dataset: PreferenceDataset,
    ref_logps: Sequence[Sequence[np.ndarray | float]],
    *,
    count: int = 4,
    atol: float | None = None,
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
        atol: largest allowed difference of one token, in nats; by default ``TOLERANCE`` of the compute dtype. The mean
            over a response of n tokens, or for sums the difference divided by n, may be 1 / sqrt(n) of it, but always
            a tenth: rounding has both signs and averages out, a wrong model does not.

    Raises:
        UserError: names the rows that differ, the largest difference, and what usually causes it.
    """
    atol = TOLERANCE[policy.compute_dtype] if atol is None else atol
    chosen = _sample(dataset.lengths.packed(share_prompts=True).tolist(), count)
    batches = (build_batch([dataset[i]], share_prompts=share_prompts) for i in chosen)
    wrong: list[tuple[int, float]] = []
    with scoring(policy):
        for index, (batch, logps_N) in zip(chosen, score(policy, batches), strict=True):
            live = np.split(logps_N, batch.cu_responses_S1[1:-1].tolist())
            pairs = list(zip(live, ref_logps[index], strict=True))
            # Written so that a comparison with NaN counts as different.
            if not all(_agree(a, b, atol) for a, b in pairs):
                wrong.append((dataset[index].row, max(_difference(a, b)[0] for a, b in pairs)))
    if wrong:
        rows = ", ".join(str(row) for row, _ in wrong)
        raise UserError(
            f"reference log-probs of row{'s' if len(wrong) > 1 else ''} {rows} differ from the model's by up to "
            f"{max(d for _, d in wrong):.3g} nats per token (checked {len(chosen)} rows, allowed {atol:g}): they were "
            "computed with other weights, another adapter, dtype, library version or attention backend; remove the "
            "reference columns if the data has them, else set reference.store to a new folder"
        )


def _sample(sizes: Sequence[int], count: int) -> list[int]:
    by_size = np.argsort(np.asarray(sizes), kind="stable")
    places = np.unique(np.linspace(0, len(sizes) - 1, min(count, len(sizes))).round().astype(np.int64))
    return by_size[places].tolist()


def _agree(live: np.ndarray, stored: np.ndarray | float, atol: float) -> bool:
    worst, mean = _difference(live, stored)
    return worst <= atol and mean <= atol * max(_SMALLEST_SHARE, len(live) ** -0.5)


def _difference(live: np.ndarray, stored: np.ndarray | float) -> tuple[float, float]:
    """(largest, mean) absolute difference per token; for a sum both are the difference spread over the tokens."""
    if np.ndim(stored) == 0:
        share = abs(float(live.sum(dtype=np.float64)) - float(stored)) / len(live)
        return share, share
    if np.shape(stored) != live.shape:
        return float("inf"), float("inf")
    distance = np.abs(live - stored)
    return float(distance.max()), float(distance.mean())
