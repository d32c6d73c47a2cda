"""An installed copy of this checkout, without pip."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.install.declared import FOLDERS, ROOT

LEFT_OUT = "dpo-kernels: the native library is left out: "


def run_setup(source: Path, *arguments: str, path: Path, compiler: Path | None = None) -> str:
    """Run ``setup.py`` with the programs of ``path`` alone; returns what it printed of the native library."""
    environment = {"PATH": str(path)} | ({"CXX": str(compiler)} if compiler else {})
    command = [sys.executable, "setup.py", "-q", *arguments]
    done = subprocess.run(command, cwd=source, env=environment, check=True, capture_output=True, text=True)
    lines = (done.stdout + done.stderr).splitlines()
    return "".join(line.removeprefix(LEFT_OUT) for line in lines if line.startswith(LEFT_OUT))


@pytest.fixture(scope="session")
def source(tmp_path_factory) -> Path:
    """A copy of what an installation needs of this checkout."""
    source = tmp_path_factory.mktemp("source")
    for folder in (*FOLDERS.values(), "csrc"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    return source


@pytest.fixture(scope="session")
def installed(source, tmp_path_factory) -> Path:
    """What ``pip install .`` puts into site-packages where there is no C++ compiler."""
    target, no_programs = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("bin")
    reason = run_setup(source, "build_py", "--build-lib", str(target), path=no_programs)
    assert reason.startswith("no C++ compiler")
    return target
