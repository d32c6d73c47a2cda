"""Builds the native library: every ``*.cpp`` of this folder, with whatever C++ compiler is there; needs no package.

``*_kernels.cpp`` are compiled once per instruction set of the processor's family, everything else once for the oldest
member of it; the library chooses when it is loaded.
By hand: ``python csrc/build_native.py [--sanitize] [--output FILE]``.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).resolve().parent
LIBRARY = "libdpo_native.so"
COMPILERS = ("c++", "g++", "clang++")
# Contraction would make a result depend on what a compiler merges.
FLAGS = [
    *("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden"),
    *("-ffp-contract=off", "-fno-math-errno", "-pthread"),
]
# Two are off: gcc 12 warns of its own header for AVX-512.
WARNINGS = ["-Wall", "-Wextra", "-Wno-uninitialized", "-Wno-maybe-uninitialized", "-Wno-unknown-warning-option"]
SANITIZE = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
INSTRUCTION_SETS = {
    "x86_64": {"PLAIN": [], "AVX2": AVX2, "AVX512": AVX2 + AVX512},
    "aarch64": {"PLAIN": [], "NEON": []},
}
NAMES = {"AMD64": "x86_64", "amd64": "x86_64", "arm64": "aarch64"}


class BuildError(Exception):
    """Why there is no library: one line."""


def find_compiler() -> list[str]:
    """The command of the C++ compiler: ``CXX`` of the environment, or the first that the path has.

    Raises:
        BuildError: there is none.
    """
    try:
        given = shlex.split(os.environ.get("CXX", ""))
    except ValueError as error:
        raise BuildError(f"CXX={os.environ['CXX']}: {error}") from error
    for command in [given] if given else [[name] for name in COMPILERS]:
        if shutil.which(command[0]):
            return command
    raise BuildError(f"no C++ compiler ({' '.join(given) or ', '.join(COMPILERS)})")


def digest() -> str:
    """SHA-256 of what the library is built from, this file with its flags included."""
    found = hashlib.sha256()
    for path in sorted([*SOURCES.glob("*.cpp"), *SOURCES.glob("*.h"), Path(__file__)]):
        found.update(f"{path.name} {path.stat().st_size}\n".encode() + path.read_bytes())
    return found.hexdigest()


def build(output: Path, *, sanitize: bool = False, machine: str = "") -> None:
    """Compile and link the library to ``output``, which appears whole or not at all.

    Args:
        sanitize: with the address and undefined-behaviour sanitizers.
        machine: the processor's family; by default what the compiler compiles for.

    Raises:
        BuildError: there is no compiler, or it fails.
    """
    if sys.platform == "win32":
        raise BuildError("it is not built on Windows")
    if not any(SOURCES.glob("*.cpp")):
        raise BuildError(f"no sources in {SOURCES}")
    compiler = find_compiler()
    flags = [*FLAGS, *WARNINGS, *(SANITIZE if sanitize else []), f'-DDPO_SOURCES="{digest()}"']
    machine = machine or target_of(compiler)
    sets = INSTRUCTION_SETS.get(NAMES.get(machine, machine), {"PLAIN": []})
    with tempfile.TemporaryDirectory() as folder:
        commands = {}
        for source in sorted(SOURCES.glob("*.cpp")):
            for name, own in sets.items() if source.stem.endswith("_kernels") else [("", [])]:
                chosen = [*own, f"-DDPO_ISA_{name}=1"] if name else []
                target = f"{folder}/{source.stem}{name}.o"
                commands[target] = [*compiler, *flags, *chosen, "-c", str(source), "-o", target]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(run, commands.values()))
        output.parent.mkdir(parents=True, exist_ok=True)
        part = output.with_name(f"{output.name}.{os.getpid()}.part")
        try:
            run([*compiler, *flags, "-shared", *commands, "-o", str(part)])
            part.replace(output)
        finally:
            part.unlink(missing_ok=True)


def target_of(compiler: list[str]) -> str:
    """The family of processors that a compiler compiles for; that of this machine where it does not tell."""
    try:
        done = subprocess.run([*compiler, "-dumpmachine"], capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise BuildError(f"{compiler[0]} does not run: {error.strerror or error}") from error
    return done.stdout.strip().partition("-")[0] or platform.machine()


def run(command: list[str]) -> None:
    """Run a compiler; BuildError with the first line that it calls an error."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise BuildError(f"{command[0]} does not run: {error.strerror or error}") from error
    if done.returncode:
        lines = done.stderr.splitlines() or [f"exit code {done.returncode}"]
        raise BuildError(next((line for line in lines if "error" in line), lines[0]).strip())
    if done.stderr:
        print(done.stderr, file=sys.stderr)


def main() -> int:
    parser = argparse.ArgumentParser(description="Build the native library of dpo_kernels.")
    parser.add_argument("--output", type=Path, default=SOURCES.parent / "dpo_kernels" / LIBRARY)
    parser.add_argument("--sanitize", action="store_true", help="with the address and undefined-behaviour sanitizers")
    arguments = parser.parse_args()
    try:
        build(arguments.output, sanitize=arguments.sanitize)
    except BuildError as reason:
        print(f"error: {reason}", file=sys.stderr)
        return 2
    print(arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
