"""Tile shapes by architecture, dtype, hidden size and vocabulary: tables as data, read once per process.

The shipped tables are `dpo_kernels/tile_configs/*.json`. A table of the user's own, which `dpo bench tune` writes, goes
before them. A table is fixed: with the same tables two runs are bitwise equal. Other tile shapes add up in another
order, so that runs with different tables may differ by rounding.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Iterator, Set
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

_TABLES = Path(__file__).resolve().parents[1] / "tile_configs"
_DTYPE_NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}
_SIZES, _FLAGS = ("min_D", "max_D", "min_V", "max_V"), ("heavy", "aligned")
MAX_BLOCK = 256
"""Widest tile."""
HOPPER_TILE = 128, 256
"""Rows and columns of the one tile that ``kernels.hopper`` has."""
HOPPER_KERNELS = ("linear_stats", "linear_exps", "slice_grad")
"""Kernels whose place it takes."""
FILTER_BLOCK = 128
"""Widest tile of the filtered kernels: rows and columns that a filter keeps or leaves out together."""
TABLE_VARIABLE = "DPO_TILE_CONFIGS"
"""Environment variable: the user's table, in place of the one in the cache folder, or `shipped` for none."""
TABLE_FORMAT = 1

Bounds = dict[str, int]
Entries = dict[str, dict[str, "list[tuple[Bounds, TileConfig]]"]]
"""Kernel -> dtype name -> [(bounds, config)], in the order in which entries are tried."""


@dataclass(frozen=True, kw_only=True)
class TileConfig:
    """Shape of one tile program. `group_n` row tiles share a weight tile in L2; `tma` loads by tensor descriptors."""

    block_n: int
    block_v: int
    block_d: int
    group_n: int
    num_warps: int
    num_stages: int
    tma: bool = False
    hopper: bool = False
    """Where ``kernels.hopper`` can, it takes the place of Triton for this tile."""

    def __post_init__(self) -> None:
        for name in ("block_n", "block_v", "block_d", "num_warps"):
            value = getattr(self, name)
            if value < 1 or value & (value - 1):
                raise ValueError(f"tile config: {name} must be a power of two, got {value}")
        if min(self.block_n, self.block_v, self.block_d) < 16:
            raise ValueError(f"tile config: blocks must be at least 16 wide for tl.dot, got {self}")
        if max(self.block_n, self.block_v) > MAX_BLOCK:
            raise ValueError(f"tile config: block_n and block_v must be at most {MAX_BLOCK}, got {self}")
        if self.group_n < 1 or self.num_stages < 1:
            raise ValueError(f"tile config: group_n and num_stages must be at least 1, got {self}")
        if self.hopper and ((self.block_n, self.block_v) != HOPPER_TILE or not self.tma):
            raise ValueError(
                f"tile config: hopper has tiles of {HOPPER_TILE[0]} x {HOPPER_TILE[1]} with tma, got {self}"
            )


class TileTableError(ValueError):
    """A table of the user's that cannot be used; the message names file, field, and what to do."""

    def __init__(self, path: Path, problem: str):
        super().__init__(f"{path}: {problem}; correct or delete the file, or set {TABLE_VARIABLE}=shipped")


def device_arch(device: torch.device) -> str:
    """`sm_90` for a CUDA device, `cpu` for the interpreter, `other` for every other accelerator."""
    if device.type == "cpu":
        return "cpu"
    if device.type != "cuda" or torch.version.hip is not None:
        return "other"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def tile_config(
    kernel: str, *, arch: str, dtype: torch.dtype, D: int, V: int, heavy: bool, aligned: bool, shipped: bool = False
) -> TileConfig:
    """Configuration of `kernel` for this problem: the first entry whose bounds hold it, the user's table first.

    Bounds are `min_D`, `max_D`, `min_V`, `max_V`, `heavy` (whether a softcap or token statistics take registers beside
    the tile) and `aligned` (whether rows begin at multiples of 16 bytes, without which elements are loaded one by one).
    Architectures without a shipped table of their own use the table that `arch_aliases` in `default.json` names, or
    `default.json` itself, whose tiles fit the smallest shared memory among supported chips. `shipped` leaves the
    user's table out. Raises ValueError for a dtype that the kernels do not take, and for a broken table of the user's.
    """
    tables = [table_entries(arch)] if shipped else [user_entries(arch), table_entries(arch)]
    for table in tables:
        for bounds, config in table.get(kernel, {}).get(dtype_name(dtype), []):
            fits = bounds.get("min_D", D) <= D <= bounds.get("max_D", D)
            fits = fits and bounds.get("min_V", V) <= V <= bounds.get("max_V", V)
            if fits and heavy == bounds.get("heavy", heavy) and aligned == bounds.get("aligned", aligned):
                return config
    raise ValueError(f"no tile configuration of {kernel} for {arch}, {dtype}, D={D}, V={V}")


@functools.cache
def table_entries(arch: str) -> Entries:
    """The shipped table of `arch`."""
    default = json.loads((_TABLES / "default.json").read_text())
    name = default["arch_aliases"].get(arch, arch)
    path = _TABLES / f"{name}.json"
    # An architecture-specific letter (sm_90a) never reaches here; anything else odd must not become a path.
    table = json.loads(path.read_text()) if re.fullmatch(r"\w+", name) and path.is_file() else default
    return {
        kernel: {
            dtype: [(entry.get("bounds", {}), TileConfig(**entry["config"])) for entry in entries]
            for dtype, entries in by_dtype.items()
        }
        for kernel, by_dtype in table["kernels"].items()
    }


def shipped_archs() -> list[str]:
    """Architectures that have a shipped table of their own."""
    return sorted(path.stem for path in _TABLES.glob("sm_*.json"))


def default_table_path() -> Path | None:
    """`$DPO_CACHE/tile_configs.json`, or `dpo-kernels/tile_configs.json` below `$XDG_CACHE_HOME` or `~/.cache`.

    None for a user without a home, as in a container whose user id is in no list.
    """
    if own := os.environ.get("DPO_CACHE"):
        return Path(own).expanduser() / "tile_configs.json"
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    except RuntimeError:
        return None
    return cache / "dpo-kernels" / "tile_configs.json"


def user_table_path() -> Path | None:
    """The user's table, which need not be there when it is the default one; None when there is no place for one, or
    when DPO_TILE_CONFIGS=shipped."""
    named = os.environ.get(TABLE_VARIABLE)
    if named == "shipped":
        return None
    return Path(named).expanduser() if named else default_table_path()


@functools.cache
def user_entries(arch: str) -> Entries:
    """What the user's table has for `arch`. Raises TileTableError."""
    path = _user_table()
    return {} if path is None else read_table(path).get(arch, {})


def tile_table() -> str:
    """Which tables are in use, in a few words. Raises TileTableError."""
    path = _user_table()
    return "as shipped" if path is None else f"{path} for {', '.join(sorted(read_table(path))) or 'nothing yet'}"


def _user_table() -> Path | None:
    """The user's table when there is one to read: one that was named has to be there."""
    path = user_table_path()
    # Unlike Path.is_file this is False, not an error, below a folder that this user may not enter.
    return path if path is not None and (os.environ.get(TABLE_VARIABLE) or os.path.isfile(path)) else None


def read_table(path: Path) -> dict[str, Entries]:
    """A table file by architecture, read strictly. Raises TileTableError, which names the field that is wrong."""
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise TileTableError(path, f"cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise TileTableError(path, f"is not JSON: {error}") from error
    try:
        _check_keys(content, "the file", {"format", "archs"})
        if content["format"] != TABLE_FORMAT:
            raise ValueError(f"format: expected {TABLE_FORMAT}, got {content['format']!r}")
        return {arch: _arch_entries(f"archs.{arch}", table) for arch, table in _items(content["archs"], "archs")}
    except ValueError as error:
        raise TileTableError(path, str(error)) from error


def _arch_entries(where: str, table: Any) -> Entries:
    entries: Entries = {}
    for kernel, by_dtype in _items(table, where, table_entries("default")):
        entries[kernel] = {}
        for dtype, rows in _items(by_dtype, f"{where}.{kernel}", _DTYPE_NAMES.values()):
            field = f"{where}.{kernel}.{dtype}"
            if not isinstance(rows, list):
                raise ValueError(f"{field}: expected a list, got {rows!r}")
            entries[kernel][dtype] = [_entry(f"{field}[{i}]", row, kernel) for i, row in enumerate(rows)]
    return entries


def _entry(where: str, entry: Any, kernel: str) -> tuple[Bounds, TileConfig]:
    _check_keys(entry, where, {"bounds", "config"}, {"measured"})
    bounds = dict(_items(entry["bounds"], f"{where}.bounds", (*_SIZES, *_FLAGS)))
    _check_numbers(f"{where}.bounds", bounds, flags=_FLAGS)
    names = {field.name for field in fields(TileConfig)}
    _check_keys(entry["config"], f"{where}.config", names - {"tma", "hopper"}, {"tma", "hopper"})
    _check_numbers(f"{where}.config", entry["config"], flags=("tma", "hopper"))
    try:
        config = TileConfig(**entry["config"])
    except ValueError as error:
        raise ValueError(f"{where}.config: {str(error).removeprefix('tile config: ')}") from error
    widest = FILTER_BLOCK if kernel.startswith("filtered_") else MAX_BLOCK
    if config.hopper and kernel not in HOPPER_KERNELS:
        raise ValueError(f"{where}.config.hopper: only for {', '.join(HOPPER_KERNELS)}")
    if max(config.block_n, config.block_v) > widest:
        found = f"got {config.block_n} and {config.block_v}"
        raise ValueError(f"{where}.config: block_n and block_v must be at most {widest}, {found}")
    return bounds, config


def _items(value: Any, where: str, known: Any = None) -> Iterator[tuple[str, Any]]:
    """Key and value of an object whose keys must be `known`, when that is given."""
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected an object, got {value!r}")
    for key, item in value.items():
        if known is not None and key not in known:
            raise ValueError(f"{where}.{key}: unknown, expected one of {', '.join(known)}")
        yield key, item


def _check_keys(value: Any, where: str, required: Set[str], optional: Set[str] = frozenset()) -> None:
    found = {key for key, _ in _items(value, where, sorted(required | optional))}
    if missing := required - found:
        raise ValueError(f"{where}: {', '.join(sorted(missing))} is missing")


def _check_numbers(where: str, values: dict[str, Any], *, flags: tuple[str, ...]) -> None:
    for name, value in values.items():
        expected = bool if name in flags else int
        if type(value) is not expected:
            raise ValueError(f"{where}.{name}: expected {expected.__name__}, got {value!r}")


def dtype_name(dtype: torch.dtype) -> str:
    """Name of a dtype in tables. Raises ValueError for one that the kernels do not take."""
    if dtype not in _DTYPE_NAMES:
        raise ValueError(f"the triton kernels take bfloat16, float16 or float32, got {dtype}")
    return _DTYPE_NAMES[dtype]
