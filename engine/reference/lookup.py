"""Stored log-probs in the order of a dataset."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..data.groups import PreferenceDataset
from ..errors import UserError
from ..paths import cache_folder
from .keys import dataset_keys
from .store import ReferenceStore

GROUPS_AT_ONCE = 65_536
"""Groups whose single log-probs are held: some hundred megabytes, so that few passes over the shards are made."""


def default_store_path() -> Path:
    """``reference`` in the cache folder.

    Raises:
        UserError: there is none, since the user has no home.
    """
    return cache_folder("reference", "reference.store")


def load_ref_logps(dataset: PreferenceDataset, store: ReferenceStore, digest: str) -> list[tuple[np.ndarray, ...]]:
    """Per group, per response: float32 [R], one log-prob per completion token.

    Raises:
        UserError: a response is not stored (names the row and the command that computes it), or a shard is damaged.
    """
    keys = dataset_keys(dataset, digest)
    values = store.get([key for group in keys for key in group])
    _require_all(dataset, keys, values, store)
    return [tuple(values[key] for key in group) for group in keys]


def load_ref_sums(dataset: PreferenceDataset, store: ReferenceStore, digest: str) -> list[tuple[float, ...]]:
    """Per group, per response: the sum of its log-probs in float64, all alike. Holds the values of one shard at a time.

    Raises:
        UserError: as ``load_ref_logps``.
    """
    keys = dataset_keys(dataset, digest)
    sums = store.sums([key for group in keys for key in group])
    _require_all(dataset, keys, sums, store)
    return [tuple(sums[key] for key in group) for group in keys]


def load_weighted_sums(
    dataset: PreferenceDataset, store: ReferenceStore, digest: str, *, ld_alpha: float | None = None
) -> list[tuple[float, ...]]:
    """As ``load_ref_sums``, with the weights of tokens. Holds the values of ``GROUPS_AT_ONCE`` groups.

    Args:
        ld_alpha: further weight of the tokens past the length of the group's shortest response, as in
            ``dpo_kernels.ld_token_weights``; None is 1.

    Raises:
        UserError: as ``load_ref_logps``.
    """
    keys = dataset_keys(dataset, digest)
    found: list[tuple[float, ...]] = []
    for start in range(0, len(keys), GROUPS_AT_ONCE):
        part = keys[start : start + GROUPS_AT_ONCE]
        values = store.get([key for group in part for key in group])
        _require_all(dataset, part, values, store, first=start)
        for index, group in enumerate(part, start):
            found.append(_weighted_sums([values[key] for key in group], dataset[index].token_weights, ld_alpha))
    return found


def _weighted_sums(
    responses: list[np.ndarray], weights: Sequence[np.ndarray] | None, ld_alpha: float | None
) -> tuple[float, ...]:
    values = [response.astype(np.float64) for response in responses]
    if weights is not None:
        # Tokens of weight 0 are not there, so they do not count for the length either.
        values = [(v * w)[w != 0] for v, w in zip(values, weights, strict=True)]
    if ld_alpha is None:
        return tuple(float(v.sum()) for v in values)
    shared = min(map(len, values))
    return tuple(float(v[:shared].sum() + ld_alpha * v[shared:].sum()) for v in values)


def _require_all(
    dataset: PreferenceDataset,
    keys: list[tuple[bytes, ...]],
    found: dict,
    store: ReferenceStore,
    *,
    first: int = 0,
) -> None:
    """``keys`` are those of the groups from ``first`` on."""
    absent = [first + index for index, group in enumerate(keys) if any(key not in found for key in group)]
    if absent:
        others = f" and {len(absent) - 1} more rows" if len(absent) > 1 else ""
        row = dataset[absent[0]].label
        raise UserError(
            f"no reference log-probs for row {row}{others} (of {len(dataset)}) in {store.path} with "
            "this model, dtype, device, attention backend and versions of torch and transformers: run `dpo precompute` "
            "with the same run file, or set reference.mode to auto"
        )
