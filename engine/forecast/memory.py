"""Peak memory of a training run, from shapes: its largest pack goes through the real code on tensors without data.

The model is built from its config alone. Forward and backward of the pack that has the most tokens run on fake tensors
under a count of live storages; the head's ops say what they hold inside, attention's are known to. The optimizer's
state is measured on a small layer. On a CUDA device the result is what ``torch.cuda.max_memory_allocated`` reports. On
the CPU runs report resident memory: the C library is asked for the same blocks in the same order, since its heap also
keeps what is free between live blocks, and the resident memory of a process that has imported and read everything is
added.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from dpo_kernels.dispatch import implementation

from ..config.schema import OptimConfig, RunConfig
from ..data.groups import PreferenceDataset
from ..model import Policy, load_policy
from ..model.attention import choose_backend
from ..model.before_head import HeadUse
from ..model.layouts import use_layout
from ..model.load import DTYPES
from ..model.policy import Layout
from ..packing import PackedBatch, Step, build_batch, group_sizes
from ..packing.rows import plan_rows
from ..train.feed import TrainingPack, TrainingStep
from ..train.metrics import StepWork
from ..train.objective import Objective
from ..train.optimizer import build_optimizer
from ..train.references import resolve_mode
from .attention import workspace
from .heap import Heap
from .live_storage import LiveStorage, is_op, storage_bytes

_PROBE_WIDTH = 128


@dataclass(frozen=True)
class Memory:
    """Bytes, on the device that trains."""

    weights: int
    """Parameters and buffers, a live reference model included."""
    gradients: int
    """When all of them are there."""
    optimizer: int
    activations: int
    """What the forward pass of the largest pack leaves for its backward pass."""
    workspace: int
    """Most that an op of the head or of attention holds inside."""
    step_peak: int
    """Most that is alive at once in a step; not the sum of the parts, which have their peaks at different times."""
    process: int
    """Resident memory of the process beside the tensors; 0 on a CUDA device, where it does not count."""
    pack_tokens: int
    """Tokens of the pack that was run."""

    @property
    def peak(self) -> int:
        """What ``perf/peak_memory_gib`` will show."""
        return self.step_peak + self.process


def forecast_memory(
    config: RunConfig,
    dataset: PreferenceDataset,
    steps: Sequence[Step],
    *,
    device: torch.device,
    resident: int,
    layout: Layout | None = None,
) -> Memory:
    """Run the largest pack on fake tensors.

    Args:
        layout: how packs are computed; on packs alone by default.
        steps: the plan of an epoch.
        resident: resident memory of a process that has imported and read what a run does, without the model.

    Raises:
        Exception: whatever the model raises that is asked for the value of a tensor without data, or cannot be built.
    """
    if config.model.quantization:
        raise ValueError("quantised weights are made while the model is loaded")
    pack = _largest_pack(dataset, steps, share_prompts=config.packing.share_prompts)
    layout = layout or Layout()
    batch = build_batch([dataset[i] for i in pack], share_prompts=config.packing.share_prompts)
    batch = with_rows(batch, layout)
    objective = Objective(config.loss, token_metrics=config.train.token_metrics)
    heap = Heap() if device.type == "cpu" and Heap.available() else None
    count = LiveStorage(device, _Workspace(batch), heap)
    # Chosen here for good: a kernel that is tried on tensors without data always works.
    choose_backend(config.model.attention, device, DTYPES[config.model.dtype])
    with FakeTensorMode(allow_non_fake_inputs=True):
        policy = _policy_without_data(config, device)
        use_layout(policy, layout)
        # Its value decides nothing here, and is measured on logits with data.
        policy.head_use = HeadUse()
        trained = [p for p in policy.parameters() if p.requires_grad]
        per_weight, transient = _optimizer_bytes(config.optim, trained, device)
        weights = count.watch([*policy.parameters(), *policy.buffers()], mapped=True)
        step = step_of(batch, objective, device)
        activations = _Activations(policy, count)
        if heap is not None:
            # The first step leaves holes in the heap, and the optimizer's state among them.
            with count:
                objective.backward(policy, step)
        state = [torch.empty(int(per_weight * p.numel()), dtype=torch.uint8, device=device) for p in trained]
        count.watch(state)
        several = max(len(packs) for packs in steps) > 1
        for parameter in trained:
            # Gradients of a step's other packs are there already.
            if several:
                # Summed in float32, whatever the weights are held in.
                parameter.grad_dtype = None  # type: ignore[attr-defined]
                parameter.grad = torch.empty_like(parameter, dtype=torch.float32)
        count.watch([p.grad for p in trained if p.grad is not None])
        with count:
            objective.backward(policy, step)
        gradients = storage_bytes([p.grad for p in trained if p.grad is not None])
    reference = weights if _live_second_model(config, policy) else 0
    held = count.peak if heap is None else weights + heap.peak
    return Memory(
        weights=weights + reference,
        gradients=gradients,
        optimizer=storage_bytes(state),
        activations=activations.bytes,
        workspace=count.largest_workspace,
        step_peak=reference + max(held, weights + gradients + storage_bytes(state) + transient),
        process=resident if device.type == "cpu" else 0,
        pack_tokens=batch.num_tokens,
    )


def _policy_without_data(config: RunConfig, device: torch.device) -> Policy:
    """The policy as a run loads it, of tensors that have all but data, in training mode."""
    with torch.device("meta"):
        policy = load_policy(
            config.model,
            device=device,
            gradient_checkpointing=config.train.gradient_checkpointing,
            empty=True,
            weights_dtype=config.optim.weights_dtype,
        )
    # Tied weights stay one tensor.
    made: dict[int, Tensor] = {}
    for module in policy.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in made:
                made[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device=device), parameter.requires_grad)
            if parameter is not None:
                module._parameters[name] = made[id(parameter)]  # type: ignore[assignment]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = made.setdefault(id(buffer), torch.empty_like(buffer, device=device))
    policy.activation_offload = config.train.activation_offload
    return policy.train()


def _largest_pack(dataset: PreferenceDataset, steps: Sequence[Step], *, share_prompts: bool) -> tuple[int, ...]:
    """The pack with the most tokens; of equal ones the first."""
    sizes = group_sizes(dataset.lengths, share_prompts=share_prompts)
    return max((pack for step in steps for pack in step), key=lambda pack: int(sizes[list(pack)].sum()))


def with_rows(batch: PackedBatch, layout: Layout) -> PackedBatch:
    """The same batch with the rows that a layout asks for."""
    return batch if layout.blocks is None else replace(batch, rows_plan=plan_rows(batch.plan.segments, layout.blocks))


def step_of(batch: PackedBatch, objective: Objective, device: torch.device) -> TrainingStep:
    """A step of one pack whose references are 0."""
    references = torch.zeros(batch.num_responses) if objective.needs_reference else None
    pack = TrainingPack(batch, references).to(device)
    work = StepWork(pairs=batch.num_groups, unshared_tokens=0, packed_tokens=0, rows=0, flop=0.0)
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

    def __init__(self, batch: PackedBatch):
        self.cu_responses = batch.cu_responses_S1.tolist()
        self.segments = torch.tensor(batch.plan.segments, dtype=torch.int64)

    def __call__(self, func: Any, args: tuple[Any, ...]) -> int:
        if not is_op(func, "linear_dpo", "linear_logps", "linear_logps_backward", "linear_logps_backward_accumulate"):
            return workspace(func, args, self.segments)
        given = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)}
        hidden, weight = given["hidden"], given["weight"]
        paired = is_op(func, "linear_dpo")
        losses = given["loss_type"].split(",") if paired else ()
        module = implementation("linear_dpo" if paired else "linear_logps", given["impl"], hidden, losses=losses)
        if paired:
            return module.forward_workspace(hidden, weight, self.cu_responses, given["need_weight"])
        if is_op(func, "linear_logps"):
            return module.forward_workspace(hidden, weight, given["need_dx"])
        return module.backward_workspace(hidden, weight)


def _optimizer_bytes(config: OptimConfig, trained: Sequence[Tensor], device: torch.device) -> tuple[float, int]:
    """(bytes of state for each weight, most bytes that an update holds beside it), from one update of a small layer."""
    with unset_fake_temporarily():
        layer = nn.Linear(_PROBE_WIDTH, _PROBE_WIDTH, bias=False, device=device, dtype=DTYPES[config.weights_dtype])
        optimizer, _ = build_optimizer(layer, config)
        layer.weight.grad = torch.zeros_like(layer.weight)
        count = LiveStorage(device, lambda func, args: 0)
        with count:
            optimizer.step()
        tensors = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor) and v.ndim]
        state = storage_bytes(tensors)
    numbers = [p.numel() for p in trained]
    together = sum(numbers) if optimizer.defaults.get("foreach") else max(numbers)
    unit = layer.weight.numel()
    return state / unit, max(0, count.peak - state) * together // unit


def _live_second_model(config: RunConfig, policy: Policy) -> bool:
    """Whether a frozen reference model stays beside the policy. Its size is taken to be the policy's."""
    own_adapter = policy.has_adapter and config.reference.model_name_or_path is None
    return resolve_mode(config, Objective(config.loss)) == "live" and not own_adapter
