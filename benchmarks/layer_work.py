"""What one more layer of a model adds to a step, counted on tensors without data: memory, traffic, launches.

A layer is the third one of a model of three, by what it adds to a model of two. Kernels that nothing can look into are
counted by what they are given: attention as one, Liger's as their launches, a compiled graph as inductor schedules it
(on the CPU, whose rules of what is fused with what are nearly those of a GPU), bitsandbytes' by its own operators, a
collective by what it moves.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine.config.schema import RunConfig
from engine.data.groups import PreferenceGroup
from engine.forecast import Target
from engine.forecast.blocks import for_shapes, fused_blocks, no_launches
from engine.forecast.counting import Shapes, step_of
from engine.forecast.divided import divided
from engine.forecast.live_storage import call_without_data, storage_bytes
from engine.forecast.memory import pack_of
from engine.forecast.weights import policy_without_data, state_bytes
from engine.model.load import DTYPES
from engine.model.policy import Layout
from engine.model.shard import transformer_blocks
from engine.train import bfloat16, held_weights
from engine.train.objective import Objective
from engine.train.optimizer import build_optimizer

TOKENS = 16384
PROCESSES = 8
ABSENT = Target.of_kind("cuda", 1)


def groups(count: int, prompt: int = 512, response: int = 256) -> list[PreferenceGroup]:
    ids = [np.arange(n, dtype=np.int32) for n in (prompt, response)]
    return [PreferenceGroup(i, ids[0], (ids[1], ids[1])) for i in range(count)]


class Work(TorchDispatchMode):
    """Operations that compute, and what they read and write; views do neither. Attention is one, whatever is in it."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = self.traffic = self.paused = 0

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Blocks are compiled while it counts."""
        return True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = call_without_data(func, args, kwargs or {})
        # Attention's flat results are told of as views by no schema.
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        if out is None:
            made = written_to(func, args, kwargs or {})
        if made and not view and not func._schema.name.startswith(("aten::empty", "aten::detach")):
            self.add([t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)], made)
        return out

    def add(self, read: Sequence[Tensor], made: Sequence[Tensor] = ()) -> None:
        """One launch, unless it is part of one that is counted whole."""
        if not self.paused:
            self.launches += 1
            self.traffic += sum(t.nbytes for t in [*read, *made])

    def told(self, arguments: Sequence[Any]) -> None:
        """A launch of a kernel, with what it was given, each of which it reads or writes."""
        self.add([x for x in arguments if isinstance(x, Tensor)])

    def scheduled(self, graph: Any, inputs: Sequence[Any], **options: Any) -> Callable[[list[Any]], Sequence[Any]]:
        """Stands for inductor's inner compiler: the kernels and the traffic that it plans, whenever the graph runs."""
        from torch._inductor.compile_fx import record_original_output_strides
        from torch._inductor.debug import DebugContext
        from torch._inductor.graph import GraphLowering
        from torch._inductor.virtualized import V

        record_original_output_strides(graph)
        lowered = GraphLowering(graph, example_inputs=inputs, shape_env=V.fake_mode.shape_env)
        with V.set_graph_handler(lowered), V.set_extern_kernel_nodes([]), V.set_debug_handler(DebugContext()):
            lowered.run(*inputs)
            lowered._update_scheduler()
            nodes = [n for n in lowered.scheduler.nodes if type(n).__name__ != "NopKernelSchedulerNode"]
            traffic = int(lowered.count_bytes()[0])
        run = for_shapes(graph, inputs)

        def counted(arguments: list[Any]) -> Sequence[Any]:
            self.launches += len(nodes)
            self.traffic += traffic
            self.paused += 1
            try:
                return run(arguments)
            finally:
                self.paused -= 1

        counted._boxed_call = True  # type: ignore[attr-defined]
        return counted


def written_to(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """What an operation without results changes of what it is given."""
    named = {a.name: a for a in func._schema.arguments}
    given = {**dict(zip(named, args, strict=False)), **kwargs}
    changed = [v for name, v in given.items() if (info := named[name].alias_info) is not None and info.is_write]
    return [t for t in tree_leaves(changed) if isinstance(t, Tensor)]


class Layer(NamedTuple):
    """What one more layer adds to a step of one pack."""

    saved: int
    """Bytes that lie on the device from its forward pass to its backward pass."""
    traffic: int
    """Bytes that its operations read and write, forward and backward."""
    launches: int


def layer_of(config: RunConfig, tokens: int = TOKENS) -> Layer:
    """The third layer of a model, on an absent CUDA device."""
    found = []
    with divided(config.train.context_parallel, lambda: pack_of(config, groups(tokens // 1024), Layout())) as pack:
        for layers in (2, 3):
            saved = Shapes(config, pack, ABSENT, Layout(), False).count(layers).activations
            work = Work()
            with _shapes_alone():
                policy = policy_without_data(config, ABSENT, layers)
                objective = Objective(config.loss, token_metrics=False)
                with fused_blocks(policy, config.model.kernels, work.scheduled), no_launches(work.told), work:
                    objective.backward(policy, step_of(pack.to(ABSENT.device)))
            found.append((saved, work.traffic, work.launches))
    return Layer(*_more(found))


class Update(NamedTuple):
    """What one more layer adds to what is kept between steps and to an update. Bytes are of a trained weight."""

    resident: float
    """On the device: the weight, its gradient of a step of one pack, and the optimizer's state."""
    host: float
    traffic: float
    """That the update reads and writes on the device."""
    bus: float
    """Between device and host."""
    launches: int


def update_of(config: RunConfig) -> Update:
    """The third layer of a model."""
    found = []
    for layers in (2, 3):
        with _shapes_alone():
            policy = policy_without_data(config, ABSENT, layers)
            trained = [p for p in policy.parameters() if p.requires_grad]
            on_device = sum(state_bytes(config.optim, policy, kind="cuda")[0])
            with _tables_of_8_bits():
                optimizer, _ = build_optimizer(policy.model, config.optim)
            work = Work()
            with _as_on_a_gpu(work), _bus(work) as moved:
                for _ in range(2):
                    for p in trained:
                        p.grad = torch.empty_like(p)
                    # The first update makes the state.
                    work.launches = work.traffic = moved[0] = 0
                    with work:
                        optimizer.step()
            everything = storage_bytes(_tensors(optimizer))
            weights = sum(p.nbytes for p in trained)
            numbers = sum(p.numel() for p in trained)
            # Gradients of one pass are as large.
            resident = 2 * weights + on_device
            found.append((numbers, resident, everything - on_device, work.traffic, moved[0], work.launches))
    numbers, *values, launches = _more(found)
    return Update(*(value / numbers for value in values), launches)


@contextmanager
def _tables_of_8_bits() -> Iterator[None]:
    """Inside, bitsandbytes makes its numbers of 8 bits with data, since it does so from values."""
    if find_spec("bitsandbytes") is None:
        yield
        return
    from bitsandbytes import functional

    made = functional.create_dynamic_map

    def with_data(*arguments: Any, **options: Any) -> Any:
        with unset_fake_temporarily():
            return made(*arguments, **options)

    with mock.patch.object(functional, "create_dynamic_map", with_data):
        yield


def _tensors(optimizer: Any) -> list[Tensor]:
    """What an optimizer keeps of its weights; counters and tables are the same for any number of them."""
    found = [v for slots in optimizer.state.values() for v in slots.values()]
    found += getattr(optimizer, "remainders", {}).values()
    return [v for v in found if isinstance(v, Tensor) and v.numel() >= 256 and v.shape != (256,)]


@contextmanager
def _as_on_a_gpu(work: Work) -> Iterator[None]:
    """Weights are rounded by kernels, whose launches are counted."""
    kernels = bfloat16.kernels_for(torch.device("cuda"))
    with mock.patch.object(bfloat16, "kernels_for", return_value=kernels), no_launches(work.told):
        yield


@contextmanager
def _bus(work: Work) -> Iterator[list[int]]:
    """Counts what goes to the host and comes back, which is no work of the device."""
    moved = [0]

    def counting(copy: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def counted(tensor: Tensor, *arguments: Any) -> Tensor:
            moved[0] += tensor.nbytes
            work.paused += 1
            try:
                return copy(tensor, *arguments)
            finally:
                work.paused -= 1

        return counted

    with (
        mock.patch.object(held_weights, "to_host", counting(held_weights.to_host)),
        mock.patch.object(held_weights, "to_device", counting(held_weights.to_device)),
    ):
        yield moved


class Spread(NamedTuple):
    """What one more layer adds on each of several processes. Bytes are of a weight of the layer, in float32."""

    resident: float
    """Weight, gradient and the two moments of adamw."""
    gathered: float
    """That this process receives of weights, forward and backward."""
    added: float
    """That it gives of gradients, to be summed."""


def spread_of(config: RunConfig) -> Spread:
    """The third layer of a model, on one of ``PROCESSES``, by FSDP itself, whose collectives move nothing."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    shards = config.train.shards_per_replica or PROCESSES
    if shards == 1:
        # One sum over all processes after the step; a ring sends and receives each number but its own share twice.
        return Spread(16.0, 0.0, 2 * 4 * (PROCESSES - 1) / PROCESSES)
    dist.init_process_group("fake", rank=0, world_size=PROCESSES, store=FakeStore())
    try:
        found = [_spread(config, layers, shards) for layers in (2, 3)]
    finally:
        dist.destroy_process_group()
    numbers, *values = _more(found)
    return Spread(*(value / numbers for value in values))


def _spread(config: RunConfig, layers: int, shards: int) -> tuple[int, int, int, int]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    gathered = None if config.train.param_dtype == "float32" else DTYPES[config.train.param_dtype]
    precision = MixedPrecisionPolicy(gathered, reduce_dtype=torch.float32, cast_forward_inputs=False)
    copies = PROCESSES // shards
    shape, names = ((shards,), ("shard",)) if copies == 1 else ((copies, shards), ("replicate", "shard"))
    pack = pack_of(config, groups(1), Layout())
    devices = init_device_mesh("cpu", shape, mesh_dim_names=names)
    with _shapes_alone():
        policy = policy_without_data(config, ABSENT, layers)
        numbers = sum(p.numel() for p in policy.parameters())
        model: Any = policy.causal_lm
        head = model.get_output_embeddings()
        # As in a run: tied, they stay with the rest.
        ends = () if model.config.tie_word_embeddings else (model.get_input_embeddings(), head)
        for unit in (*transformer_blocks(model), *ends, policy):
            fully_shard(unit, mesh=devices, mp_policy=precision, reshard_after_forward=True)
        collectives = _Collectives()
        with collectives:
            policy(pack.batch, lambda hidden, _: head(hidden)).sum().backward()
        share = sum(p._local_tensor.numel() for p in policy.parameters())
    return numbers, 16 * share, collectives.received, collectives.given


class _Collectives(TorchDispatchMode):
    """Bytes that a process receives of others to gather them, and gives them to be summed."""

    def __init__(self) -> None:
        super().__init__()
        self.received = self.given = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.rpartition("::")[2]
        if name.startswith("_allgather_base"):
            self.received += args[0].nbytes - args[1].nbytes
        elif name.startswith("_reduce_scatter_base"):
            self.given += args[1].nbytes - args[0].nbytes
        elif name.startswith("allreduce"):
            ranks = torch.distributed.ProcessGroup.unbox(args[1]).size()
            self.given += 2 * sum(t.nbytes for t in args[0]) * (ranks - 1) // ranks
        return func(*args, **(kwargs or {}))


def _more(found: Sequence[Sequence[int]]) -> list[int]:
    return [more - fewer for fewer, more in zip(*found, strict=True)]


@contextmanager
def _shapes_alone() -> Iterator[None]:
    with warnings.catch_warnings(), FakeTensorMode(allow_non_fake_inputs=True):
        warnings.simplefilter("ignore")
        yield
