"""What ``data.dataset_name`` and the sets of ``data.datasets`` must be.

The sections themselves, ``DataConfig`` and ``DatasetConfig``, are above this in ``schema.py``.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Any

from .require import require as _require

AMOUNTS = ("weight", "fraction", "rows")
"""How much of a set an epoch takes: each set has one of them."""
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


def check_set(one: Any) -> None:
    """Raise a ``ValueError`` for a set that cannot be read or drawn from."""
    _require(one.name != "", "data.datasets.name must not be empty")
    given = [amount for amount in AMOUNTS if getattr(one, amount) is not None]
    found = f"; {one.name} has {' and '.join(given) or 'none'}"
    _require(len(given) == 1, f"data.datasets needs one of weight, fraction and rows for each set{found}")
    value = getattr(one, given[0])
    _require(value > 0, f"data.datasets.{given[0]} must be positive, got {value:g}; leave out a set that is not used")
    _require(
        one.label is None or _LABEL.fullmatch(one.label) is not None,
        f"data.datasets.label is a part of the names of metrics: write letters, digits, hyphens, dots and underscores, "
        f"got {one.label!r}",
    )


def check_mixture(data: Any) -> None:
    """Raise a ``ValueError`` unless rows come from one place: one set, or a mixture of several."""
    name, sets = data.dataset_name, data.datasets
    listed = (name,) if isinstance(name, str) else name
    _require(listed is None or all(listed), "data.dataset_name must not be empty")
    _require(name is not None or bool(sets), "data.dataset_name is missing, and so is data.datasets")
    _require(
        name is None or not sets,
        "data.datasets names every set of a mixture, so leave data.dataset_name out, or make it one of the sets",
    )
    if not sets:
        return
    weighted = sum(one.weight is not None for one in sets)
    _require(
        weighted in (0, len(sets)),
        "data.datasets: a weight is relative to the other sets, so give every set a weight, or none of them; fraction "
        "and rows may be mixed",
    )
    own = [one.name for one in sets if one.eval_split is not None]
    other = next((key for key in ("eval_dataset_name", "eval_fraction") if getattr(data, key) is not None), None)
    _require(not (own and other), f"data.datasets.eval_split names evaluation data, so leave data.{other} out")
    config = data.dataset_config is not None or data.dataset_train_split != "train"
    _require(
        not config,
        "data.dataset_config and data.dataset_train_split are of data.dataset_name; each set of data.datasets has "
        "config and split of its own",
    )
    labels = labels_of(sets)
    twice = sorted({label for label in labels if labels.count(label) > 1})
    _require(not twice, f"data.datasets: two sets are called {', '.join(twice)}; give each a label")


def labels_of(sets: Sequence[Any]) -> list[str]:
    """What each set is called: its label, or the end of its name, with its configuration or split where that is the
    name of two."""
    ends = [one.label or _end(one.name) for one in sets]
    for part in ("config", "split"):
        of_end: dict[str, set[str | None]] = {}
        for end, one in zip(ends, sets, strict=True):
            of_end.setdefault(end, set()).add(getattr(one, part))
        ends = [
            end if one.label or len(of_end[end]) == 1 else f"{end}-{_plain(getattr(one, part) or 'default')}"
            for end, one in zip(ends, sets, strict=True)
        ]
    return ends


def _end(name: str) -> str:
    return _plain(re.sub(r"(\.(jsonl?|parquet|csv|tsv))?(\.gz)?$", "", name.rstrip("/").rpartition("/")[2]))


def _plain(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", text).strip("-.") or "set"


def check_parts(data: Any, parts: Collection[str], where: str) -> None:
    """Raise a ``ValueError`` for columns and fields of turns that have no meaning."""
    unknown = sorted(set(data.columns or ()) - set(parts))
    _require(not unknown, f"{where}.columns has no part {', '.join(unknown)}; parts are {', '.join(parts)}")
    named = [name for name in (data.columns or {}).values() if name is not None]
    _require(len(set(named)) == len(named), f"{where}.columns names one column for two parts")
    _require(
        set(data.turn_fields or ()) <= {"role", "content"},
        f"{where}.turn_fields names role and content, got {', '.join(sorted(data.turn_fields or ()))}",
    )
