"""Compile kernels for chips that need not be here, and read what each takes of them.

Launchers run as they are, on meta tensors: a stand-in driver names the chip, and launching stops after compilation. The
PTX then goes through Triton's own ptxas once more, whose report gives registers, spills and warnings. Not for a process
that set TRITON_INTERPRET=1, where nothing is compiled.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.runtime import driver
from triton.runtime.jit import JITFunction

SHARED_MEMORY = {
    **dict.fromkeys(("sm_80", "sm_87"), 163),
    **dict.fromkeys(("sm_90", "sm_100", "sm_103"), 227),
    **dict.fromkeys(("sm_86", "sm_89", "sm_120", "sm_121"), 99),
}
"""KiB that one block may use."""


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes."""

    kernel: str
    arch: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    num_warps: int
    tensor_cores: str
    """Name of the tensor-core instruction in its PTX, or empty."""
    warnings: tuple[str, ...]
    narrow_products: tuple[str, ...]
    """Lines of its intermediate code that multiply a size or a stride in 32 bits; see `narrow_products`."""

    def flaw(self) -> str | None:
        """Why the chip would not run this kernel, or would run it badly; None when nothing is wrong."""
        if self.shared_bytes > SHARED_MEMORY[self.arch] * 1024:
            return "too much shared memory"
        if self.spilled_bytes:
            return "spilled registers"
        return "warnings of the assembler" if self.warnings else None


class _OfflineDriver:
    """What Triton asks a driver for before it compiles."""

    def __init__(self, arch: str):
        self.target = GPUTarget("cuda", _capability(arch), 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        # Compiled kernels are kept by device: one per chip, so that chips do not share them.
        return f"offline {self.target.arch}"

    def get_current_stream(self, device: str) -> int:
        return 0


@contextlib.contextmanager
def compiling_for(arch: str) -> Iterator[list[Any]]:
    """Launches inside compile for `arch` and do not run; yields the list that the compiled kernels go to."""
    compiled: list[Any] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, warmup: bool = False, **kwargs: Any) -> Any:
        kernel = run(self, *args, warmup=True, **kwargs)
        compiled.append(kernel)
        return kernel

    previous = driver._active
    JITFunction.run = compile_only
    driver.set_active(_OfflineDriver(arch))
    try:
        yield compiled
    finally:
        JITFunction.run = run
        driver._active = previous


def inspect_kernel(kernel: Any, arch: str) -> Resources:
    """Assemble the PTX of a compiled kernel and read the assembler's report."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(kernel.asm["ptx"])
        suffix = "a" if _capability(arch) >= 90 else ""
        command = [get_ptxas(_capability(arch)).path, "-v", f"--gpu-name={arch}{suffix}", str(source)]
        result = subprocess.run([*command, "-o", f"{folder}/out"], capture_output=True, text=True, check=False)
    report = result.stdout + result.stderr
    if result.returncode:
        raise RuntimeError(f"ptxas failed for {kernel.metadata.name} on {arch}: {report}")
    spills = re.findall(r"(\d+) bytes spill", report)
    used = re.search(r"Used (\d+) registers", report)
    assert used, report
    instructions = ("tcgen05.mma", "wgmma.mma_async", "mma.sync")
    return Resources(
        kernel=kernel.metadata.name,
        arch=arch,
        registers=int(used[1]),
        spilled_bytes=sum(map(int, spills)),
        shared_bytes=kernel.metadata.shared,
        num_warps=kernel.metadata.num_warps,
        tensor_cores=next((name for name in instructions if name in kernel.asm["ptx"]), ""),
        warnings=tuple(re.findall(r"\(C\d+\)[^\n]*|C75\d\d[^\n]*", report)),
        narrow_products=narrow_products(kernel.asm["ttir"]),
    )


_SAME_SIZE = ("arith.addi", "arith.subi", "tt.splat", "tt.broadcast", "tt.expand_dims")


def narrow_products(ttir: str) -> tuple[str, ...]:
    """Products of 32 bits with a size or a stride, which wrap where a matrix has more than 2^31 elements.

    A size is an integer argument of the kernel, also with a number added. Indices, such as a tile's number times its
    width, stay below a size themselves, and so may have 32 bits.
    """
    head, _, body = ttir.partition("tt.func public")[2].partition("\n")
    sizes = set(re.findall(r"(%\w+): i32", head))
    numbers: set[str] = set()
    found = []
    for name, operation, rest in re.findall(r"(%\w+) = ([\w.]+) ([^\n]*)", body):
        operands = re.findall(r"%\w+", rest.partition(" : ")[0])
        if operation == "arith.constant":
            numbers.add(name)
        elif operation in _SAME_SIZE and sizes.intersection(operands) and sizes.union(numbers).issuperset(operands):
            sizes.add(name)
        elif (
            operation == "arith.muli" and re.search(r" : (?:tensor<[\dx]*x)?i32", rest) and sizes.intersection(operands)
        ):
            found.append(f"{name} = {operation} {rest.partition(' loc(')[0]}")
    return tuple(found)


def _capability(arch: str) -> int:
    return int(arch.removeprefix("sm_"))
