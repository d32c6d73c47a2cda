"""Fused blocks on tensors without data: what they keep, with no kernel generated or run.

Compiled blocks are traced and divided into forward and backward by the compiler itself; the graphs that it would
generate code for then run operation by operation, of which what stays inside a kernel counts nothing. Libraries that
launch kernels of Triton, such as Liger's layers and those of linear attention, run as they are but for the launches.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any
from unittest import mock

from torch import Tensor, fx

from ..config.schema import KernelName
from ..errors import UserError
from ..model import Policy
from ..model.kernels.compiled import compile_changes
from ..model.kernels.exchange import Exchange
from ..model.kernels.liger import liger_layers
from .live_storage import fused_operations

Inner = Callable[..., Callable[[list[Any]], Sequence[Any]]]
"""What makes a function of a graph, as inductor's own inner compiler does."""
Told = Callable[[Sequence[Any]], None]
"""Is given the arguments of a kernel."""

_ran = {"graphs": 0}


@contextmanager
def fused_blocks(policy: Policy, kernels: KernelName, inner: Inner | None = None) -> Iterator[None]:
    """Inside, the blocks of a policy without data keep what they would keep with such kernels.

    Args:
        kernels: with ``auto`` the blocks stay the model's own, which keep the most: what it takes is tried on a device.
        inner: compiles a graph, where that is asked for; by default it is run for its shapes.

    Raises:
        UserError: the kernels have nothing for this model, or are not installed.
    """
    if kernels in ("auto", "none"):
        yield
        return
    try:
        changes = liger_layers(policy) if kernels == "liger" else compile_changes(policy, _backend(inner or for_shapes))
    except ValueError as error:
        raise UserError(f"model.kernels={kernels} cannot be used: {error}; set model.kernels to auto") from error
    exchange, before = Exchange(changes), _ran["graphs"]
    exchange.on()
    try:
        yield
    finally:
        exchange.off()
    if kernels == "compile" and _ran["graphs"] == before:
        raise RuntimeError("this version of torch does not compile on tensors without data")


@cache
def _backend(inner: Inner) -> Callable[..., Any]:
    """One for all counts, so that packs and models of other sizes are not traced again."""

    def compiler(graph: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        from torch._inductor.compile_fx import compile_fx

        return compile_fx(graph, inputs, inner_compile=inner)  # type: ignore[arg-type]

    return compiler


def for_shapes(graph: fx.GraphModule, inputs: Sequence[Any], **unused: Any) -> Callable[[list[Any]], Sequence[Any]]:
    """A function that runs a graph for its shapes."""

    def run(arguments: list[Any]) -> Sequence[Any]:
        _ran["graphs"] += 1
        with fused_operations():
            outputs: Sequence[Any] = fx.Interpreter(graph).boxed_run(arguments)
        for output in outputs:
            if isinstance(output, Tensor):
                # an operation outside the kernels, which is counted
                output.detach()
        return outputs

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


@contextmanager
def no_launches(told: Told = lambda arguments: None) -> Iterator[None]:
    """Inside, kernels of Triton are not run; ``told`` of each what it would have been given."""
    if importlib.util.find_spec("triton") is None:
        yield
        return
    from triton.runtime.autotuner import Autotuner, Heuristics
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    def launch(kernel: Any, *arguments: Any, **options: Any) -> None:
        told([*arguments, *options.values()])

    with ExitStack() as stack:
        for kind in (JITFunction, InterpretedFunction, Autotuner, Heuristics):
            stack.enter_context(mock.patch.object(kind, "run", launch))
        yield
