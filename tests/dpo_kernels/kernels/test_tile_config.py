"""Which table a tile shape comes from, and what a broken table of the user's says."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path

import pytest
import torch

from dpo_kernels.kernels import tile_config as tables

BOUNDS = {"min_D": 2049, "max_D": 4096, "min_V": 65537, "max_V": 131072, "heavy": False, "aligned": True}
CONFIG = {"block_n": 64, "block_v": 256, "block_d": 64, "group_n": 16, "num_warps": 8, "num_stages": 2}
CONFIG |= {"tma": True, "hopper": False}
HOPPER = {**CONFIG, "block_n": 128, "hopper": True}
ENTRY = {"bounds": BOUNDS, "config": CONFIG, "measured": {"device": "none"}}
TABLE = {"format": 1, "archs": {"sm_90": {"linear_stats": {"bfloat16": [ENTRY]}}}}
PROBLEM = {"arch": "sm_90", "dtype": torch.bfloat16, "D": 4096, "V": 128256, "heavy": False, "aligned": True}


@pytest.fixture(autouse=True)
def fresh_tables():
    tables.user_entries.cache_clear()
    yield
    tables.user_entries.cache_clear()


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Write the user's table; its path."""
    path = tmp_path / "tiles.json"
    monkeypatch.setenv(tables.TABLE_VARIABLE, str(path))

    def write(content: object) -> Path:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write


def find(**changes) -> dict:
    return vars(tables.tile_config("linear_stats", **{**PROBLEM, **changes}))


def test_the_users_table_goes_first_inside_its_bounds(table):
    table(TABLE)
    assert find() == CONFIG
    assert find(D=2049, V=65537) == CONFIG
    shipped = find(shipped=True)
    assert shipped != CONFIG
    outside = [{"D": 2048}, {"D": 4097}, {"V": 65536}, {"V": 131073}]
    for changes in outside:
        assert find(**changes) == shipped
    for changes in ({"heavy": True}, {"aligned": False}, {"dtype": torch.float16}, {"arch": "sm_80"}):
        assert find(**changes) == find(**changes, shipped=True)
    assert vars(tables.tile_config("slice_grad", **PROBLEM)) != CONFIG


@pytest.mark.parametrize("arch", ["default", *tables.shipped_archs()])
def test_shipped_tables_have_tiles_for_rows_that_are_not_aligned(arch):
    """First, as an entry without a bound would be compiled for aligned rows alone before it is shipped."""
    for kernel, by_dtype in tables.table_entries(arch).items():
        for dtype, entries in by_dtype.items():
            assert entries[0][0] == {"aligned": False}, (kernel, dtype)


def test_where_the_users_table_is(table, tmp_path, monkeypatch):
    path = table(TABLE)
    assert tables.user_table_path() == path
    assert tables.tile_table() == f"{path} for sm_90"
    monkeypatch.setenv(tables.TABLE_VARIABLE, "shipped")
    assert tables.user_table_path() is None
    assert tables.tile_table() == "as shipped"
    assert tables.user_entries("sm_90") == {}
    monkeypatch.delenv(tables.TABLE_VARIABLE)
    monkeypatch.setenv("DPO_CACHE", str(tmp_path / "cache"))
    assert tables.user_table_path() == tmp_path / "cache" / "tile_configs.json"
    # The default one need not be there.
    assert tables.tile_table() == "as shipped"
    monkeypatch.delenv("DPO_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tables.user_table_path() == tmp_path / "dpo-kernels" / "tile_configs.json"


def test_without_a_home_or_a_readable_cache_tables_are_as_shipped(tmp_path, monkeypatch):
    for name in (tables.TABLE_VARIABLE, "DPO_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def fail(*arguments, **options):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as context:
        context.setattr(Path, "expanduser", lambda self: (_ for _ in ()).throw(RuntimeError("no home")))
        assert tables.user_table_path() is None
        assert tables.tile_table() == "as shipped"
        assert find() == find(shipped=True)
    tables.user_entries.cache_clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with monkeypatch.context() as context:
        context.setattr(os, "stat", fail)
        context.setattr(Path, "stat", fail)
        assert tables.tile_table() == "as shipped"
        assert tables.user_entries("sm_90") == {}


def test_a_table_that_was_named_has_to_be_there(table, tmp_path):
    with pytest.raises(tables.TileTableError, match=r"tiles\.json: cannot be read: No such file.*DPO_TILE_CONFIGS="):
        find()


def changed(*path: object, to: object = None, drop: bool = False) -> dict:
    content = copy.deepcopy(TABLE)
    *parents, last = path
    place: object = content
    for key in parents:
        place = place[key]
    if drop:
        del place[last]
    else:
        place[last] = to
    return content


AT = ("archs", "sm_90", "linear_stats", "bfloat16", 0)
WHERE = r"archs\.sm_90\.linear_stats\.bfloat16\[0\]"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "the file: expected an object, got"),
        (changed("format", to=2), "format: expected 1, got 2"),
        (changed(*AT, "config", "hopper", to=True), rf"{WHERE}\.config: hopper has tiles of 128 x 256 with tma, got"),
        (
            changed(*AT, "config", to=HOPPER | {"tma": False}),
            rf"{WHERE}\.config: hopper has tiles of 128 x 256 with tma",
        ),
        (
            changed("archs", "sm_90", to={"filtered_dx": {"float16": [{"bounds": {}, "config": HOPPER}]}}),
            r"filtered_dx\.float16\[0\]\.config\.hopper: only for linear_stats, linear_exps, slice_grad",
        ),
        (changed("format", drop=True), "the file: format is missing"),
        (changed("extra", to=2), r"the file\.extra: unknown, expected one of archs, format"),
        (
            changed("archs", "sm_90", "linear_stat", to={}),
            r"archs\.sm_90\.linear_stat: unknown, expected one of linear_s",
        ),
        (changed(*AT[:3], "int8", to=[]), r"linear_stats\.int8: unknown, expected one of bfloat16, float16, float32"),
        (changed(*AT[:4], to={}), r"bfloat16: expected a list, got"),
        (changed(*AT, "config", drop=True), WHERE + ": config is missing"),
        (changed(*AT, "bounds", "max_N", to=3), WHERE + r"\.bounds\.max_N: unknown, expected one of min_D"),
        (changed(*AT, "bounds", "max_D", to="4096"), WHERE + r"\.bounds\.max_D: expected int, got '4096'"),
        (changed(*AT, "bounds", "heavy", to=1), WHERE + r"\.bounds\.heavy: expected bool, got 1"),
        (changed(*AT, "config", "block_n", to=100), WHERE + r"\.config: block_n must be a power of two, got 100"),
        (changed(*AT, "config", "block_v", to=512), WHERE + r"\.config: block_n and block_v must be at most 256"),
        (
            changed("archs", "sm_90", to={"filtered_dw": {"bfloat16": [ENTRY]}}),
            r"filtered_dw\.bfloat16\[0\]\.config: block_n and block_v must be at most 128",
        ),
        (changed(*AT, "config", "block_d", to=True), WHERE + r"\.config\.block_d: expected int, got True"),
        (changed(*AT, "config", "num_warps", drop=True), WHERE + r"\.config: num_warps is missing"),
    ],
)
def test_what_a_broken_table_says(table, content, message):
    """File and field, in one line, from the launch that would have used it."""
    path = table(content)
    with pytest.raises(tables.TileTableError, match=message) as raised:
        find()
    text = str(raised.value)
    assert text.startswith(f"{path}: ")
    assert text.endswith("; correct or delete the file, or set DPO_TILE_CONFIGS=shipped")
    assert "\n" not in text
