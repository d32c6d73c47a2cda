"""One file for many runs: a configuration with a section ``sweep``, whose keys have lists of values to try.

loss: {loss_type: sigmoid}
train: {output_dir: runs/sweep}
sweep:
  loss.beta: [0.05, 0.1, 1, 5]
  loss.loss_type: [sigmoid, ipo]
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import UserError
from .fields import TypeMismatch, coerce, iter_keys, nearest
from .load import build_from, read_yaml, to_yaml
from .overrides import parse_overrides
from .schema import RunConfig

SECTION = "sweep"
_LONGEST_NAME = 200


class SweepRun(NamedTuple):
    """One combination of values."""

    name: str
    """Such as ``beta=0.1,loss_type=ipo``; also its folder inside ``train.output_dir`` of the file."""
    config: RunConfig


def load_sweep(path: str | Path, overrides: Sequence[str] = ()) -> list[SweepRun]:
    """Every combination of the values in section ``sweep``, the last key changing fastest.

    Args:
        overrides: as of ``load_config``; they are the same for all runs.

    Raises:
        UserError: as of ``load_config``, for any of the runs; or the section is absent or is not what it should be.
    """
    values, lines = read_yaml(path)
    swept = values.pop(SECTION, None)
    if not isinstance(swept, dict) or not swept:
        raise UserError(
            f"{path}: a sweep needs a section {SECTION} with lists of values, such as "
            f"`{SECTION}: {{loss.beta: [0.1, 1]}}`"
        )
    fixed = parse_overrides(overrides)
    for key, tried in swept.items():
        _check(str(path), lines, str(key), tried, fixed)
    names = _short([str(key) for key in swept])
    runs = []
    for combination in product(*(map(partial(_of_key, str(key)), tried) for key, tried in swept.items())):
        settings = dict(zip(map(str, swept), combination, strict=True))
        name = ",".join(f"{names[key]}={_plain(value)}" for key, value in settings.items())
        try:
            config = build_from(str(path), copy.deepcopy(values), lines, fixed | settings)
            folder = str(Path(config.train.output_dir) / name)
            own = fixed | settings | {"train.output_dir": folder}
            runs.append(SweepRun(name, build_from(str(path), copy.deepcopy(values), lines, own)))
        except UserError as error:
            raise UserError(f"{path}, run {name}: {_from_sweep(str(error), settings)}") from error
    _check_names(str(path), [run.name for run in runs])
    _check_same(str(path), runs)
    return runs


def _from_sweep(message: str, settings: Iterable[str]) -> str:
    """The message with swept keys under the name that they have in the file."""
    for key in settings:
        message = re.sub(rf"--{re.escape(key)}(?![\w.])", f"{SECTION}.{key}", message)
    return message


def _check(path: str, lines: dict[str, int], key: str, tried: Any, fixed: dict[str, Any]) -> None:
    line = f", line {lines[f'{SECTION}.{key}']}" if f"{SECTION}.{key}" in lines else ""
    where = f"{path}{line}: {SECTION}.{key}"
    known = [name for name, _ in iter_keys()]
    if key not in known:
        close = nearest(key, known)
        advice = f"did you mean {close}?" if close else "write keys with their section, such as loss.beta"
        raise UserError(f"{where}: unknown key; {advice}")
    if key == "train.output_dir":
        raise UserError(f"{where}: every run has a folder of its own inside train.output_dir; take it out of the sweep")
    if key in fixed:
        raise UserError(f"{where}: it is swept and set by --{key}; take one of the two out")
    if not isinstance(tried, list) or not tried:
        raise UserError(f"{where}: expected a list of values to try, got {tried!r}")


def _of_key(key: str, value: Any) -> Any:
    """A value as the key has it: YAML 1.1 reads ``1e-6`` as text, and ``1`` is 1.0 of a key of numbers.

    What the key does not take is told as of any run.
    """
    try:
        found = coerce(value, dict(iter_keys())[key])
    except TypeMismatch:
        return value
    return value if isinstance(found, tuple | dict) else found


def _short(keys: list[str]) -> dict[str, str]:
    """Each key without its section, where that names it alone."""
    leaves = [key.rsplit(".", 1)[-1] for key in keys]
    return {key: leaf if leaves.count(leaf) == 1 else key for key, leaf in zip(keys, leaves, strict=True)}


def _plain(value: Any) -> str:
    """A value as a part of a folder's name."""
    if isinstance(value, list):
        return "+".join(map(_plain, value))
    text = f"{value:g}" if isinstance(value, float) else "null" if value is None else str(value)
    return re.sub(r"[^\w.+-]+", "_", text)


def _check_same(path: str, runs: Sequence[SweepRun]) -> None:
    """Values that mean the same, such as two names of one loss, are one value."""
    known: dict[str, str] = {}
    for run in runs:
        config = to_yaml(replace(run.config, train=replace(run.config.train, output_dir="same")))
        if config in known:
            raise UserError(
                f"{path}: runs {known[config]} and {run.name} of the sweep are the same: give each value once"
            )
        known[config] = run.name


def _check_names(path: str, names: list[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{path}: two runs of the sweep would be called {name}: give each value once")
        if len(name) > _LONGEST_NAME:
            raise UserError(f"{path}: {name} is too long for the name of a folder: sweep fewer keys at once")
