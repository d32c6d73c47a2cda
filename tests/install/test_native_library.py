"""Building the native library on the way of an installation, with a compiler that only writes what it is asked for."""

from __future__ import annotations

import shutil
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.install.conftest import run_setup
from tests.install.declared import ROOT

LIBRARY = "dpo_kernels/libdpo_native.so"


@pytest.fixture
def checkout(source, tmp_path) -> Path:
    return shutil.copytree(source, tmp_path / "checkout")


def compiler(folder: Path, script: str) -> Path:
    """A C++ compiler that does what the shell script says; ``$target`` is the file it should write."""
    program = folder / "compiler"
    quiet = '[ "$1" = -dumpmachine ] && exit'
    lines = ["#!/bin/sh", quiet, "for target; do :; done", f'echo "$@" >> {folder}/commands', script]
    program.write_text("\n".join(lines) + "\n")
    program.chmod(0o755)
    return program


def test_library_lies_beside_its_loader(checkout, tmp_path):
    made = compiler(tmp_path, 'echo "$@" > "$target"')
    reason = run_setup(checkout, "build_py", "--build-lib", str(tmp_path / "site"), path=tmp_path, compiler=made)
    assert reason == ""
    assert (tmp_path / "site" / LIBRARY).is_file()
    assert [path.name for path in (tmp_path / "site").rglob("*.part")] == []
    commands = (tmp_path / "commands").read_text().splitlines()
    *compiled, linked = [line.split() for line in commands]
    sources = [Path(line[line.index("-c") + 1]) for line in compiled]
    assert {path.name for path in sources} == {path.name for path in (ROOT / "csrc").glob("*.cpp")}
    for path, line in zip(sources, compiled, strict=True):
        sets = [word for word in line if word.startswith("-DDPO_ISA_")]
        assert len(sets) == path.stem.endswith("_kernels")
        # What every processor of the family runs may not be compiled for a newer one.
        newer = sets in (["-DDPO_ISA_AVX2=1"], ["-DDPO_ISA_AVX512=1"])
        assert any(word.startswith("-m") for word in line) == newer
    assert "-shared" in linked
    assert len([word for word in linked if word.endswith(".o")]) == len(compiled)


@pytest.mark.parametrize("script", ["echo 'x.cpp:1: error: no such thing' >&2; exit 1", "exit 1"])
def test_a_compiler_that_fails_leaves_no_library(script, checkout, tmp_path):
    stale = tmp_path / "site" / LIBRARY
    stale.parent.mkdir(parents=True)
    stale.touch()
    broken = compiler(tmp_path, script)
    reason = run_setup(checkout, "build_py", "--build-lib", str(tmp_path / "site"), path=tmp_path, compiler=broken)
    assert reason in ("x.cpp:1: error: no such thing", "exit code 1")
    assert not stale.exists()
    assert (tmp_path / "site" / "dpo_kernels" / "native.py").is_file()


def test_compiler_of_the_environment_that_is_not_there_is_named(checkout, tmp_path):
    absent = tmp_path / "no-such-compiler"
    reason = run_setup(checkout, "build_py", "--build-lib", str(tmp_path / "site"), path=tmp_path, compiler=absent)
    assert reason == f"no C++ compiler ({absent})"


def test_a_compiler_that_does_not_run_is_named(checkout, tmp_path):
    garbage = tmp_path / "garbage"
    garbage.write_text("no program")
    garbage.chmod(0o755)
    reason = run_setup(checkout, "build_py", "--build-lib", str(tmp_path / "site"), path=tmp_path, compiler=garbage)
    assert reason == f"{garbage} does not run: Exec format error"
    assert (tmp_path / "site" / "dpo_kernels" / "native.py").is_file()


@pytest.mark.parametrize("built", [True, False])
def test_wheel_is_for_one_platform_where_it_holds_the_library(built: bool, checkout, tmp_path):
    made = compiler(tmp_path, 'echo "$@" > "$target"') if built else None
    run_setup(checkout, "bdist_wheel", "-d", str(tmp_path / "wheels"), path=tmp_path, compiler=made)
    (wheel,) = (tmp_path / "wheels").iterdir()
    tag = wheel.stem.partition("-py3-none-")[2]
    assert (tag == "any") != built
    names = zipfile.ZipFile(wheel).namelist()
    assert (LIBRARY in names) == built
    assert "dpo_kernels/native.py" in names


def test_editable_installation_builds_in_place(checkout, tmp_path):
    made = compiler(tmp_path, 'echo "$@" > "$target"')
    run_setup(checkout, "editable_wheel", "-d", str(tmp_path / "wheels"), path=tmp_path, compiler=made)
    assert (checkout / LIBRARY).is_file()


def test_sdist_holds_the_sources_and_no_library(checkout, tmp_path):
    (checkout / LIBRARY).touch()
    run_setup(checkout, "sdist", "-d", str(tmp_path / "dist"), path=tmp_path)
    (archive,) = (tmp_path / "dist").iterdir()
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    assert {f"csrc/{path.name}" for path in (ROOT / "csrc").iterdir() if path.is_file()} <= names
    assert not [name for name in names if name.endswith(".so")]
