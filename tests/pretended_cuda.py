"""A CUDA device that is not there: tensors that say they are on it, hold their data on the CPU, and refuse to wait.

``PretendedCuda`` is entered around code that is to run as on a GPU. What it makes with ``device="cuda"`` are
``OnDevice`` tensors: to Python code they lie on ``cuda:0``, so that code takes the branches that it takes there, and
the numbers are those of the CPU. What would make the host wait for the device raises ``HostWaitError`` right there:
reading a number, copies to pageable memory or from it, copies that do not say ``non_blocking``, and operations whose
result has a size that only the device knows. Ops of this project run as their bodies, not as one opaque call.

Copies between page-locked memory and the device are done late, as a GPU does them: writing to the source of a copy, or
reading what a copy has yet to fill, raises ``UnsafeCopyError``. Fused optimizers refuse what their CUDA kernels refuse.
Kernels of Triton are run by its interpreter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from typing import Any
from unittest import mock

import torch
import torch.nn.utils.clip_grad as clip_grad
import torch.optim.optimizer as optimizer
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from tests.pretended_refusals import check
from tests.pretended_streams import Streams, is_empty
from tests.pretended_tensor import CUDA, ENTERED, HostWaitError, OnDevice, on_host, wait

__all__ = ["CUDA", "HostWaitError", "OnDevice", "PretendedCuda", "UnsafeCopyError", "on_host", "pretended_cuda"]

aten = torch.ops.aten

_COPIES = {"_to_copy", "copy_"}


class UnsafeCopyError(RuntimeError):
    """Page-locked memory is used while a copy may still be reading or filling it."""


class PretendedCuda(TorchDispatchMode):
    """The device. ``operations`` counts what ran on it, ``copies`` the bytes that were sent to it."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.copies: list[int] = []
        self.watch: Callable[..., None] | None = None
        """Called with every operation of the device and its arguments."""
        self.may_wait = False
        self.waits = 0
        self.streams: Streams | None = None
        """Once code has asked for one beside the stream that all runs on."""
        self._pinned: dict[int, torch.UntypedStorage] = {}
        self._reading: list[tuple[Tensor, Tensor]] = []
        self._filling: dict[int, Tensor] = {}

    def take(self, module: torch.nn.Module) -> torch.nn.Module:
        """Move the parameters and buffers of a module to the device, in place."""
        moved: dict[int, Tensor] = {}
        for owner in module.modules():
            for name, p in owner._parameters.items():
                if p is not None:
                    with self:
                        data = (
                            moved.get(id(p))
                            if id(p) in moved
                            else torch.nn.Parameter(OnDevice(p.detach().clone()), p.requires_grad)
                        )
                    moved[id(p)] = owner._parameters[name] = data
            for name, buffer in owner._buffers.items():
                if buffer is not None:
                    owner._buffers[name] = OnDevice(buffer.clone())
        return module

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Inside, the host may wait, and ``waits`` counts how often it does."""
        before, self.may_wait = self.may_wait, True
        try:
            yield
        finally:
            self.may_wait = before

    def finish(self) -> None:
        """Wait for the device, as a log interval does. Copies from page-locked memory arrive only now."""
        self._filling.clear()
        if self.streams is not None:
            self.streams.finish()
        reading, self._reading = self._reading, []
        for source, before in reading:
            _check_unwritten(source, before)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name
        if name in OPDEFS and self._on_device(args, kwargs):
            with self:
                return OPDEFS[name]._init_fn(*args, **kwargs)
        short = name.split("::")[1]
        if short == "is_pinned":
            return args[0].untyped_storage()._cdata in self._pinned
        if short in ("pin_memory", "_pin_memory"):
            return self._pin(aten.clone(args[0]))
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            # Below autograd torch hands these over whole; what they are made of is what counts.
            with self:
                return func.decompose(*args, **kwargs)
        if kwargs.pop("pin_memory", None):
            return self._pin(func(*args, **kwargs))
        if short in _COPIES:
            self._check_copy(short, args, kwargs)
        elif self._on_device(args, kwargs):
            check(func, short, args, kwargs)
        self._check_host_reads(short, args)
        return self._run(func, short, args, kwargs)

    def launch(self, kernel: Any, *arguments: Any, grid: Any, warmup: bool = False, **options: Any) -> None:
        """Run a kernel of Triton, which may read and write what it is given."""
        from triton.runtime.interpreter import InterpretedFunction

        tensors = [a for a in (*arguments, *options.values()) if isinstance(a, Tensor)]
        if not all(isinstance(t, OnDevice) for t in tensors):
            raise RuntimeError(f"{kernel.__name__} is given memory of the host")
        self.operations[kernel.__name__] += 1
        if self.streams is not None:
            self.streams.run(kernel.__name__, [], self._of_device(tensors))
        with _disable_current_modes():
            InterpretedFunction(kernel.fn).run(*map(on_host, arguments), grid=grid, warmup=warmup, **options)

    def _on_device(self, args: Any, kwargs: Any) -> bool:
        return any(isinstance(leaf, OnDevice) for leaf in tree_leaves((args, kwargs)))

    def _pin(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self._pinned[storage._cdata] = storage
        return tensor

    def _check_copy(self, short: str, args: Any, kwargs: Any) -> None:
        """Copies between host and device are from or to page-locked memory, and say that nobody waits."""
        source = args[0] if short == "_to_copy" else args[1]
        if short == "_to_copy":
            target = kwargs.get("device")
            arrives = not isinstance(source, OnDevice) and target is not None and target.type == "cuda"
            leaves = False
        else:
            arrives = isinstance(args[0], OnDevice) and not isinstance(source, OnDevice) and source.ndim > 0
            leaves = isinstance(source, OnDevice) and not isinstance(args[0], OnDevice)
        if not (arrives or leaves):
            return
        held = source if arrives else args[0]
        says_so = kwargs.get("non_blocking") or (short == "copy_" and len(args) > 2 and args[2])
        pinned = held.untyped_storage()._cdata in self._pinned
        if not (says_so and pinned):
            how = "pageable memory" if not pinned else "a copy that blocks"
            wait(f"{'to' if arrives else 'from'} the GPU, {list(held.shape)} {held.dtype}: {how}")
        elif arrives:
            self.copies.append(held.nbytes)
            # Memory that is given back waits for the copy in torch's allocator; memory that is kept must not change.
            self._reading.append((held, held.clone()))
        else:
            place = held.untyped_storage()._cdata
            # In the order of a single stream, copies from this memory are done before it is filled.
            done = [e for e in self._reading if e[0].untyped_storage()._cdata == place and self.streams is None]
            self._reading = [entry for entry in self._reading if not any(entry is one for one in done)]
            for source, before in done:
                _check_unwritten(source, before)
            self._filling[place] = held

    def _check_host_reads(self, short: str, args: Any) -> None:
        """What the device has yet to fill may only be sent back to it, in the order of its stream."""
        if not self._filling or short in _COPIES or short in ("detach", "view", "alias"):
            return
        for leaf in tree_leaves(args):
            if type(leaf) is Tensor and leaf.untyped_storage()._cdata in self._filling:
                raise UnsafeCopyError(f"{short} reads memory that a copy from the GPU may still be filling")

    def _use_streams(self, func: Any, short: str, args: Any, kwargs: Any, out: Any) -> None:
        assert self.streams is not None
        schema = func._schema.arguments
        writes = [a for a, s in zip(args, schema, strict=False) if _is_written(s)]
        writes += [kwargs[s.name] for s in schema if _is_written(s) and s.name in kwargs]
        written = self._of_device(writes)
        read = [t for t in self._of_device((args, kwargs)) if not any(t is w for w in written)]
        if any(r.alias_info is not None for r in func._schema.returns) and not written:
            # A view uses nothing.
            return
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor)] if not written else []
        for tensor in made:
            self.streams.make_room(tensor)
        self.streams.run(short, read, [*written, *([] if is_empty(short) else made)])

    def _of_device(self, values: Any) -> list[Tensor]:
        """Data on the device and in page-locked memory."""
        leaves = [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
        return [on_host(t) for t in leaves if isinstance(t, OnDevice) or t.untyped_storage()._cdata in self._pinned]

    def _run(self, func: Any, short: str, args: Any, kwargs: Any) -> Any:
        target = kwargs.get("device")
        if target is not None:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        on_device = self._on_device(args, kwargs) if target is None or target.type == "cpu" else target.type == "cuda"
        # What autograd itself makes while it goes backward lies with its gradients.
        on_device = on_device or (target is not None and torch._C._current_graph_task_id() != -1)
        if on_device:
            self.operations[short] += 1
            if self.watch is not None:
                self.watch(func, args, kwargs)
        run, host_args, host_kwargs = _for_the_cpu(func, short, tree_map(on_host, args), tree_map(on_host, kwargs))
        out = run(*host_args, **host_kwargs)
        if self.streams is not None and on_device | (short in _COPIES):
            self._use_streams(func, short, args, kwargs, out)
        written = [a for a, s in zip(args, func._schema.arguments, strict=False) if _is_written(s)]
        written += [kwargs[s.name] for s in func._schema.arguments if _is_written(s) and s.name in kwargs]
        if written and func._schema.returns and not isinstance(written[0], list):
            return written[0] if len(func._schema.returns) == 1 else tuple(written)
        return tree_map(lambda t: OnDevice(t) if isinstance(t, Tensor) and on_device else t, out)


def _beside(device: PretendedCuda) -> Streams:
    if device.streams is None:
        device.streams = Streams()
        device.streams.host_waits = device.finish
    return device.streams


def _check_unwritten(source: Tensor, before: Tensor) -> None:
    if not torch.equal(source, before):
        raise UnsafeCopyError(f"{source.nbytes} bytes were written to before their copy to the GPU was done")


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def _for_the_cpu(func: Any, short: str, args: Any, kwargs: Any) -> tuple[Any, Any, Any]:
    """The same in a form that the CPU has kernels for."""
    if short in ("mm", "addmm", "bmm") and func._overloadname in ("dtype", "dtype_out"):
        # Products of 16 bits whose results are wider.
        dtype = args[-1]
        plain = getattr(aten, short).out if "out" in kwargs else getattr(aten, short).default
        return plain, tuple(a.to(dtype) if isinstance(a, Tensor) else a for a in args[:-1]), kwargs
    if short == "histc" and not args[0].is_floating_point():
        return lambda values, *rest: func(values.float(), *rest).to(values.dtype), args, kwargs
    return func, args, kwargs


@contextmanager
def pretended_cuda() -> Iterator[PretendedCuda]:
    """Enter a ``PretendedCuda``, with what torch's Python side asks of CUDA in place; waits for it in the end."""

    class Autocast(torch.autocast):
        def __init__(self, device_type: str, *args: Any, **kwargs: Any):
            super().__init__(device_type.replace("cuda", "cpu"), *args, **kwargs)

    def told_cpu(original: Callable[..., Any]) -> Callable[..., Any]:
        return lambda device_type="cuda": original(device_type.replace("cuda", "cpu"))

    def by_device(original: Callable[..., Any]) -> Callable[..., Any]:
        def grouped(tensors: Any, *args: Any, **kwargs: Any) -> Any:
            found = original(tensors, *args, **kwargs)
            return {(group[0][0][0].device, dtype): group for (_, dtype), group in found.items()}

        return grouped

    grouping = "_group_tensors_by_device_and_dtype"
    patches = [
        mock.patch("torch.cuda._lazy_init"),
        mock.patch("torch.cuda.get_device_capability", return_value=(9, 0)),
        mock.patch("torch.cuda.get_rng_state", side_effect=lambda device: torch.get_rng_state()),
        mock.patch("torch.cuda.set_rng_state", side_effect=lambda state, device: torch.set_rng_state(state)),
        mock.patch("torch.cuda.synchronize", side_effect=lambda device=None: device_mode.finish()),
        mock.patch("torch.cuda.device", return_value=nullcontext()),
        mock.patch("torch.cuda.Stream", side_effect=lambda device=None: _beside(device_mode).make()),
        mock.patch("torch.cuda.current_stream", side_effect=lambda device=None: _beside(device_mode).current),
        mock.patch("torch.cuda.stream", side_effect=lambda stream: _beside(device_mode).on(stream)),
        mock.patch("torch.cuda.tunable.is_enabled", return_value=False),
        mock.patch("torch.cuda.max_memory_allocated", return_value=0),
        mock.patch("torch.cuda.reset_peak_memory_stats"),
        mock.patch("torch.autocast", Autocast),
        mock.patch("torch.amp.autocast", Autocast),
        mock.patch("torch.is_autocast_enabled", told_cpu(torch.is_autocast_enabled)),
        mock.patch("torch.get_autocast_dtype", told_cpu(torch.get_autocast_dtype)),
        mock.patch.object(optimizer, grouping, by_device(getattr(optimizer, grouping))),
        mock.patch.object(clip_grad, grouping, by_device(getattr(clip_grad, grouping))),
    ]
    device_mode = PretendedCuda()
    if find_spec("triton") is not None:
        launch = lambda kernel, *arguments, **options: device_mode.launch(kernel, *arguments, **options)  # noqa: E731
        patches.append(mock.patch("triton.runtime.jit.JITFunction.run", launch))
    lifts = torch._C._only_lift_cpu_tensors()
    for patch in patches:
        patch.start()
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        ENTERED.append(device_mode)
        with device_mode:
            yield device_mode
            device_mode.finish()
    finally:
        ENTERED.remove(device_mode)
        torch._C._set_only_lift_cpu_tensors(lifts)
        for patch in reversed(patches):
            patch.stop()
