"""Statistics of each token's distribution that trainers log, gathered slice by slice of the vocabulary.

Legend: T rows, K statistics, v columns of a slice. z are logits, p their softmax, m a row's maximum.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from dpo_kernels.chunks import accumulation_dtype
from dpo_kernels.linear_logps.tile_filter import FILTER_STATS

STATS = ("entropy", "is_top1", "mean_logits", "log_sum_sq_probs")


def check_stats(names: Iterable[str], known: Sequence[str] = STATS + FILTER_STATS) -> tuple[str, ...]:
    """The names as a tuple; ValueError for one that is not ``known`` or there twice."""
    found = tuple(names)
    unknown = [name for name in found if name not in known]
    if unknown:
        raise ValueError(f"stats must be among {', '.join(known)}; got {', '.join(map(str, unknown))}")
    if len(set(found)) < len(found):
        raise ValueError(f"stats must not repeat a name; got {', '.join(found)}")
    return found


class RunningStats:
    """What is carried from slice to slice beside the maximum and sum of exponentials of each row."""

    def __init__(self, names: Sequence[str], like_TD: Tensor):
        self.names = names
        T, dtype = like_TD.shape[0], accumulation_dtype(like_TD.dtype)
        self.top_T = like_TD.new_full((T,), torch.finfo(dtype).min, dtype=dtype)
        self.top_column_T = like_TD.new_zeros(T, dtype=torch.int64)
        self.logits_T, self.entropy_T, self.square_T = (like_TD.new_zeros(T, dtype=dtype) for _ in range(3))

    def part(self, rows: slice) -> RunningStats:
        """The same of some rows, in the same memory."""
        part = copy.copy(self)
        for name in ("top_T", "top_column_T", "logits_T", "entropy_T", "square_T"):
            setattr(part, name, getattr(self, name)[rows])
        return part

    def fold_logits(self, z: Tensor, rows: slice, first_column: int) -> None:
        """Take in a block of logits."""
        if "is_top1" in self.names:
            top, column = z.max(dim=1)
            larger = top > self.top_T[rows]
            self.top_T[rows] = torch.where(larger, top, self.top_T[rows])
            self.top_column_T[rows] = torch.where(larger, column + first_column, self.top_column_T[rows])
        if "mean_logits" in self.names:
            self.logits_T[rows] += z.sum(dim=1)

    def fold_exps(self, exps: Tensor, rows: slice, old_sum: Tensor, gap: Tensor) -> None:
        """Take in e^(z - m) of the same block.

        ``gap`` is what m has risen by, ``old_sum`` the sum of exponentials before, relative to the m before.
        """
        shrink = torch.exp(-gap)
        if "entropy" in self.names:
            # -sum e^(z-m) (z-m); a sum of 0 has nothing to move, and its gap may be infinite.
            moved = torch.where(old_sum > 0, gap * old_sum, 0)
            # Half the time of torch.special.entr; where e^(z-m) is 0 so is the product.
            logs = exps.clamp(min=torch.finfo(exps.dtype).tiny).log_()
            self.entropy_T[rows] = (self.entropy_T[rows] + moved) * shrink - logs.mul_(exps).sum(dim=1)
        if "log_sum_sq_probs" in self.names:
            self.square_T[rows] = self.square_T[rows] * shrink.square() + exps.square().sum(dim=1)

    def finish(self, sum_T: Tensor, labels_T: Tensor, num_classes: int) -> Tensor:
        """[K, T], in the order of the names; a hit is 1. ``sum_T`` is nan where a row has no softmax."""
        log_sum_T = sum_T.log()
        results = {
            "entropy": log_sum_T + self.entropy_T / sum_T,
            "is_top1": ((self.top_column_T == labels_T) & ~sum_T.isnan()).to(sum_T.dtype),
            "mean_logits": self.logits_T / num_classes,
            "log_sum_sq_probs": self.square_T.log() - 2 * log_sum_T,
        }
        return torch.stack([results[name] for name in self.names])
