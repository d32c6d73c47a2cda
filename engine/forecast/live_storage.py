"""Counts the bytes of all tensors that are alive while code runs, on real or on fake tensors."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..model.recompute import is_kept
from .heap import Heap

Workspace = Callable[[Any, tuple[Any, ...]], int]
"""Bytes that an op holds while it runs, beyond its inputs and outputs, from the op and its arguments."""

_fused: ContextVar[bool] = ContextVar("fused", default=False)


@contextmanager
def fused_operations() -> Iterator[None]:
    """Inside, operations are parts of kernels: what one gives another is in no memory, but for what products take."""
    token = _fused.set(True)
    try:
        yield
    finally:
        _fused.reset(token)


class LiveStorage(TorchDispatchMode):
    """``current`` and ``peak`` bytes of the storages that ops return, each counted once and until it is freed;
    ``later_peak`` is the same since it was set to 0.

    Args:
        device: what lies elsewhere does not count.
        workspace: told of every op, for what cannot be seen from outside.
        heap: where the same blocks are taken and given, without data; None where that changes nothing.
    """

    def __init__(self, device: torch.device, workspace: Workspace, heap: Heap | None = None):
        super().__init__()
        self._heap = heap
        self._blocks: dict[int, int | None] = {}
        self.device = device
        self.current = 0
        self.peak = self.later_peak = 0
        self.largest_workspace = 0
        self._workspace = workspace
        self._given_up: set[int] = set()
        self._sizes: dict[int, int] = {}

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Blocks are compiled while it counts, and what they were compiled to is counted."""
        return True

    def watch(self, tensors: Iterable[Tensor], *, mapped: bool = False) -> int:
        """Count tensors that were made outside; returns the bytes that they add.

        With ``mapped`` they are no blocks of the heap, but pages of a file.
        """
        before = self.current
        for tensor in tensors:
            self._see(tensor, mapped=mapped)
        self._note(self.current)
        return self.current - before

    def _note(self, alive: int) -> None:
        self.peak, self.later_peak = max(self.peak, alive), max(self.later_peak, alive)

    def _see(self, tensor: Tensor, *, mapped: bool = False) -> None:
        if tensor.device.type != self.device.type:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.current += self._sizes[key]
            if self._heap is not None and not mapped:
                self._blocks[key] = self._heap.take(self._sizes[key])
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.current -= self._sizes.pop(key)
        self._given_up.discard(key)
        if self._heap is not None:
            self._heap.give(self._blocks.pop(key, None))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.mul.Tensor and args[0].untyped_storage()._cdata in self._given_up:
            # With data, the paired op's backward pass scales its gradients where they lie.
            return args[0]
        out = call_without_data(func, args, kwargs or {})
        seen = out
        if _fused.get():
            seen = (args, kwargs, out) if is_kept(func) else ()
        for value in tree_leaves(seen):
            if isinstance(value, Tensor):
                self._see(value)
        if is_op(func, "linear_dpo"):
            self._given_up.update(gradient.untyped_storage()._cdata for gradient in out[3:6])
        held = self._workspace(func, args)
        self.largest_workspace = max(self.largest_workspace, held)
        self._note(self.current + held)
        if held and self._heap is not None:
            self._heap.give(self._heap.take(held))
        return out


def call_without_data(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An operation on tensors that may have no data, where torch does not know the dtype or the shape of its result.

    It knows grouped products of bfloat16 alone, and not how many counts ``bincount`` gives, with which transformers
    before 5.23 counts the tokens of experts: there are as many as are asked for, which is one for each expert.
    """
    if not args or not is_fake(args[0]):
        return func(*args, **kwargs)
    if func is torch.ops.aten.bincount.default and len(args) == 3 and args[1] is None:
        return args[0].new_empty(args[2], dtype=torch.int64)
    if func._schema.name != "aten::_grouped_mm" or args[0].dtype == torch.bfloat16:
        return func(*args, **kwargs)
    half = (x.bfloat16() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args)
    return func(*half, **kwargs).to(args[0].dtype)


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages of tensors."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def is_op(func: Any, *names: str) -> bool:
    """Whether ``func`` is the default overload of one of this project's ops."""
    return any(func is getattr(torch.ops.dpo_kernels, name).default for name in names)
