"""A step of one pack on tensors without data, and the bytes that are counted in it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dpo_kernels.dispatch import implementation

from ..config.schema import RunConfig
from ..model import Policy
from ..model.before_head import HeadUse
from ..model.division import gathered_dtype, num_shards
from ..model.layouts import use_layout
from ..model.policy import Layout
from ..model.shard import transformer_blocks
from ..packing import PackedBatch
from ..train.feed import TrainingPack, TrainingStep
from ..train.metrics import StepWork
from ..train.objective import Objective
from .attention import workspace
from .blocks import fused_blocks, no_launches
from .heap import Heap
from .live_storage import LiveStorage, is_op, storage_bytes
from .sharding import SUM_BYTES, adding_bytes, gathered_bytes, largest_share, share_bytes
from .target import Target
from .weights import (
    policy_without_data,
    quantized_bytes,
    quantized_weights,
    state_bytes,
    stored_bytes,
    without_memory,
)

_TURNS = (1, 2, 3, 4, 5, 6, 8)
"""Numbers of layers after which a model may repeat."""
_SAMPLES = (2, 3)
"""Turns of layers that are run where a model has more."""


@dataclass(frozen=True)
class Counts:
    """Bytes. Those of a model that repeats grow by the same with every turn of its layers."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    workspace: int
    gathered: int
    dequantized: int
    """The largest weight of 4 bits, in the compute dtype."""
    update: int
    """What the optimizer holds while it works, beside its state."""
    stored: int
    """What a checkpoint holds, wherever that lies."""
    added: int
    """Numbers of the gradients that processes with whole copies of the model add up; 0 where they do not."""
    first: int
    """Most that is alive beside the weights until the second layer from the end is backward."""
    last: int
    """The same, while the first layer is."""

    @property
    def step_peak(self) -> int:
        """Most that is alive in a step: between these two moments what is alive changes evenly."""
        passes = max(self.first, self.last) + self.gathered + self.dequantized
        update = max(self.update, adding_bytes(self.added))
        return self.weights + max(passes, self.gradients + self.optimizer + update)

    def beyond(self, earlier: Counts, turns: int) -> Counts:
        """With so many turns more, each of which adds what this one has more than ``earlier``, of a turn less."""
        grown = {}
        for field in fields(self):
            now, before = getattr(self, field.name), getattr(earlier, field.name)
            grown[field.name] = now + turns * (now - before)
        return Counts(**grown)


@dataclass(frozen=True)
class Shapes:
    """What is run."""

    config: RunConfig
    pack: TrainingPack
    target: Target
    layout: Layout
    several: bool
    """Whether gradients of earlier packs of the step are there."""
    repeats: tuple[int, int] | None = None
    """``layers_that_repeat``, where that is known."""

    def count_all(self) -> Counts:
        """Of the whole model; where its layers repeat, of a few of them, and what each adds.

        The heap of the CPU depends on the order of all blocks, so there all layers are run.
        """
        turn, depth = self.repeats or layers_that_repeat(self.config, self.target)
        if self.target.kind == "cpu" or depth <= _SAMPLES[-1] * turn:
            return self.count(None)
        fewer, more = (self.count(turns * turn) for turns in _SAMPLES)
        return more.beyond(fewer, depth // turn - _SAMPLES[-1])

    def count(self, layers: int | None) -> Counts:
        """Of so many layers, or of all."""
        # Its tensors have data.
        held = _Workspace(self.pack.batch, self.target)
        with warnings.catch_warnings(), FakeTensorMode(allow_non_fake_inputs=True):
            # Whether rows are aligned, which decides nothing of their size.
            warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
            policy = policy_without_data(self.config, self.target, layers)
            use_layout(policy, self.layout)
            # Its value decides nothing here, and is measured on logits with data.
            policy.head_use = HeadUse()
            with fused_blocks(policy, self.config.model.kernels), no_launches():
                return self._count(policy, held)

    def _count(self, policy: Policy, held: _Workspace) -> Counts:
        config, target = self.config, self.target
        device, shards = target.device, num_shards(config, target.processes)
        objective = Objective(config.loss, token_metrics=config.train.token_metrics)
        heap = Heap() if target.kind == "cpu" and Heap.available() else None
        count = LiveStorage(device, held, heap)
        trained = [p for p in policy.parameters() if p.requires_grad]
        added = trained if shards < target.processes else []
        state_sizes, update = state_bytes(config.optim, policy, kind=target.kind, shards=shards)
        counted = count.watch([*policy.parameters(), *policy.buffers()], mapped=True)
        step = step_of(self.pack.map_tensors(partial(_moved, device=device)))
        activations = _Activations(policy, count)
        if shards > 1:
            # Each unit's are summed over the processes, which keep their shares, and are gone.
            for parameter in trained:
                parameter.register_post_accumulate_grad_hook(_drop_gradient)
        if heap is not None:
            # The first step leaves holes in the heap, and the optimizer's state among them.
            with count:
                objective.backward(policy, step)
        state = [torch.empty(size, dtype=torch.uint8, device=device) for size in state_sizes]
        count.watch(state)
        # Gradients of a step's other packs are there already; sharded ones only by their shares.
        sizes = [largest_share(p.numel(), p, shards) for p in trained]
        # Several are summed in float32, whatever the weights are held in.
        before = sizes if self.several or shards > 1 else []
        earlier = [torch.empty(n, dtype=torch.float32, device=device) for n in before]
        for parameter, gradient in zip_longest(trained, earlier):
            parameter.grad = None
            if earlier and shards == 1:
                parameter.grad_dtype = None  # type: ignore[attr-defined]
                parameter.grad = gradient.view(parameter.shape)
        count.watch(earlier)
        moments = _Moments(policy, count)
        with count:
            objective.backward(policy, step)
        small = quantized_weights(policy) if config.model.quantization else []
        saved = storage_bytes(small) - sum(map(quantized_bytes, small))
        return Counts(
            weights=counted - saved if shards == 1 else share_bytes(policy, shards),
            gradients=SUM_BYTES * sum(sizes) if earlier or added else _gradient_bytes(trained),
            optimizer=storage_bytes(state),
            activations=activations.bytes,
            workspace=count.largest_workspace,
            gathered=gathered_bytes(policy, shards, gathered_dtype(config)),
            dequantized=max((w.nbytes for w in small), default=0),
            update=update,
            stored=stored_bytes(config, policy, shards=shards),
            added=sum(sizes) if added else 0,
            first=(moments.first or count.peak) - counted if heap is None else heap.peak,
            last=max(0, moments.last - counted) if heap is None else 0,
        )


def layers_that_repeat(config: RunConfig, target: Target) -> tuple[int, int]:
    """After how many layers a model repeats, but for its first turn, and how many it has; equal where it does not."""
    policy = without_memory(config, target)
    blocks = transformer_blocks(policy.causal_lm)[::-1]
    text = policy.config.get_text_config()
    depth = text.num_hidden_layers
    if len(blocks) != depth:
        return depth, depth
    kinds = getattr(text, "layer_types", None) or [""] * depth
    layers = [(kind, type(block), _shapes(block)) for kind, block in zip(kinds, blocks, strict=True)]
    for turn in _TURNS:
        if depth % turn == 0 and all(layers[i] == layers[i - turn] for i in range(2 * turn, depth)):
            return turn, depth
    return depth, depth


def _shapes(block: nn.Module) -> list[tuple[str, torch.Size, torch.dtype, bool]]:
    return [(name, p.shape, p.dtype, p.requires_grad) for name, p in block.named_parameters()]


def _gradient_bytes(parameters: Sequence[Tensor]) -> int:
    return storage_bytes(p.grad for p in parameters if p.grad is not None)


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


class _Moments:
    """The peaks at the ends of the backward pass, told apart by the gradients that are complete."""

    def __init__(self, policy: Policy, count: LiveStorage):
        self.first = 0
        self._count = count
        self._set = False
        count.later_peak = 0
        blocks = transformer_blocks(policy.causal_lm)[::-1]
        if len(blocks) > 1:
            self._watch(blocks[-2], self._end_first)
            self._watch(blocks[1], self._begin_last)

    @property
    def last(self) -> int:
        """0 where nothing told when it began."""
        return self._count.later_peak if self._set else 0

    def _watch(self, block: nn.Module, then: Callable[[Tensor], None]) -> None:
        for parameter in block.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(then)

    def _end_first(self, *unused: Any) -> None:
        self.first = self.first or self._count.peak

    def _begin_last(self, *unused: Any) -> None:
        self._set, self._count.later_peak = True, 0


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor if tensor.device == device else torch.empty_like(tensor, device=device)


def step_of(pack: TrainingPack) -> TrainingStep:
    """A step of one pack."""
    work = StepWork(pairs=pack.batch.num_groups, unshared_tokens=0, packed_tokens=0, rows=0, flop=0.0)
    return TrainingStep(1, 0.0, (pack,), work)


class _Activations:
    """What the body's forward pass adds to what is alive."""

    def __init__(self, policy: Policy, count: LiveStorage):
        self.bytes = 0
        self._before = 0
        self._count = count
        body = policy.causal_lm.base_model
        body.register_forward_pre_hook(self._begin)  # type: ignore[operator, union-attr]
        body.register_forward_hook(self._end)  # type: ignore[operator, union-attr]

    def _begin(self, *unused: Any) -> None:
        self._before = self._count.current

    def _end(self, *unused: Any) -> None:
        self.bytes = max(self.bytes, self._count.current - self._before)


class _Workspace:
    """Asks the head's implementations what they hold inside, and knows attention's."""

    def __init__(self, batch: PackedBatch, target: Target):
        self.device = torch.device(target.kind)
        self.cu_responses = batch.cu_responses_S1.tolist()
        if batch.desirable is not None:
            # Each response is alone in its pair, beside an empty one.
            ends = self.cu_responses[1:]
            self.cu_responses = [0, *(end for end in ends for _ in range(2))]
        self.segments = torch.tensor(batch.plan.segments, dtype=torch.int64)

    def __call__(self, func: Any, args: tuple[Any, ...]) -> int:
        if not is_op(func, "linear_dpo", "linear_logps", "linear_logps_backward", "linear_logps_backward_accumulate"):
            return workspace(func, args, self.segments)
        given = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)}
        hidden, weight = given["hidden"], given["weight"]
        paired = is_op(func, "linear_dpo")
        losses = given["loss_type"].split(",") if paired else ()
        op = "linear_dpo" if paired else "linear_logps"
        device = hidden.device if hidden.device.type == self.device.type else self.device
        module = implementation(op, given["impl"], hidden, losses=losses, device=device)
        if paired:
            return module.forward_workspace(hidden, weight, self.cu_responses, given["need_weight"])
        if is_op(func, "linear_logps"):
            return module.forward_workspace(hidden, weight, given["need_dx"])
        return module.backward_workspace(hidden, weight)
