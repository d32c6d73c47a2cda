"""The examples of CONTRIBUTING.md are complete: applied to a copy of the checkout, their last commands succeed."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", (ROOT / "CONTRIBUTING.md").read_text(), re.M | re.S))


def blocks(section: str, language: str) -> list[str]:
    """The fenced blocks of a section in one language, without the indentation of the list that they stand in."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^\1```$", section, re.M | re.S)
    return [textwrap.dedent(indent + body if not body.startswith(indent) else body) for indent, body in found]


def edit(folder: Path, block: str) -> None:
    """Apply the lines of a block to the one place of its file that they fit."""
    head, *lines = block.rstrip("\n").splitlines()
    path = folder / head.removeprefix("+++ ")
    before = "\n".join(line[1:] for line in lines if not line.startswith("+"))
    after = "\n".join(line[1:] for line in lines if not line.startswith("-"))
    text = path.read_text()
    assert text.count(before) == 1, f"{path.name}: {before!r} is there {text.count(before)} times"
    path.write_text(text.replace(before, after))


@pytest.fixture
def checkout(tmp_path):
    for name in ("dpo_kernels", "engine", "benchmarks", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", SECTIONS)
def test_an_example_is_all_that_it_takes(name, checkout):
    if "kernel" in name or "loss" in name:
        pytest.importorskip("triton")
    section = SECTIONS[name]
    for block in blocks(section, "diff"):
        edit(checkout, block)
    for block in blocks(section, "python"):
        head, _, body = block.partition("\n")
        path = checkout / head.removeprefix("# ")
        assert not path.exists()
        path.write_text(body)
    (commands,) = blocks(section, "sh")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")} | {"PYTHONPATH": str(checkout)}
    for line in commands.splitlines():
        *settings, program = re.split(r"(?<=^TRITON_INTERPRET=1) ", line)
        arguments = shlex.split(program)
        assert arguments[0] == "python"
        extra = dict(setting.split("=") for setting in settings)
        done = subprocess.run(
            [sys.executable, *arguments[1:]], cwd=checkout, env=environment | extra, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_every_section_has_one():
    assert len(SECTIONS) == 5
    assert all(blocks(section, "diff") and blocks(section, "sh") for section in SECTIONS.values())
