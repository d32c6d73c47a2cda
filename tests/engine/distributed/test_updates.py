"""What two processes make of the same gradients is what one makes of them, however weights and state are held.

Fused updates on the CPU round the last elements of a tensor in another way than those before, and tensors end elsewhere
when they are sharded. So float32 is compared to its last bits, and what is rounded must be equal but for few values.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.engine.distributed.launch import run_jobs
from tests.engine.distributed.updates import CASES, update

RANKS = 2


@pytest.fixture(scope="module")
def output(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("updates")
    for ended in run_jobs(folder, RANKS, [{"kind": "updates", "output": str(folder / "of")}]):
        assert ended.code == 0, ended.err
    return folder / "of"


@pytest.mark.parametrize("case", CASES)
def test_an_update_is_that_of_one_process(case, output):
    want = update(case)
    for rank in range(RANKS):
        got = torch.load(f"{output}-{case}.{rank}")
        assert got.keys() == want.keys()
        for name, tensor in want.items():
            assert got[name].dtype == tensor.dtype
            if tensor.dtype == torch.float32:
                torch.testing.assert_close(got[name], tensor, rtol=1e-6, atol=1e-9)
            else:
                assert (got[name] == tensor).double().mean() > 0.998, name
