"""What two processes make of the same gradients is what one makes of them, however weights and state are held.

Fused updates on the CPU round the last elements of a tensor in another way than those before, and tensors end elsewhere
when they are sharded. So float32 is compared to its last bits, and what is rounded must be equal but for few values.
Updates with moments in 8 bits are made of whole blocks, and are equal to the bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.train.row_blocks import SCALES
from tests.engine.distributed.launch import run_jobs
from tests.engine.distributed.updates import CASES, update

RANKS = 2


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> tuple[str, dict[str, dict[str, Tensor]]]:
    """Where what one process has stored lies, and what it ends with."""
    output = str(tmp_path_factory.mktemp("updates") / "of")
    return output, {case: update(case, target=Path(f"{output}-{case}-1")) for case in CASES}


@pytest.fixture(scope="module")
def output(alone) -> str:
    output, _ = alone
    for ended in run_jobs(Path(output).parent, RANKS, [{"kind": "updates", "output": output}]):
        assert ended.code == 0, ended.err
    return output


@pytest.mark.parametrize("how", ["whole", "resumed"])
@pytest.mark.parametrize("case", CASES)
def test_an_update_is_that_of_one_process(case, how, alone, output):
    for rank in range(RANKS):
        assert_same(torch.load(f"{output}-{case}-{how}.{rank}"), alone[1][case])


@pytest.mark.parametrize("case", CASES)
def test_one_process_goes_on_from_what_two_have_stored(case, alone, output):
    assert_same(update(case, source=Path(f"{output}-{case}-{RANKS}")), alone[1][case])


def assert_same(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype
        if f"{SCALES[0]}/{name.split('/')[-1]}" in want:
            assert torch.equal(got[name], tensor), name
        elif tensor.dtype == torch.float32:
            torch.testing.assert_close(got[name], tensor, rtol=1e-6, atol=1e-9)
        else:
            assert (got[name] == tensor).double().mean() > 0.998, name
