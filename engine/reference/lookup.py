"""Stored log-probs in the order of a dataset."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from ..data.groups import PreferenceDataset
from ..errors import UserError
from ..paths import expanded
from .keys import dataset_keys
from .store import ReferenceStore


def default_store_path() -> Path:
    """``$DPO_CACHE/reference``, or ``dpo-kernels/reference`` below ``$XDG_CACHE_HOME`` or ``~/.cache``.

    Raises:
        UserError: none of the first two is set, and the user has no home.
    """
    if own := os.environ.get("DPO_CACHE"):
        return expanded(own) / "reference"
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    except RuntimeError as error:
        raise UserError(
            "reference.store is not set, and this user has no home folder for its default: set reference.store, or "
            "the environment variable DPO_CACHE"
        ) from error
    return cache / "dpo-kernels" / "reference"


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
    """Per group, per response: the sum of its log-probs in float64. Holds the values of one shard at a time.

    Raises:
        UserError: as ``load_ref_logps``.
    """
    keys = dataset_keys(dataset, digest)
    sums = store.sums([key for group in keys for key in group])
    _require_all(dataset, keys, sums, store)
    return [tuple(sums[key] for key in group) for group in keys]


def _require_all(dataset: PreferenceDataset, keys: list[tuple[bytes, ...]], found: dict, store: ReferenceStore) -> None:
    absent = [index for index, group in enumerate(keys) if any(key not in found for key in group)]
    if absent:
        others = f" and {len(absent) - 1} more rows" if len(absent) > 1 else ""
        raise UserError(
            f"no reference log-probs for row {dataset[absent[0]].row}{others} (of {len(dataset)}) in {store.path} with "
            "this model, dtype, device, attention backend and versions of torch and transformers: run `dpo precompute` "
            "with the same run file, or set reference.mode to auto"
        )
