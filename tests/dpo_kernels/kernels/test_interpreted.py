"""Numerics of the Triton kernels in Triton's interpreter, which a process chooses before it imports triton."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

FILES = sorted((Path(__file__).parent / "interpreted").glob("test_*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_in_the_interpreter(file: Path, request: pytest.FixtureRequest):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(file)]
    if request.config.getoption("--slow"):
        command.append("--slow")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(
        command, env=environment, cwd=request.config.rootpath, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
