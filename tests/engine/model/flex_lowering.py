"""What torch's compiler makes of FlexAttention for a CUDA device that is not there: Triton kernels, and what they take.

The graphs of the forward and the backward pass are traced on the CPU. Their tensors are then said to lie on the device,
and torch lowers them as it would there; Triton compiles the result with its own ptxas. Nothing is run on the device.

    python -m tests.engine.model.flex_lowering LAYER ARCH

prints a line of JSON a kernel. It is a process of its own, since torch remembers what it was told of the device.
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import triton
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._guards import TracingContext, tracing
from torch._inductor import config as inductor
from torch._inductor.compile_fx import compile_fx_inner
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_map
from triton.backends.compiler import GPUTarget

from dpo_kernels.kernels.offline import Resources, compiling_for, inspect_kernel
from engine.model.attention import flex
from tests.engine.model import flex_stand_in
from tests.engine.model.test_flex import LONG, problem

CUDA = torch.device("cuda", 0)
LAYERS: dict[str, dict[str, Any]] = {
    "gemma 2": {"heads": (4, 2), "widths": (256, 256), "softcap": 50.0, "window": 7},
    "gpt-oss": {"heads": (8, 1), "widths": (64, 64), "sinks": True},
    "llama 4": {"heads": (5, 1), "widths": (128, 128), "chunk": 64},
    "plain": {"heads": (2, 2), "widths": (64, 64)},
    "narrow": {"heads": (2, 1), "widths": (16, 16), "softcap": 30.0, "sinks": True},
    "odd widths": {"heads": (2, 1), "widths": (192, 80), "softcap": 30.0, "sinks": True},
}
Graph = tuple[torch.fx.GraphModule, list[Any]]


class _LoweredError(Exception):
    """The code is there; it goes no further."""


class Capture:
    """A backend of ``torch.compile`` that keeps the graphs, forward and backward; what it compiles gives zeros."""

    def __init__(self) -> None:
        self.graphs: list[Graph] = []
        self._backend = aot_autograd(
            fw_compiler=self._keep,
            bw_compiler=self._keep,
            partition_fn=min_cut_rematerialization_partition,
            decompositions=select_decomp_table,
        )

    def __call__(self, graph: Any, inputs: Any) -> Any:
        return self._backend(graph, inputs)

    def _keep(self, graph: torch.fx.GraphModule, inputs: Any) -> Any:
        self.graphs.append((graph, list(inputs)))
        (results,) = next(node for node in graph.graph.nodes if node.op == "output").args
        return make_boxed_func(lambda *_: [None if node is None else _zeros(node.meta["val"]) for node in results])


def _zeros(like: Any) -> Any:
    """Of the sizes that were traced, which are no constants thereby."""
    if not isinstance(like, torch.Tensor):
        return like.node.hint if isinstance(like, torch.SymInt) else like
    sizes, strides = ([_zeros(size) for size in all_sizes] for all_sizes in (like.size(), like.stride()))
    return torch.empty_strided(sizes, strides, dtype=like.dtype).zero_()


def kernels(graph: Graph, arch: str, folder: Path) -> list[Resources]:
    """The kernels of attention in a graph, compiled for a chip."""
    return [_compile(*found, arch, folder) for found in re.findall(_KERNEL, _code(graph, arch), flags=re.DOTALL)]


_KERNEL = r"async_compile\.triton\('(triton_tem_\w+)', '''(.*?)''', device_str='cuda'"


def _code(graph: Graph, arch: str) -> str:
    """Python code of a graph whose tensors lie on the device."""
    module, inputs = graph
    mode = next(x.fake_mode for x in inputs if isinstance(x, FakeTensor))
    found: list[str] = []

    def stop(lowering: GraphLowering) -> None:
        code, _ = lowering.codegen()
        found.append(getattr(code, "value", code))
        raise _LoweredError

    with _device(arch) as patches, mode, torch.no_grad():
        patches.enter_context(mock.patch.object(GraphLowering, "compile_to_module", stop))
        for part in module.modules():
            for node in part.graph.nodes if isinstance(part, torch.fx.GraphModule) else ():
                node.meta = {**node.meta, "val": tree_map(_moved, node.meta.get("val"))}
                if node.kwargs.get("device") == torch.device("cpu"):
                    node.kwargs = {**node.kwargs, "device": CUDA}
        try:
            with tracing(TracingContext(mode)), V.set_fake_mode(mode):
                compile_fx_inner(module, [tree_map(_moved, x) for x in inputs], static_input_idxs=[])
        except Exception as error:
            if "_LoweredError" not in repr(error):
                raise
    (code,) = found
    return code


def _moved(x: Any) -> Any:
    if not isinstance(x, torch.Tensor):
        return x
    return torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device=CUDA)


def _like_queries(output: torch.Tensor, strides: Any) -> torch.Tensor:
    """An output in the order of the queries' dimensions, without the copy that needs a device."""
    order = sorted(range(output.ndim - 1), key=lambda dim: strides[dim])
    result = [1] * output.ndim
    for before, dim in zip([output.ndim - 1, *order], order, strict=False):
        result[dim] = result[before] * output.shape[before]
    return output.new_empty_strided(output.shape, result)


def _device(arch: str) -> ExitStack:
    """A device of this kind, to everything that the compiler asks."""
    number = int(arch.removeprefix("sm_"))
    properties = SimpleNamespace(
        major=number // 10, minor=number % 10, name=arch, multi_processor_count=132, total_memory=80 << 30,
        warp_size=32, regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, max_threads_per_block=1024,
        shared_memory_per_block=49152, shared_memory_per_block_optin=232448, L2_cache_size=50 << 20, gcnArchName="",
    )  # fmt: skip
    answers: dict[str, Any] = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_properties": properties,
        "_get_device_properties": properties,
        "get_device_capability": (properties.major, properties.minor),
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
        "get_rng_state": torch.zeros(1, dtype=torch.uint8),
        "set_rng_state": None,
        "_lazy_init": None,
    }
    stack = ExitStack()
    stack.enter_context(compiling_for(arch))
    stack.enter_context(inductor.patch(force_disable_caches=True, compile_threads=1))
    for name, answer in answers.items():
        stack.enter_context(mock.patch(f"torch.cuda.{name}", lambda *_, _answer=answer: _answer, create=True))
    stack.enter_context(mock.patch("torch.version.cuda", "13.0"))
    stack.enter_context(mock.patch("torch._inductor.scheduler.has_triton", return_value=True))
    stack.enter_context(mock.patch("torch._subclasses.fake_tensor.init_gpu_context"))
    hop = sys.modules["torch._higher_order_ops.flex_attention"]
    stack.enter_context(mock.patch.object(hop, "_permute_strides", _like_queries))
    # patterns of whole models are found by example, on tensors of the device
    for passes in ("joint_graph", "post_grad"):
        stack.enter_context(mock.patch(f"torch._inductor.fx_passes.{passes}.lazy_init"))
    return stack


def _compile(name: str, source: str, arch: str, folder: Path) -> Resources:
    path = folder / f"{name}.py"
    path.write_text(source.replace("\\\\", "\\"))
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    place = "torch._inductor.runtime.triton_heuristics.template"
    try:
        with mock.patch(place, lambda **options: lambda function: (function, options)):
            spec.loader.exec_module(module)
        function, options = getattr(module, name)
        meta = options["triton_meta"]
        built = triton.compile(
            triton.compiler.ASTSource(
                fn=function, signature=meta["signature"], constexprs=meta["constants"], attrs=meta["configs"][0]
            ),
            target=GPUTarget("cuda", int(arch.removeprefix("sm_")), 32),
            options={key: options[key] for key in ("num_warps", "num_stages")},
        )
        return inspect_kernel(built, arch)
    finally:
        del sys.modules[name]


def main(layer: str, arch: str) -> None:
    capture = Capture()
    with pytest.MonkeyPatch.context() as monkeypatch, tempfile.TemporaryDirectory() as folder:
        flex_stand_in.install(monkeypatch)
        monkeypatch.setattr(flex, "BACKEND", capture)
        inputs, plan, scores = problem(LONG, torch.bfloat16, **LAYERS[layer])
        flex.flex_attention(*inputs[:3], plan, scores).sum().backward()
        for graph in capture.graphs:
            for kernel in kernels(graph, arch, Path(folder)):
                print(json.dumps(asdict(kernel)))


if __name__ == "__main__":
    main(*sys.argv[1:])
