"""FlexAttention as it is asked for here becomes kernels, forward and backward, that chips can run. No GPU is involved.

They are torch's own, so their speed is not judged; that they compile, and fit, is.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton.backends.nvidia")

from dpo_kernels.kernels.offline import SHARED_MEMORY

ROOT = Path(__file__).parents[3]
LAYERS = ("gemma 2", "gpt-oss", "llama 4", "plain", "narrow", "odd widths")


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.slow
def test_kernels_fit(layer, arch):
    command = [sys.executable, "-m", "tests.engine.model.flex_lowering", layer, arch]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(found) == 2
    for kernel in found:
        assert kernel["tensor_cores"], kernel
        assert kernel["shared_bytes"] <= SHARED_MEMORY[arch] * 1024, kernel
