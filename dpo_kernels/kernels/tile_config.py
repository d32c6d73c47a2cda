"""Tile shapes by architecture, dtype, hidden size and vocabulary, read from `dpo_kernels/tile_configs/*.json`."""

from __future__ import annotations

import functools
import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch

_TABLES = Path(__file__).resolve().parents[1] / "tile_configs"
_DTYPE_NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}


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

    def __post_init__(self) -> None:
        for name in ("block_n", "block_v", "block_d", "num_warps"):
            value = getattr(self, name)
            if value < 1 or value & (value - 1):
                raise ValueError(f"tile config: {name} must be a power of two, got {value}")
        if min(self.block_n, self.block_v, self.block_d) < 16:
            raise ValueError(f"tile config: blocks must be at least 16 wide for tl.dot, got {self}")
        if self.group_n < 1 or self.num_stages < 1:
            raise ValueError(f"tile config: group_n and num_stages must be at least 1, got {self}")


def device_arch(device: torch.device) -> str:
    """`sm_90` for a CUDA device, `cpu` for the interpreter, `other` for every other accelerator."""
    if device.type == "cpu":
        return "cpu"
    if device.type != "cuda" or torch.version.hip is not None:
        return "other"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def tile_config(
    kernel: str, *, arch: str, dtype: torch.dtype, D: int, V: int, heavy: bool, aligned: bool
) -> TileConfig:
    """Configuration of `kernel` for this problem: the first entry of the table whose bounds hold it.

    Bounds are `max_D`, `max_V`, `heavy` (whether a softcap or token statistics take registers beside the tile) and
    `aligned` (whether rows begin at multiples of 16 bytes, without which elements are loaded one by one). Architectures
    without a table of their own use the table that `arch_aliases` in `default.json` names, or `default.json` itself,
    whose tiles fit the smallest shared memory among supported chips. Raises ValueError for a dtype that the kernels do
    not take.
    """
    for bounds, config in table_entries(arch)[kernel].get(_dtype_name(dtype), []):
        fits = bounds.get("max_D", D) >= D and bounds.get("max_V", V) >= V
        if fits and heavy == bounds.get("heavy", heavy) and aligned == bounds.get("aligned", aligned):
            return config
    raise ValueError(f"no tile configuration of {kernel} for {arch}, {dtype}, D={D}, V={V}")


@functools.cache
def table_entries(arch: str) -> dict[str, dict[str, list[tuple[dict[str, int], TileConfig]]]]:
    """The table of `arch`: kernel -> dtype name -> [(bounds, config)], in the order in which entries are tried."""
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
    """Architectures that have a table of their own."""
    return sorted(path.stem for path in _TABLES.glob("sm_*.json"))


def _dtype_name(dtype: torch.dtype) -> str:
    if dtype not in _DTYPE_NAMES:
        raise ValueError(f"the triton kernels take bfloat16, float16 or float32, got {dtype}")
    return _DTYPE_NAMES[dtype]
