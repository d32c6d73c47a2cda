"""Which implementation of an op runs, and why.

An implementation is a module beside its op. ``auto`` takes the fastest that works on the tensors' device; a name asked
for outright is used or refused with the reason, never replaced.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import torch

from dpo_kernels import native

IMPLS = ("auto", "triton", "native", "torch", "reference")

MODULES = {
    "linear_logps": {
        "reference": "reference",
        "torch": "torch_chunks",
        "triton": "triton_tiles",
        "native": "native",
    },
    "linear_dpo": {"reference": "reference", "torch": "torch_chunks", "triton": "triton_pairs", "native": "native"},
}
"""Files of implementations. Those of compiled code are not part of every build."""

_CALLED = {"linear_dpo": "linear_dpo_loss"}
"""What users call an op whose name differs."""
_MISSING = {"triton": "this build has no Triton kernels for {op}", "native": "the native extension is not built"}


class Choice(NamedTuple):
    """The implementation that runs and the reason for it."""

    impl: str
    reason: str


@functools.cache
def _load(op: str, impl: str) -> ModuleType:
    return importlib.import_module(f"dpo_kernels.{op}.{MODULES[op][impl]}")


def why_not(
    op: str,
    impl: str,
    device: torch.device,
    dtype: torch.dtype,
    stats: Sequence[str] = (),
    filtered: bool = False,
    losses: Sequence[str] = (),
) -> str | None:
    """Why ``impl`` of ``op`` cannot run on such tensors, or None.

    A ``filtered`` backward is asked of ``linear_logps``, ``losses`` of ``linear_dpo``, ``stats`` of tokens of both.
    Depends on the arguments, this install and the chip alone.
    """
    if impl not in MODULES[op]:
        return f"{op} has no such implementation"
    if impl == "torch" and filtered and device.type == "cuda":
        return "leaving out products in torch would wait for the GPU"
    if impl == "triton" and importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if importlib.util.find_spec(f"dpo_kernels.{op}.{MODULES[op][impl]}") is None:
        return _MISSING[impl].format(op=op)
    module = _load(op, impl)
    for kind, attribute, names in (("statistics", "STATS", stats), ("losses", "LOSSES", losses)):
        missing = [name for name in names if name not in getattr(module, attribute, names)]
        if missing:
            return f"no kernel computes the {kind} {', '.join(missing)}"
    if filtered and not hasattr(module, "FILTER_ROWS"):
        return "it has no filtered backward"
    return module.why_not(device, dtype) if hasattr(module, "why_not") else None


def choose(
    op: str,
    impl: str,
    device: torch.device | str,
    dtype: torch.dtype,
    stats: Sequence[str] = (),
    filtered: bool = False,
    losses: Sequence[str] = (),
    called: str | None = None,
) -> Choice:
    """Resolve a requested ``impl`` for tensors, and for what is asked of the op, as in ``why_not``.

    Args:
        called: the function that messages name; by default that of the op.

    Raises:
        ValueError: an unknown name.
        RuntimeError: an explicit request that cannot run here; a filter that nothing here can run.
    """
    check_impl(impl)
    device = torch.device(device)
    if impl != "auto":
        obstacle = why_not(op, impl, device, dtype, stats, filtered, losses)
        if obstacle:
            name = called or _CALLED.get(op, op)
            raise RuntimeError(f"{name} impl={impl!r} cannot run on {device.type} {dtype}: {obstacle}")
        return Choice(impl, "requested")
    if device.type == "cpu":
        obstacle = why_not(op, "native", device, dtype, stats, filtered, losses)
        if obstacle is None:
            return Choice("native", f"cpu tensors: row and vocabulary chunks, with native code for {native.isa()}")
        return Choice("torch", f"cpu tensors: row and vocabulary chunks in torch: {obstacle}")
    obstacle = why_not(op, "triton", device, dtype, stats, filtered, losses)
    if obstacle is None:
        return Choice("triton", f"{device.type} tensors and Triton kernels")
    if filtered and (refusal := why_not(op, "torch", device, dtype, stats, filtered)):
        raise RuntimeError(f"{op} cannot run on {device.type} {dtype}: {obstacle}; {refusal}")
    return Choice("torch", f"no Triton kernels: {obstacle}")


def check_impl(impl: str) -> None:
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(IMPLS)}; got {impl!r}")


def implementation(
    op: str,
    impl: str,
    tensor: torch.Tensor,
    stats: Sequence[str] = (),
    filtered: bool = False,
    losses: Sequence[str] = (),
    device: torch.device | None = None,
) -> ModuleType:
    """The module that runs ``op`` for a tensor like ``tensor``, or for one like it on another ``device``."""
    return _load(op, choose(op, impl, device or tensor.device, tensor.dtype, stats, filtered, losses).impl)
