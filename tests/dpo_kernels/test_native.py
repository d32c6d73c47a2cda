"""Finding and loading the native library, and what its sources may not do."""

from __future__ import annotations

import _ctypes
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dpo_kernels import native

CSRC = Path(__file__).resolve().parents[2] / "csrc"
needs_library = pytest.mark.skipif(native.library() is None, reason=str(native.why_not()))
load = native._load.__wrapped__


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"DPO_NATIVE_LIBRARY": "none"}, "the native extension is not built: DPO_NATIVE_LIBRARY=none hides it"),
        (
            {"DPO_NATIVE_LIBRARY": "/nowhere.so"},
            "the native extension is not built; install a C.. .*build_native.py`",
        ),
        ({"DPO_NATIVE_LIBRARY": __file__}, r"the native extension does not load \(.*; install a C"),
        ({"DPO_NATIVE_LIBRARY": _ctypes.__file__}, r"the native extension does not load \(.*dpo_interface"),
    ],
)
def test_a_library_that_is_not_there_is_a_reason(variables: dict, reason: str, monkeypatch) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    loaded = load()
    assert loaded.library is None
    assert re.match(reason, loaded.obstacle)


@needs_library
def test_a_library_of_other_sources_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(native, "INTERFACE", native.INTERFACE + 1)
    loaded = load()
    assert loaded.library is None
    assert "was built from other sources; install" in loaded.obstacle


@needs_library
def test_a_library_of_older_sources_is_refused_and_told_of(monkeypatch, tmp_path) -> None:
    """Whatever was edited: a kernel, a header or the flags. An installed package has no sources to compare with."""
    changed = shutil.copytree(CSRC, tmp_path / "csrc", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(native, "BUILDER", changed / "build_native.py")
    assert load().library is not None
    for name in ("logits_kernels.cpp", "simd.h", "build_native.py"):
        before = (changed / name).read_text()
        (changed / name).write_text(before + "\n")
        loaded = load()
        assert loaded.library is None
        assert loaded.obstacle.endswith(
            "other sources than csrc/ holds now; rebuild it with `python csrc/build_native.py`"
        )
        monkeypatch.setattr(native, "_load", lambda loaded=loaded: loaded)
        with pytest.warns(RuntimeWarning, match=r"rebuild it with .*; until then torch computes in its place"):
            native.warn_if_stale()
        (changed / name).write_text(before)
    shutil.rmtree(changed)
    assert load().library is not None


def test_a_library_from_before_sources_were_recorded_is_stale() -> None:
    assert native._is_stale(SimpleNamespace())


@needs_library
def test_instruction_set_by_name(monkeypatch) -> None:
    best = native.isa()
    assert best in native.isas()
    assert "plain" in native.isas()
    for name in native.isas():
        with native.use_isa(name):
            assert native.isa() == name
    assert native.isa() == best
    with pytest.raises(ValueError, match=r"instruction set must be one of plain.*; got 'sse9'"), native.use_isa("sse9"):
        pass
    monkeypatch.setenv("DPO_NATIVE_ISA", "sse9")
    assert load().obstacle == "DPO_NATIVE_ISA=sse9: this processor or build has no such instruction set"


def test_kernels_take_nothing_inline_from_the_standard_library() -> None:
    """Of an inline function that several files define the linker keeps any one, which might be the AVX-512 copy."""
    allowed = {"float.h", "math.h", "stdint.h", "string.h", "immintrin.h", "arm_neon.h"}
    compiled = {*CSRC.glob("*_kernels.cpp"), *CSRC.glob("simd*.h"), CSRC / "vector_math.h"}
    seen = set()
    while compiled:
        text = (path := compiled.pop()).read_text(encoding="utf-8")
        seen.add(path)
        assert not re.findall(r"\bstd::", text), path
        assert set(re.findall(r"#include <(.+)>", text)) <= allowed, path
        compiled |= {CSRC / name for name in re.findall(r'#include "(.+)"', text)} - seen
    for path in {*CSRC.glob("*_kernels.cpp"), *CSRC.glob("simd*.h"), CSRC / "vector_math.h"}:
        assert re.search(r"^namespace \{$", path.read_text(encoding="utf-8"), re.MULTILINE), path


@needs_library
def test_huge_pages_change_nothing_else() -> None:
    for count in (0, 1, 2**21, 2**21 + 12345):
        fresh = torch.arange(count, dtype=torch.float32)
        before = fresh.clone()
        assert native.in_huge_pages(fresh) is fresh
        # Of memory that is in use, too: the advice is about pages, not about what they hold.
        assert torch.equal(fresh, before)
