"""Liger's layers are refused where they cannot run; what they compute is tried in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine.errors import UserError
from engine.model.kernels import liger
from engine.model.kernels.choice import fuse_blocks
from tests.conformance.families import tiny_config, tiny_model
from tests.engine.model.test_attention import make_policy

FOLDER = Path(__file__).parent / "interpreted"


def test_in_the_interpreter(request: pytest.FixtureRequest):
    pytest.importorskip("triton")
    pytest.importorskip("liger_kernel")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(FOLDER)]
    if request.config.getoption("--slow"):
        command.append("--slow")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    root = request.config.rootpath
    result = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]


@pytest.mark.parametrize(
    ("family", "devices", "reason"),
    [
        ("llama", ("cuda",), "a CUDA device is needed, and this is cpu"),
        ("cohere", ("cpu",), r"liger-kernel \S+ has no layers for cohere"),
        ("llama", ("cpu",), r"liger-kernel is not installed \(pip install dpo-kernels\[liger\]\)"),
    ],
)
def test_an_explicit_request_says_why_it_cannot_be_met(family, devices, reason, monkeypatch):
    monkeypatch.setattr(liger, "DEVICES", devices)
    if "not installed" in reason:
        monkeypatch.setattr(liger, "find_spec", lambda name: None)
    elif devices == ("cpu",):
        pytest.importorskip("liger_kernel")
    policy = make_policy(tiny_model(tiny_config(family)))
    with pytest.raises(UserError, match=rf"^model\.kernels=liger cannot be used here: {reason}; set .* to auto$"):
        fuse_blocks(policy, "liger")
    assert not policy.exchange.changes
    assert not any(isinstance(vars(module).get("forward"), torch.nn.Module) for module in policy.modules())
