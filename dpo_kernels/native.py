"""The native library (``csrc/``): finds it, says what runs, and calls its functions.

The library is built when the package is installed and a C++ compiler is there; without it everything works in torch.
Its functions take one plain struct each and are called through ctypes, which releases the interpreter's lock.

``DPO_NATIVE_LIBRARY``: path of another build of the library, or "none" to do without.
``DPO_NATIVE_ISA``: one of ISAS, to run on less than the best that the processor has.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

INTERFACE = 4
"""Of the functions and structs below; a library that was built for others has another number."""
ISAS = ("plain", "avx2", "avx512", "neon")
"""Names of instruction sets."""
BUILT = Path(__file__).resolve().with_name("libdpo_native.so")
BUILDER = Path(__file__).resolve().parents[1] / "csrc" / "build_native.py"
"""In a checkout, with the sources beside it."""
HUGE_BYTES = 8 * 2**20
HOW_TO_BUILD = (
    "install a C++ compiler (g++ or clang++), then install dpo-kernels again, or in a checkout run "
    "`python csrc/build_native.py`"
)


class _Loaded(NamedTuple):
    library: ctypes.CDLL | None
    obstacle: str


@functools.cache
def _load() -> _Loaded:
    path = os.environ.get("DPO_NATIVE_LIBRARY") or str(BUILT)
    if path == "none":
        return _Loaded(None, "the native extension is not built: DPO_NATIVE_LIBRARY=none hides it")
    if not Path(path).is_file():
        return _Loaded(None, f"the native extension is not built; {HOW_TO_BUILD}")
    try:
        library = ctypes.CDLL(path)
        interface = library.dpo_interface()
        if _is_stale(library):
            stale = f"the native extension {path} was built from other sources than csrc/ holds now; rebuild it with "
            return _Loaded(None, stale + "`python csrc/build_native.py`")
    except (OSError, AttributeError) as error:
        return _Loaded(None, f"the native extension does not load ({error}); {HOW_TO_BUILD}")
    if interface != INTERFACE:
        return _Loaded(None, f"the native extension {path} was built from other sources; {HOW_TO_BUILD}")
    library.dpo_isa.restype = ctypes.c_char_p
    for name in ("product", "attention_forward", "attention_backward"):
        getattr(library, f"dpo_{name}_scratch").restype = ctypes.c_int64
    library.dpo_want_huge_pages.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    wanted = os.environ.get("DPO_NATIVE_ISA", "")
    if wanted and not library.dpo_has_isa(wanted.encode(), 1):
        return _Loaded(None, f"DPO_NATIVE_ISA={wanted}: this processor or build has no such instruction set")
    return _Loaded(library, "")


def _is_stale(library: ctypes.CDLL) -> bool:
    """Whether the sources that a checkout has beside the package are others than the library was built from."""
    spec = importlib.util.spec_from_file_location("dpo_build_native", BUILDER) if BUILDER.is_file() else None
    if spec is None or spec.loader is None:
        return False
    builder = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(builder)
    # Libraries from before it was recorded are of other sources, too.
    if not hasattr(library, "dpo_sources"):
        return True
    library.dpo_sources.restype = ctypes.c_char_p
    return library.dpo_sources().decode() != builder.digest()


def warn_if_stale() -> None:
    """Warn of a library that is left out since it was built from other sources than the checkout has."""
    if "other sources than csrc/" in _load().obstacle:
        warnings.warn(f"{_load().obstacle}; until then torch computes in its place", RuntimeWarning, stacklevel=3)


def library() -> ctypes.CDLL | None:
    """The loaded library, or None."""
    return _load().library


def why_not() -> str | None:
    """Why there is no library, with what to do about it; None where there is one."""
    return _load().obstacle or None


def isa() -> str:
    """The instruction set that runs."""
    return _library().dpo_isa().decode()


def isas() -> list[str]:
    """The instruction sets that this processor and build have."""
    return [name for name in ISAS if _library().dpo_has_isa(name.encode(), 0)]


def made_by_intel() -> bool:
    """Whether the processor is one of Intel's."""
    return bool(_library().dpo_is_intel())


@contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Inside, the library runs on another instruction set: for comparisons, since it holds for all threads.

    Raises:
        ValueError: this processor or build does not have it.
    """
    before = isa()
    if not _library().dpo_has_isa(name.encode(), 1):
        raise ValueError(f"instruction set must be one of {', '.join(isas())}; got {name!r}")
    try:
        yield
    finally:
        _library().dpo_has_isa(before.encode(), 1)


def fields(pointers: str, sizes: str, floats: str, integers: str) -> list[tuple[str, type]]:
    """Of a struct of ``csrc/``, from names: those of a kind stand together, the widest first."""
    kinds = {ctypes.c_void_p: pointers, ctypes.c_int64: sizes, ctypes.c_float: floats, ctypes.c_int32: integers}
    return [(name, kind) for kind, names in kinds.items() for name in names.split()]


def call(name: str, args: ctypes.Structure) -> None:
    """Call ``dpo_<name>`` with its struct, which refers to memory that the caller keeps alive. Nothing is checked."""
    getattr(_library(), f"dpo_{name}")(ctypes.byref(args))


def scratch_bytes(name: str, args: ctypes.Structure) -> int:
    """Size of the memory for ``args.scratch`` in ``call(name, args)``; of other memory only segments are read.

    Raises:
        MemoryError: there is none to count with.
    """
    size = getattr(_library(), f"dpo_{name}_scratch")(ctypes.byref(args))
    if size < 0:
        raise MemoryError(f"no memory for the tasks of {name}")
    return size


def in_huge_pages(fresh: Tensor) -> Tensor:
    """The same tensor, which nobody has written to yet; where it is large, the system is asked for pages of 2 MiB.

    The first touch of 200 MB of small pages takes 30 ms. Without the library, and elsewhere than on the CPU, nothing.
    """
    if fresh.device.type == "cpu" and fresh.nbytes >= HUGE_BYTES and (found := library()) is not None:
        found.dpo_want_huge_pages(fresh.data_ptr(), fresh.nbytes)
    return fresh


def pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def threads() -> int:
    """Of a call: as many as torch's own operators take."""
    return torch.get_num_threads()


def _library() -> ctypes.CDLL:
    found = library()
    assert found is not None, why_not()
    return found
