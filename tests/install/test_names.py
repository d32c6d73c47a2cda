"""What an installed copy is called: two packages of their own names, beside which a project may have its ``engine``."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.install.declared import FOLDERS, ROOT, project

NOT_OURS = "raise ImportError('this is the engine of another project')\n"
IMPORT_ALL = """
import importlib, pkgutil
import dpo_engine, dpo_kernels

for module in pkgutil.walk_packages(dpo_engine.__path__, "dpo_engine."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
"""


@pytest.fixture
def run(installed, tmp_path):
    """Python with the installed copy, in a project that has an ``engine`` and comes first."""
    foreign = tmp_path / "engine"
    foreign.mkdir()
    (foreign / "__init__.py").write_text(NOT_OURS)

    def start(*arguments: str) -> subprocess.CompletedProcess[str]:
        variables = os.environ | {"PYTHONPATH": f"{tmp_path}:{installed}"}
        return subprocess.run([sys.executable, *arguments], cwd=tmp_path, env=variables, capture_output=True, text=True)

    return start


COPIED: dict[str, set[str]] = {
    "dpo_kernels": {"hopper_logits.cu", "hopper_machine.cuh", "hopper_epilogue.cuh"},
    "dpo_engine": set(),
}
"""What comes from csrc/ and is compiled where it runs."""


def files(folder: Path) -> set[str]:
    """The files below a folder, but for what Python compiled when another test ran it, and the native library."""
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p.suffix not in (".pyc", ".so")}


def test_two_names_and_every_file(installed):
    assert sorted(path.name for path in installed.iterdir()) == sorted(FOLDERS)
    for package, folder in FOLDERS.items():
        assert files(installed / package) == files(ROOT / folder) | COPIED[package]


def test_the_command_beside_another_engine(run):
    module, _, function = project()["scripts"]["dpo"].partition(":")
    script = f"import sys; from {module} import {function}; sys.exit({function}())"
    done = run("-c", script, "--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("dpo-kernels ")
    assert run("-m", "dpo_engine", "--version").stdout == done.stdout


def test_every_module_beside_another_engine(run):
    done = run("-c", IMPORT_ALL)
    assert done.returncode == 0, done.stderr


def test_imports_inside_are_relative():
    for path in sorted((ROOT / "engine").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            own = [name for name in names if name.partition(".")[0] in {"engine", "dpo_engine"}]
            assert not own, f"{path}:{node.lineno} imports {own[0]} by its full name"
