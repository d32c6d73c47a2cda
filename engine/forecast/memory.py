"""Peak memory of a training run, from shapes: its largest pack goes through the real code on tensors without data.

The model is built from its config alone. Forward and backward of the pack that has the most tokens run on fake tensors
under a count of live storages; the head's ops say what they hold inside, attention's are known to. The optimizer's
state is measured on a small layer. On a CUDA device the result is what ``torch.cuda.max_memory_allocated`` reports; of
one that is not there, tensors lie on the CPU and what differs by device is chosen as there. On the CPU runs report
resident memory: the C library is asked for the same blocks in the same order, since its heap also keeps what is free
between live blocks, and the resident memory of a process that has imported and read everything is added.

Of several processes each holds its share of weights, gradients and optimizer state, and what FSDP gathers; of those
that work on one pack, the one that predicts the most of its tokens is forecast.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..config.schema import RunConfig
from ..data.groups import PreferenceDataset, PreferenceGroup
from ..model.policy import Layout
from ..packing import PackedBatch, Step, group_sizes
from ..packing.rows import RowPlan, plan_rows
from ..train.feed import TrainingPack, build_pack
from ..train.objective import Objective
from ..train.references import resolve_mode
from .counting import Shapes
from .divided import divided
from .target import Target


@dataclass(frozen=True)
class Memory:
    """Bytes, on the device that trains; of several processes, on that of one."""

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
    gathered: int = 0
    """Weights of other processes that FSDP gathers, and gradients on their way to them."""
    stored: int = 0
    """What a checkpoint holds, wherever that lies."""
    backend: str = ""
    """What computes attention."""

    @property
    def peak(self) -> int:
        """What ``perf/peak_memory_gib`` will show."""
        return self.step_peak + self.process


def forecast_memory(
    config: RunConfig,
    dataset: PreferenceDataset,
    steps: Sequence[Step],
    *,
    target: Target,
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
    pack = _largest_pack(dataset, steps, share_prompts=config.packing.share_prompts)
    several = max(len(packs) for packs in steps) > 1
    groups = [dataset[i] for i in pack]
    return forecast_pack(config, groups, several=several, target=target, resident=resident, layout=layout)


def forecast_pack(
    config: RunConfig,
    groups: Sequence[PreferenceGroup],
    *,
    several: bool,
    target: Target,
    resident: int = 0,
    layout: Layout | None = None,
    repeats: tuple[int, int] | None = None,
) -> Memory:
    """As ``forecast_memory``, of a run whose largest pack holds these groups.

    Args:
        several: whether steps have several packs, so that there are gradients of earlier ones.
        repeats: ``layers_that_repeat`` of the model, where that is known.
    """
    layout = layout or Layout()
    # Chosen here for good: a kernel that is tried on tensors without data always works.
    backend = target.backend(config)
    with divided(config.train.context_parallel, lambda: pack_of(config, groups, layout)) as pack:
        counts = Shapes(config, pack, target, layout, several, repeats).count_all()
    reference = counts.weights if _live_second_model(config) else 0
    return Memory(
        weights=counts.weights + reference,
        gradients=counts.gradients,
        optimizer=counts.optimizer,
        activations=counts.activations,
        workspace=max(counts.workspace, counts.dequantized),
        step_peak=reference + counts.step_peak,
        process=resident if target.kind == "cpu" else 0,
        pack_tokens=pack.batch.num_tokens,
        stored=counts.stored,
        gathered=counts.gathered,
        backend=f"{backend.name}, {backend.reason}" if target.absent and backend.reason else backend.name,
    )


def _largest_pack(dataset: PreferenceDataset, steps: Sequence[Step], *, share_prompts: bool) -> tuple[int, ...]:
    """The pack with the most tokens that are learned from; of equal ones the first."""
    sizes = group_sizes(dataset.trained, share_prompts=share_prompts)
    return max((pack for step in steps for pack in step), key=lambda pack: int(sizes[list(pack)].sum()))


def pack_of(config: RunConfig, groups: Sequence[PreferenceGroup], layout: Layout) -> TrainingPack:
    """What is trained on of some groups, with references that are 0 and the rows that a layout asks for."""
    responses = sum(len(group.response_ids) for group in groups)

    def rows_of(batch: PackedBatch) -> RowPlan | None:
        return None if layout.blocks is None else plan_rows(batch.plan.segments, layout.blocks)

    references = torch.zeros(responses) if Objective(config.loss).needs_reference else None
    return build_pack(groups, references, share_prompts=config.packing.share_prompts, rows_of=rows_of)


def _live_second_model(config: RunConfig) -> bool:
    """Whether a frozen reference model stays beside the policy. Its size is taken to be the policy's."""
    own_adapter = config.model.trains_adapter and config.reference.model_name_or_path is None
    return resolve_mode(config, Objective(config.loss)) == "live" and not own_adapter
