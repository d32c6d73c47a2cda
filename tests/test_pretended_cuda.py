"""The pretended device refuses what a GPU would make the host wait for, and what its libraries refuse."""

from __future__ import annotations

import pytest
import torch

from tests.pretended_cuda import CUDA, HostWaitError, OnDevice, UnsafeCopyError, on_host, pretended_cuda


@pytest.fixture
def cuda():
    with pretended_cuda() as device:
        yield device


WAITS = {
    "item": lambda x: x.sum().item(),
    "float": lambda x: float(x.sum()),
    "bool": lambda x: bool(x.sum() > 0),
    "if": lambda x: 1 if x.sum() > 0 else 2,
    "cpu": lambda x: x.cpu(),
    "to cpu": lambda x: x.to("cpu", non_blocking=True),
    "tolist": lambda x: x.tolist(),
    "mask": lambda x: x[x > 0],
    "assignment by mask": lambda x: x.index_put_((x > 0,), x.new_ones(1)),
    "nonzero": lambda x: x.nonzero(),
    "equal": lambda x: torch.equal(x, x),
    "unique": lambda x: x.unique(),
    "index of the host": lambda x: x[torch.tensor([0, 1])],
    "pageable": lambda x: torch.zeros(3).to(CUDA),
    "pageable, not blocking": lambda x: torch.zeros(3).to(CUDA, non_blocking=True),
    "pinned, blocking": lambda x: torch.zeros(3).pin_memory().to(CUDA),
    "list": lambda x: torch.tensor([1, 2], device=CUDA),
    "copy into pageable": lambda x: torch.zeros(3, 4).copy_(x, non_blocking=True),
    "repeats": lambda x: x.repeat_interleave(x.new_ones(3).long(), dim=0),
    "float32 experts": lambda x: torch._grouped_mm(x.new_ones(1, 8), x.new_ones(1, 8, 8), x.new_ones(1).int()),
}


@pytest.mark.parametrize("case", WAITS)
def test_waits(case, cuda):
    x = torch.ones(3, 4, device=CUDA)
    with pytest.raises(HostWaitError):
        WAITS[case](x)
    with cuda.waiting():
        WAITS[case](x)
    assert cuda.waits >= 1


RUNS = {
    "factory": lambda x: torch.zeros(3, device=CUDA),
    "pinned copy": lambda x: torch.zeros(3).pin_memory().to(CUDA, non_blocking=True),
    "offload": lambda x: torch.empty(3, 4, pin_memory=True).copy_(x, non_blocking=True).to(CUDA, non_blocking=True),
    "scalar of the host": lambda x: x + torch.tensor(1.0),
    "wide product": lambda x: torch.mm(x.half(), x.half().T, out_dtype=torch.float32),
    "index": lambda x: x[torch.zeros(2, dtype=torch.int64, device=CUDA)],
}


@pytest.mark.parametrize("case", RUNS)
def test_runs(case, cuda):
    result = RUNS[case](torch.ones(3, 4, device=CUDA))
    assert type(result) is OnDevice
    assert result.device == CUDA


def test_mixed_devices_are_refused(cuda):
    with pytest.raises(RuntimeError, match="cuda:0 and on the cpu"):
        torch.ones(3, device=CUDA) + torch.ones(3)


def test_numbers_and_gradients_are_those_of_the_cpu(cuda):
    layer = torch.nn.Linear(4, 3)
    x = torch.randn(5, 4)
    layer(x).square().sum().backward()
    expected = layer.weight.grad
    layer.zero_grad()
    cuda.take(layer)
    layer(x.pin_memory().to(CUDA, non_blocking=True)).square().sum().backward()
    assert torch.equal(on_host(layer.weight.grad), expected)


def test_a_page_locked_buffer_that_is_written_before_its_copy_is_done(cuda):
    buffer = torch.zeros(4).pin_memory()
    buffer.to(CUDA, non_blocking=True)
    buffer.fill_(1)
    with pytest.raises(UnsafeCopyError, match="written to before their copy"):
        torch.cuda.synchronize()


def test_a_page_locked_buffer_that_is_written_after_a_wait(cuda):
    buffer = torch.zeros(4).pin_memory()
    buffer.to(CUDA, non_blocking=True)
    torch.cuda.synchronize()
    buffer.fill_(1)


@pytest.mark.parametrize("written", [False, True])
def test_page_locked_memory_that_goes_to_the_device_and_comes_back(written, cuda):
    held = torch.ones(4).pin_memory()
    there = held.to(CUDA, non_blocking=True)
    if written:
        held.fill_(3)
        with pytest.raises(UnsafeCopyError, match="written to before their copy"):
            held.copy_(there + 1, non_blocking=True)
        return
    held.copy_(there + 1, non_blocking=True)
    torch.cuda.synchronize()
    assert held.tolist() == [2, 2, 2, 2]


def test_page_locked_memory_that_is_read_before_it_is_filled(cuda):
    held = torch.empty(4, pin_memory=True).copy_(torch.ones(4, device=CUDA), non_blocking=True)
    with pytest.raises(UnsafeCopyError, match="may still be filling"):
        held.sum()
    torch.cuda.synchronize()
    assert held.sum() == 4


def fused_step(parameter: torch.Tensor, grad: torch.Tensor, **scalars) -> None:
    optimizer = torch.optim.AdamW([parameter], fused=True)
    parameter.grad = grad
    for name, value in scalars.items():
        setattr(optimizer, name, value)
    optimizer.step()


def test_fused_adamw_takes_one_float_on_the_device(cuda):
    parameter = torch.nn.Parameter(torch.ones(3, 4, device=CUDA))
    one = torch.ones((), device=CUDA)
    fused_step(parameter, torch.ones_like(parameter), found_inf=one - 1, grad_scale=one)
    assert (on_host(parameter.detach()) < 1).all()
    before = on_host(parameter.detach()).clone()
    fused_step(parameter, torch.ones_like(parameter), found_inf=one, grad_scale=one)
    assert torch.equal(on_host(parameter.detach()), before)
    for name in ("found_inf", "grad_scale"):
        with pytest.raises(RuntimeError, match="must be one float32"):
            fused_step(parameter, torch.ones_like(parameter), **{name: one.double()})
        with pytest.raises((RuntimeError, HostWaitError)):
            fused_step(parameter, torch.ones_like(parameter), **{name: torch.ones(())})


def test_fused_adamw_refuses_gradients_of_another_layout(cuda):
    parameter = torch.nn.Parameter(torch.ones(3, 4, device=CUDA))
    with pytest.raises(RuntimeError, match="same dtype, device, and layout"):
        fused_step(parameter, torch.ones(4, 3, device=CUDA).T)
