"""Scores in the open: in blocks of queries, with what each block's window reaches, as without blocks."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from engine.model.attention import segments
from engine.packing.layout import Segment, plan_attention

H, K, D = 4, 2, 8
SEGMENTS = [Segment(0, 90, 0, 0), Segment(90, 130, 0, 30), Segment(130, 133, 0, 30), Segment(133, 150, 133, 133)]


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that an operation returns."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.size = max(self.size, result.numel())
        return result


def attend(*, window, softcap, sinks):
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, n, 150, D, generator=generator, dtype=torch.float64) for n in (H, K, K)]
    inputs += [torch.randn(H, generator=generator, dtype=torch.float64)] if sinks else []
    for x in inputs:
        x.requires_grad_()
    with Largest() as largest:
        options = {"scaling": 0.3, "window": window, "softcap": softcap, "sinks": inputs[3] if sinks else None}
        output = segments.open_attention(*inputs[:3], plan_attention(SEGMENTS), **options)
        grads = torch.autograd.grad(output.square().sum(), inputs)
    return output, grads, largest.size


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 7, 40, 1000])
def test_blocks_change_nothing(monkeypatch, window, softcap, sinks):
    whole, whole_grads, _ = attend(window=window, softcap=softcap, sinks=sinks)
    monkeypatch.setattr(segments, "OPEN_SCORES", H * 90 * 8)
    blocks, block_grads, size = attend(window=window, softcap=softcap, sinks=sinks)
    torch.testing.assert_close(blocks, whole, atol=1e-13, rtol=1e-13)
    for got, want in zip(block_grads, whole_grads, strict=True):
        torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)
    # no more than the output has; all scores of the first segment are H * 90 * 90
    assert size == blocks.numel()
