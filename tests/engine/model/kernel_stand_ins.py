"""Stand-ins on the CPU of the kernels that keep sequences apart which are laid end to end.

Each takes and refuses what the real function does, written from the sources of causal_conv1d 1.7.0,
flash-linear-attention 0.6.0 and mamba_ssm 2.3.2, and computes one sequence after another with transformers' own torch
code.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F

Fault = str
"""What a stand-in does wrong: see ``FAULTS``."""
FAULTS = {
    "convolution": "the convolution reads across boundaries",
    "state": "the recurrence goes on across boundaries",
    "chunks": "the recurrence goes on across boundaries where a chunk of 64 tokens begins",
    "backward": "the backward pass of the convolution reads across boundaries",
    "refusal": "the recurrence has no gradients where it is given boundaries",
}
NO_GRADIENTS: Fault = "hopper"
"""The recurrence has no gradients at all, in the words of flash-linear-attention on Hopper GPUs."""
HOPPER = (
    "Triton >= 3.4.0 and < 3.7.1 on Hopper GPUs produces incorrect results for gated chunk_bwd_dqkwg (see #640). "
    "Please upgrade Triton to >= 3.7.1 or install tilelang: `pip install tilelang`"
)


def original(function: Callable) -> Callable:
    """The torch code of a function that transformers replaces where a package is installed."""
    return _cells(function)["torch_function"].cell_contents


def _cells(function: Callable) -> dict[str, Any]:
    return dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))


def install(monkeypatch: pytest.MonkeyPatch, function: Callable, stand_in: Callable) -> None:
    """Have transformers call a stand-in, as it calls the function of a package that was there when it was imported."""
    cells = _cells(function)
    values = {
        "implementation": stand_in,
        "applicable_params": tuple(inspect.signature(stand_in).parameters),
        "is_new_implementation": True,
    }
    for name, value in values.items():
        monkeypatch.setattr(cells[name], "cell_contents", value)


def require(condition: bool, words: str) -> None:
    if not condition:
        raise RuntimeError(words)


def convolve(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, seq_idx: torch.Tensor | None):
    """[B, D, T]: a causal convolution that reads nothing of another sequence."""
    width = weight.shape[1]
    numbers = torch.zeros(len(x), x.shape[2], dtype=torch.int32) if seq_idx is None else seq_idx
    padded, earlier = F.pad(x, (width - 1, 0)), F.pad(numbers, (width - 1, 0), value=-1)
    out = 0.0 if bias is None else bias[None, :, None]
    for i in range(width):
        taps = slice(i, i + x.shape[2])
        out = (
            out
            + torch.where((earlier[:, taps] == numbers)[:, None], padded[:, :, taps], 0.0) * weight[None, :, i, None]
        )
    return out


class _WrongBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, seq_idx):
        ctx.save_for_backward(x, weight)
        return convolve(x, weight, None, seq_idx)

    @staticmethod
    def backward(ctx, grad):
        x, weight = (t.detach().requires_grad_() for t in ctx.saved_tensors)
        with torch.enable_grad():
            out = convolve(x, weight, None, None)
        return *torch.autograd.grad(out, (x, weight), grad), None


class _NoBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError(HOPPER)


def recurrence(out: torch.Tensor, fault: Fault | None, *, bounded: bool) -> torch.Tensor:
    """What a recurrence gives, of rows end to end or not; by a kernel at fault without gradients."""
    return _NoBackward.apply(out) if fault == NO_GRADIENTS or (fault == "refusal" and bounded) else out


def causal_conv1d(fault: Fault | None = None) -> Callable:
    def causal_conv1d_fn(
        x,
        weight,
        bias=None,
        seq_idx=None,
        initial_states=None,
        return_final_states=False,
        final_states_out=None,
        activation=None,
    ):
        if activation not in [None, "silu", "swish"]:
            raise NotImplementedError("activation must be None, silu, or swish")
        if x.stride(2) != 1 and x.stride(1) != 1:
            x = x.contiguous()
        batch, dim, length = x.shape
        channel_last = x.stride(1) == 1 and x.stride(2) > 1
        if channel_last:
            require(dim % 8 == 0, "causal_conv1d only supports channel dimension divisible by 8 for now")
            require(x.stride(2) % 8 == 0 and x.stride(0) % 8 == 0, "strides must be multiples of 8")
        require(weight.shape[0] == dim and 2 <= weight.shape[1] <= 4, "only supports width between 2 and 4")
        if seq_idx is not None:
            require(channel_last, "seq_idx is only supported for channel last layout")
            require(seq_idx.dtype == torch.int32, "seq_idx.scalar_type() == torch::kInt32")
            require(seq_idx.device == x.device and seq_idx.shape == (batch, length), "seq_idx must have shape (B, L)")
        if fault == "convolution":
            seq_idx = None
        if fault == "backward":
            out = _WrongBackward.apply(x, weight, seq_idx) + (0.0 if bias is None else bias[None, :, None])
        else:
            out = convolve(x, weight, bias, seq_idx)
        return (out if activation is None else F.silu(out)).to(x.dtype)

    return causal_conv1d_fn


def spans(ends: list[int], fault: Fault | None) -> Iterator[slice]:
    """Where each sequence is, or what a kernel at fault takes for one."""
    if fault == "state":
        ends = [0, ends[-1]]
    if fault == "chunks":
        # a row that begins in a chunk is kept apart in it; the next chunk goes on with what the last one left
        ends = [0, *(end for end in ends[1:-1] if end % 64 > 32), ends[-1]]
    return (slice(a, b) for a, b in pairwise(ends))


def gated_delta_rule(torch_function: Callable, fault: Fault | None = None) -> Callable:
    def chunk_gated_delta_rule(
        q,
        k,
        v,
        g,
        beta,
        scale=None,
        initial_state=None,
        output_final_state=False,
        use_qk_l2norm_in_kernel=False,
        cu_seqlens=None,
        cu_seqlens_cpu=None,
        **kwargs,
    ):
        options = {"use_qk_l2norm_in_kernel": use_qk_l2norm_in_kernel}
        if cu_seqlens is None:
            out, state = torch_function(q, k, v, g=g, beta=beta, **options)
            return recurrence(out, fault, bounded=False), state
        if q.shape[0] != 1:
            raise ValueError(f"The batch size is expected to be 1 rather than {q.shape[0]} when using `cu_seqlens`.")
        require(not cu_seqlens.is_floating_point() and cu_seqlens.device == q.device, "cu_seqlens is read as integers")
        require(cu_seqlens_cpu is not None and cu_seqlens_cpu.device.type == "cpu", "else it waits for the device")
        assert torch.equal(cu_seqlens_cpu, cu_seqlens)
        require(int(cu_seqlens[-1]) == q.shape[1], "out of bounds")
        parts = [
            torch_function(q[:, at], k[:, at], v[:, at], g=g[:, at], beta=beta[:, at], **options)[0]
            for at in spans(cu_seqlens.tolist(), fault)
        ]
        return recurrence(torch.cat(parts, 1), fault, bounded=True), None

    return chunk_gated_delta_rule


def ends_of(seq_idx: torch.Tensor) -> list[int]:
    (changes,) = (seq_idx[0].diff() != 0).nonzero(as_tuple=True)
    return [0, *(changes + 1).tolist(), seq_idx.shape[1]]


def mamba_chunk_scan(torch_function: Callable, fault: Fault | None = None) -> Callable:
    def mamba_chunk_scan_combined(
        x,
        dt,
        A,
        B,
        C,
        chunk_size,
        D=None,
        z=None,
        dt_bias=None,
        initial_states=None,
        seq_idx=None,
        cu_seqlens=None,
        dt_softplus=False,
        dt_limit=(0.0, float("inf")),
        return_final_states=False,
        return_varlen_states=False,
    ):
        options = {"D": D, "dt_bias": dt_bias, "dt_softplus": dt_softplus, "dt_limit": dt_limit}
        if seq_idx is None:
            return recurrence(torch_function(x, dt, A, B, C, chunk_size, **options), fault, bounded=False)
        assert seq_idx.shape == x.shape[:2] == (1, x.shape[1])
        parts = [
            torch_function(x[:, at], dt[:, at], A, B[:, at], C[:, at], chunk_size, **options)
            for at in spans(ends_of(seq_idx), fault)
        ]
        return recurrence(torch.cat(parts, 1), fault, bounded=True)

    return mamba_chunk_scan_combined


def mamba_split_conv1d_scan(scan: Callable, convolution: Callable) -> Callable:
    """The fused form that Mamba 2 layers run in training mode."""

    def mamba_split_conv1d_scan_combined(
        zxbcdt,
        conv1d_weight,
        conv1d_bias,
        dt_bias,
        A,
        D,
        chunk_size,
        initial_states=None,
        seq_idx=None,
        dt_limit=(0.0, float("inf")),
        return_final_states=False,
        activation="silu",
        rmsnorm_weight=None,
        rmsnorm_eps=1e-6,
        outproj_weight=None,
        outproj_bias=None,
        headdim=None,
        ngroups=1,
        norm_before_gate=True,
    ):
        assert activation in [None, "silu", "swish"]
        assert not norm_before_gate
        (heads,) = D.shape
        dim = heads * headdim
        states = (conv1d_weight.shape[0] - dim) // 2
        z, xBC, dt = zxbcdt.split([dim, dim + 2 * states, heads], dim=-1)
        xBC = convolution(xBC.transpose(1, 2), conv1d_weight, conv1d_bias, seq_idx, activation=activation)
        x, B, C = xBC.transpose(1, 2).split([dim, states, states], dim=-1)
        B, C = (t.unflatten(-1, (ngroups, -1)) for t in (B, C))
        x = x.unflatten(-1, (heads, headdim))
        out = scan(
            x, dt, A, B, C, chunk_size, D=D, dt_bias=dt_bias, seq_idx=seq_idx, dt_softplus=True, dt_limit=dt_limit
        )
        gated = (out.flatten(2) * F.silu(z.float())).unflatten(-1, (ngroups, -1))
        normed = gated * (gated.square().mean(-1, keepdim=True) + rmsnorm_eps).rsqrt()
        return F.linear(normed.flatten(2) * rmsnorm_weight, outproj_weight, outproj_bias)

    return mamba_split_conv1d_scan_combined


def install_all(monkeypatch: pytest.MonkeyPatch, module: ModuleType, fault: Fault | None = None) -> None:
    """Have a modeling file of transformers use the stand-ins of all kernels that it knows."""
    convolution = causal_conv1d(fault)
    install(monkeypatch, module.causal_conv1d_fn, convolution)
    if rule := getattr(module, "torch_chunk_gated_delta_rule", None):
        install(monkeypatch, rule, gated_delta_rule(original(rule), fault))
    if scan := getattr(module, "mamba2_chunk_scan", None):
        kernel = mamba_chunk_scan(original(scan), fault)
        install(monkeypatch, scan, kernel)
        install(
            monkeypatch,
            module.mamba2_split_conv1d_scan_combined,
            mamba_split_conv1d_scan(kernel, convolution),
        )
