"""One buffer, one copy, the same values."""

from __future__ import annotations

from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from dpo_kernels.chunks import to_device
from engine.data.groups import PreferenceGroup
from engine.packing import build_batch
from engine.packing.transfer import gather, send
from engine.train.feed import TrainingPack

CPU, META = torch.device("cpu"), torch.device("meta")


class Copies(TorchDispatchMode):
    """Counts what is moved to another device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and func is torch.ops.aten._to_copy.default:
            self.count += out.device != args[0].device
        return out


def pack(*, share: bool, references: bool) -> TrainingPack:
    generator = np.random.default_rng(0)
    sizes = [(3, 5, 2), (1, 1, 7)]
    groups = []
    for row, (prompt, *responses) in enumerate(sizes):
        ids = [generator.integers(0, 99, n, dtype=np.int32) for n in (prompt, *responses)]
        groups.append(PreferenceGroup(row, ids[0], tuple(ids[1:])))
    batch = build_batch(groups, share_prompts=share)
    return TrainingPack(batch, torch.randn(4) if references else None)


def tensors(record: TrainingPack) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    record.map_tensors(lambda t: found.append(t) or t)
    return found


@pytest.mark.parametrize("references", [True, False])
@pytest.mark.parametrize("share", [True, False])
def test_a_pack_is_one_buffer_with_the_same_values(share, references):
    built = pack(share=share, references=references)
    gathered = gather(built, pin=False)
    arrived = send(gathered, CPU)
    assert len(tensors(built)) == 9 + 2 * share + references
    assert len({t.untyped_storage().data_ptr() for t in tensors(gathered)}) == 1
    for copy in (gathered, arrived):
        for got, want in zip(tensors(copy), tensors(built), strict=True):
            assert got.dtype == want.dtype
            assert torch.equal(got, want)
            assert got.data_ptr() % 16 == 0
        assert copy.batch.plan.segments == built.batch.plan.segments
        assert torch.equal(copy.batch.cu_responses_S1, built.batch.cu_responses_S1)


def test_one_copy_takes_a_gathered_pack_to_the_device():
    built = pack(share=True, references=True)
    with Copies() as apart:
        built.to(META)
    with Copies() as together:
        moved = gather(built, pin=False).to(META)
    assert (apart.count, together.count) == (12, 1)
    assert all(t.is_meta for t in tensors(moved))
    assert moved.batch.cu_responses_S1.device == CPU
    assert [t.shape for t in tensors(moved)] == [t.shape for t in tensors(built)]
    assert built.to(CPU) is built


def test_a_tensor_without_data_goes_to_a_gpu():
    """As in a forecast of memory."""
    device = torch.device("cuda", 0)
    with patch("torch.cuda._lazy_init"), FakeTensorMode(allow_non_fake_inputs=True):
        assert to_device(torch.arange(3), device).device == device


@pytest.mark.cuda
def test_a_page_locked_pack_arrives_as_it_is():
    built = pack(share=True, references=True)
    locked = gather(built, pin=True)
    assert all(t.is_pinned() for t in tensors(locked))
    arrived = locked.to(torch.device("cuda"))
    torch.cuda.synchronize()
    assert all(torch.equal(a.cpu(), b) for a, b in zip(tensors(arrived), tensors(built), strict=True))
