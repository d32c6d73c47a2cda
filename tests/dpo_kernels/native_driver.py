"""The native library of 64-bit ARM, cross-compiled and emulated, in the place of ``dpo_kernels.native.call``."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import importlib.util
import os
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCE = Path(__file__).with_suffix(".cpp")
COMPILER = "aarch64-linux-gnu-g++"
EMULATOR = next(filter(shutil.which, ("qemu-aarch64-static", "qemu-aarch64")), "")
# The first 64-bit processor, with none of the instructions that came later.
PROCESSOR = "cortex-a53"
FOLDER = ROOT / "build" / "aarch64"
SCRATCH_BYTES = 2**23
"""More than a call of the tests takes on any instruction set."""


def why_not() -> str | None:
    """What this machine lacks, or None."""
    if shutil.which(COMPILER) is None:
        return f"no cross compiler {COMPILER}"
    return None if EMULATOR else "no qemu-aarch64"


def builder() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_native", ROOT / "csrc" / "build_native.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build() -> tuple[Path, Path]:
    """The driver and the library, compiled again only where their sources changed."""
    sources = [SOURCE, *sorted((ROOT / "csrc").glob("*.*"))]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    driver, library, stamp = FOLDER / "native_driver", FOLDER / "libdpo_native.so", FOLDER / "sources.sha256"
    FOLDER.mkdir(parents=True, exist_ok=True)
    with (FOLDER / "lock").open("w") as lock, pytest.MonkeyPatch.context() as environment:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not stamp.is_file() or stamp.read_text() != digest:
            environment.setenv("CXX", COMPILER)
            environment.delenv("LD_PRELOAD", raising=False)
            builder().build(library, machine="aarch64")
            builder().run([COMPILER, "-std=c++17", "-O1", "-Wall", "-Wextra", str(SOURCE), "-ldl", "-o", str(driver)])
            stamp.write_text(digest)
    return driver, library


class Driver:
    """A process that calls the functions of the library."""

    def __init__(self, isa: str | None = None):
        """``isa``: the instruction set, by DPO_NATIVE_ISA; without it the best of the processor."""
        loader = subprocess.check_output([COMPILER, "-print-file-name=ld-linux-aarch64.so.1"], text=True).strip()
        prefix = Path(loader).resolve().parents[1]
        command = [EMULATOR, "-cpu", PROCESSOR, "-L", str(prefix), *map(str, build())]
        variables = {"PATH": os.environ["PATH"]} | ({"DPO_NATIVE_ISA": isa} if isa else {})
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=variables)
        name, self.interface = struct.unpack("=32sq", self._read(40))
        self.isa = name.rstrip(b"\0").decode()

    def call(self, name: str, args: ctypes.Structure) -> None:
        """As ``dpo_kernels.native.call``."""
        sizes = {field: size for field, size in EXTENTS[name](args).items() if getattr(args, field)}
        pointers = [field for field, kind in args._fields_ if kind is ctypes.c_void_p and getattr(args, field)]
        assert sorted(pointers) == sorted(sizes)
        message = [struct.pack("=32sqq", name.encode(), ctypes.sizeof(args), len(sizes)), bytes(args)]
        for field, size in sizes.items():
            message.append(struct.pack("=qq", getattr(type(args), field).offset, size))
            message.append(ctypes.string_at(getattr(args, field), size))
        self.process.stdin.write(b"".join(message))
        self.process.stdin.flush()
        answer = type(args).from_buffer_copy(self._read(ctypes.sizeof(args)))
        for field, size in sizes.items():
            ctypes.memmove(getattr(args, field), self._read(size), size)
        for field, kind in args._fields_:
            if kind is not ctypes.c_void_p:
                setattr(args, field, getattr(answer, field))

    def close(self) -> None:
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait(timeout=60)

    def _read(self, size: int) -> bytes:
        data = self.process.stdout.read(size)
        assert len(data) == size, f"the driver ended with exit code {self.process.wait(timeout=60)}"
        return data


def _rows(count: int, stride: int, width: int, size: int) -> int:
    """Bytes from the first element of rows to the last."""
    return ((count - 1) * stride + width) * size if count and width else 0


def _of_logits(args: ctypes.Structure) -> dict[str, int]:
    n, v = args.rows, args.columns
    sizes = {name: 4 * n for name, kind in args._fields_ if kind is ctypes.c_void_p}
    sizes |= {"block": _rows(n, args.stride, v, 4), "bias": 4 * v, "label": 8 * n}
    if "weighted" in sizes:
        tiles = -(-v // args.tile_columns) if args.tile_columns else 0
        sizes |= {"top_column": 8 * n, "weighted": _rows(n, args.weighted_stride, args.weighted_columns, 4)}
        sizes |= {"tile_sum": _rows(n, args.tile_stride, tiles, 4)}
    return sizes


def _of_conversion(args: ctypes.Structure) -> dict[str, int]:
    sizes = {"factor": 4 * args.rows}
    for name in ("in", "out"):
        stride, dtype = getattr(args, f"{name}_stride"), getattr(args, f"{name}_dtype")
        sizes[name] = _rows(args.rows, stride, args.columns, 2 if dtype else 4)
    return sizes


def _of_product(args: ctypes.Structure) -> dict[str, int]:
    extents = {
        "a": (args.rows, args.a_row, args.depth, args.a_depth),
        "b": (args.depth, args.b_depth, args.columns, args.b_column),
        "out": (args.rows, args.out_row, args.columns, 1),
    }
    sizes = {name: 4 * ((m - 1) * row + (n - 1) * column + 1) for name, (m, row, n, column) in extents.items()}
    return sizes | {"scratch": SCRATCH_BYTES}


def _of_attention(args: ctypes.Structure) -> dict[str, int]:
    tokens, size = args.num_tokens, 2 if args.dtype else 4
    heads = {"query": args.query_heads, "key": args.key_heads, "value": args.key_heads, "grad_output": args.query_heads}
    widths = {"query": args.key_dim, "key": args.key_dim, "value": args.value_dim, "grad_output": args.value_dim}
    sizes = {}
    for name, width in widths.items():
        token, head = (getattr(args, f"{name.removesuffix('_output')}_{step}") for step in ("token", "head"))
        sizes[name] = ((tokens - 1) * token + (heads[name] - 1) * head + width) * size
    for name in ("query", "key", "value"):
        sizes[f"grad_{name}"] = tokens * heads[name] * widths[name] * size
    sizes |= {"output": tokens * args.query_heads * args.value_dim * size, "scales": 8 * tokens * args.query_heads}
    sizes |= {"segments": 32 * args.num_segments, "scratch": SCRATCH_BYTES}
    return sizes | dict.fromkeys(("sinks", "grad_sinks"), 4 * args.query_heads)


EXTENTS: dict[str, Callable[[ctypes.Structure], dict[str, int]]] = {
    "fold": _of_logits,
    "gradient": _of_logits,
    "convert": _of_conversion,
    "product": _of_product,
    "attention_forward": _of_attention,
    "attention_backward": _of_attention,
}
"""Bytes of the arrays that the structs point to; of those that are null, anything."""
