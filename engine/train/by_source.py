"""Metrics of each set of a mixture, while training and of an evaluation.

Shape suffixes: M sets, P pairs or rankings, C columns: a count, and the sums of ``PREFERENCE_NAMES``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpo_kernels.chunks import to_device

from .. import distributed, mesh
from ..data.groups import PreferenceDataset
from ..run_folder import EVAL_SOURCE, TRAIN_SOURCE
from .metrics import PREFERENCE_NAMES
from .scored import Scored, means_of


class SourceMeter:
    """Sums over a logging interval for each set, on the device until a row is asked for.

    Args:
        names: of the sets; none where there is no mixture, and nothing is kept then.
        has_losses: whether a pair has a loss of its own, which losses that couple pairs do not give.
        unpaired: whether rows are each desirable or not.
    """

    def __init__(self, names: tuple[str, ...], device: torch.device, *, has_losses: bool, unpaired: bool = False):
        self.names = names
        self.unpaired = unpaired
        self.device = device
        self.has_losses = has_losses
        self._reset()

    def _reset(self) -> None:
        columns = 1 + len(PREFERENCE_NAMES) + self.unpaired
        self._sums_MC = torch.zeros(len(self.names), columns, dtype=torch.float64, device=self.device)

    def add(self, scored: Scored, sources_P: np.ndarray | None) -> None:
        """Count what this process did of a step.

        Args:
            sources_P: ``TrainingStep.sources``.
        """
        if sources_P is not None:
            self._sums_MC += sums_by_source(scored, sources_P, len(self.names))

    def row(self) -> dict[str, float]:
        """The metrics of the interval, of all processes; the next one starts. Waits for the device."""
        if not self.names:
            return {}
        sums_MC = mesh.sum_over_packs(self._sums_MC).cpu()
        self._reset()
        return _means(TRAIN_SOURCE, self.names, sums_MC, self.has_losses)

    def state(self) -> list[list[float]]:
        """What a checkpoint needs, of all processes."""
        return mesh.sum_over_packs(self._sums_MC).tolist() if self.names else []

    def load(self, sums: list[list[float]]) -> None:
        self._reset()
        if sums and distributed.is_main():
            self._sums_MC += torch.tensor(sums, dtype=torch.float64).to(self.device)


def sums_by_source(scored: Scored, sources_P: np.ndarray, sets: int) -> Tensor:
    """float64 [M, C]: how many pairs of each set there are, and the sums of their metrics."""
    is_of_MP = to_device(torch.from_numpy(np.arange(sets)[:, None] == sources_P), scored.device)
    values_CP = scored.columns()
    values_CP = torch.cat([torch.ones_like(values_CP[:1]), values_CP])
    # Zero times not-a-number is not zero: values of other sets are left out, not multiplied.
    return torch.stack([torch.where(of_set_P, values_CP, 0.0).sum(1) for of_set_P in is_of_MP])


def evaluation_by_source(
    dataset: PreferenceDataset, scored: Scored, ranked_G: Tensor | None, *, has_losses: bool
) -> dict[str, float]:
    """The metrics of each set of an evaluation; nothing where there is one set.

    Args:
        scored: the whole dataset, in its order.
        ranked_G: whether the best response of each group has the highest log-prob; None of unpaired rows.
    """
    names = dataset.source_names
    if not names:
        return {}
    sums_MC = sums_by_source(scored, dataset.sources.repeat(dataset.terms), len(names)).cpu()
    values = _means(EVAL_SOURCE, names, sums_MC, has_losses)
    if ranked_G is None:
        return values
    for place, name in enumerate(names):
        of_set = torch.from_numpy(dataset.sources == place)
        values[f"{EVAL_SOURCE}{name}/ranking_accuracy"] = ranked_G[of_set].double().mean().item()
    return values


def _means(prefix: str, names: tuple[str, ...], sums_MC: Tensor, has_losses: bool) -> dict[str, float]:
    values: dict[str, float] = {}
    # Not a number where a set has no row.
    means_MK = means_of(sums_MC[:, 1:], sums_MC[:, 0])
    for name, (count, *sums), means in zip(names, sums_MC.tolist(), means_MK.tolist(), strict=True):
        values[f"{prefix}{name}/num_pairs"] = count
        if len(sums) > len(PREFERENCE_NAMES):
            values |= {f"{prefix}{name}/count/chosen": sums[-1], f"{prefix}{name}/count/rejected": count - sums[-1]}
        for metric, value in zip(PREFERENCE_NAMES, means, strict=True):
            if not math.isnan(value) and (has_losses or metric != "loss"):
                values[f"{prefix}{name}/{metric}"] = value
    return values


def without_sources(values: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics of all sets together."""
    return {name: value for name, value in values.items() if not name.startswith((TRAIN_SOURCE, EVAL_SOURCE))}
